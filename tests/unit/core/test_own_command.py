"""A hint can be pasted into the shell that it was printed to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core.own_command import make_runnable, own_command

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("path", [f"{BIN}:/usr/bin:/bin", "/usr/bin:/bin"], ids=["activated", "not activated"])
@pytest.mark.parametrize("inside", [True, False], ids=["project", "elsewhere"])
def test_own_command__in_a_shell__is_found_and_runs(
    path: str, inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(BIN.parents[1] if inside else tmp_path)
    command = own_command()
    shown = BIN.relative_to(BIN.parents[1]) if inside else BIN
    assert command == ("perch" if str(BIN) in path else f"{shown}/perch")
    done = subprocess.run(["sh", "-c", f"{command} --version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("perch "), done.stderr


def test_own_command__another_perch_is_on_the_path__is_not_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "perch"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin")
    assert own_command().endswith("/perch")


def test_own_command__python_without_the_program_beside_it__spoils_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(BIN))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert make_runnable("`perch up`") == "`perch up`"


def test_make_runnable__hints_in_a_message__alone_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    text = "nothing is up\n  what to do: `perch up`, then `perch status`; see perch-demo"
    assert make_runnable(text) == text.replace("`perch ", f"`{BIN}/perch ")
