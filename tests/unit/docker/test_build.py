"""`docker/build.sh` before it builds."""

from __future__ import annotations

import os
import subprocess
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
