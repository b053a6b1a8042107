"""`docker/install.sh` with small wheels in the place of large ones, which pip here installs as it does in an image."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

INSTALL = Path(__file__).parents[3] / "docker/install.sh"


def wheel(folder: Path, name: str, version: str, code: str, needs: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", code)
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def install(folder: Path, lock: str) -> subprocess.CompletedProcess[str]:
    (folder / "lock").write_text(lock)
    own = {"TARGET": f"{folder}/target", "TOOLS": f"{folder}/tools", "PIP_CONFIG_FILE": os.devnull}
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return subprocess.run(
        ["sh", INSTALL, folder / "lock"], env={**os.environ, **own, **pip}, capture_output=True, text=True, check=False
    )


def test_install__torch_for_cuda__brings_the_libraries_that_no_lock_has(tmp_path: Path) -> None:
    wheel(tmp_path, "torch", "2.0", "import nvidia_runtime, filelock", "nvidia_runtime==12.1")
    wheel(tmp_path, "nvidia_runtime", "12.1", "")
    for version in ("3.0", "3.1"):
        wheel(tmp_path, "filelock", version, "", "")
    wheel(tmp_path, "other", "1.0", "", "not_in_the_lock")
    done = install(tmp_path, "filelock==3.0\nother==1.0\ntorch==2.0\n")
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "target/lib").glob("python3*/site-packages")
    found = {path.name.removesuffix(".dist-info") for path in packages.glob("*.dist-info")}
    assert found == {"torch-2.0", "nvidia_runtime-12.1", "filelock-3.0", "other-1.0"}

    # One that lacks them fails its build.
    wheel(tmp_path, "torch", "3.0", "import libcudart")
    done = install(tmp_path, "filelock==3.0\ntorch==3.0\n")
    assert done.returncode != 0
    assert "No module named 'libcudart'" in done.stderr
