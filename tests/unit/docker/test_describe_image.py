"""`docker/describe_image.py` on the root folder of an image."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DESCRIBE = Path(__file__).parents[3] / "docker/describe_image.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As an image whose base compiled its own Python."""
    root = tmp_path / "root"
    info = root / "opt/perch/lib/python3.11/site-packages/PyYAML-6.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: PyYAML\nVersion: 6.0\n")
    (root / "opt/perch/pyvenv.cfg").write_text("home = /usr/local/bin\nversion = 3.11.14\n")
    status = root / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text(
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n\n"
    )
    return root


def describe(root: Path) -> subprocess.CompletedProcess[str]:
    out = root.parent / "list.json"
    return subprocess.run(
        [sys.executable, DESCRIBE, root, "serving", "v1", out], capture_output=True, text=True, check=False
    )


def test_describe_image__with_all_kinds__lists_packages_of_both_and_the_interpreter(root: Path) -> None:
    done = describe(root)
    assert done.returncode == 0, done.stderr
    tree = json.loads((root.parent / "list.json").read_text())
    assert {component["purl"]: component["type"] for component in tree["components"]} == {
        "pkg:pypi/pyyaml@6.0": "library",
        "pkg:deb/debian/libc6@2.36-9?arch=amd64": "library",
        "pkg:generic/python@3.11.14": "platform",
    }


def test_describe_image__without_one_kind__writes_no_list(root: Path) -> None:
    shutil.rmtree(root / "var")
    done = describe(root)
    assert done.returncode != 0
    assert "no Debian packages found" in done.stderr
    assert not (root.parent / "list.json").exists()
