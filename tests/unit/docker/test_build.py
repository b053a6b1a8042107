"""`docker/build.sh` before it builds."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

BUILD = Path(__file__).parents[3] / "docker/build.sh"


def test_build__own_base_cannot_be_made__says_so_and_takes_no_other(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, code in {"debootstrap": "echo 'no mirror' >&2; exit 1", "buildah": f"touch {tmp_path}/called"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{code}\n")
        (programs / name).chmod(0o755)
    own = {"TOOL": "buildah", "PERCH_IMAGE_CACHE": str(tmp_path / "cache"), "PATH": f"{programs}:{os.environ['PATH']}"}
    environment = {name: value for name, value in os.environ.items() if name != "BASE"} | own
    done = subprocess.run(["bash", BUILD, "serving"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "base cannot be made here; name one: make images BASE=" in done.stderr
    assert not (tmp_path / "called").exists()


def test_build__with_docker__reaches_folders_of_this_machine_that_pip_is_configured_with(tmp_path: Path) -> None:
    """A build of Docker's sees none of them; what stands for Docker here asks as pip inside of it would."""
    (wheels := tmp_path / "wheels").mkdir()
    (index := tmp_path / "index/simple/one").mkdir(parents=True)
    (index / "index.html").write_text("<a href='../../files/one-1.0-py3-none-any.whl'>one-1.0-py3-none-any.whl</a>")
    (tmp_path / "index/files").mkdir()
    for file in (wheels / "two-1.0-py3-none-any.whl", tmp_path / "index/files/one-1.0-py3-none-any.whl"):
        name = file.name.split("-")[0]
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = file://{tmp_path}/index/simple\nfind-links = {wheels}\n")
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        'for word in "$@"; do case $word in id=pip.conf,src=*) conf=${word#*src=} ;; esac; done\n'
        f'echo "$@" >{tmp_path}/words; cp "$conf" {tmp_path}/seen\n'
        f"PIP_CONFIG_FILE=$conf {sys.executable} -m pip download --dest {tmp_path}/got one two >&2; exit 3\n"
    )
    docker.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    own = {
        "TOOL": str(docker),
        "BASE": "debian",
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(["bash", BUILD, "serving"], env=clean | own, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert {file.name for file in (tmp_path / "got").iterdir()} == {
        "one-1.0-py3-none-any.whl",
        "two-1.0-py3-none-any.whl",
    }
    assert "file:" not in (tmp_path / "seen").read_text()
    assert "--network host" in (tmp_path / "words").read_text()
