"""`perch up`, `status` and `down` on real services: nothing is left behind, whatever was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.services.stack import Stack
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[2]
PERCH = str(Path(sys.executable).parent / "perch")

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


def perch(command: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PERCH_HOME": str(home), "PERCH_PROJECT_DIR": str(PROJECT), **variables}
    return subprocess.run([PERCH, command], env=environment, capture_output=True, text=True, check=False)


def processes_of(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            # Some servers write their title over their environment: their folder tells, too.
            if process.environ().get("PERCH_HOME") == str(home) or str(home) in process.cwd():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_services__up_twice_supervisor_killed_and_down__leave_no_process(tmp_path: Path) -> None:
    home = tmp_path / "a folder whose name is long enough that a socket in it would have too long a path" / "home"
    try:
        first = perch("up", home)
        assert first.returncode == 0, first.stderr
        assert perch("up", home).stdout == first.stdout  # what runs is left alone
        status = perch("status", home)
        assert status.returncode == 0
        assert status.stdout.count("RUNNING") == 7

        stack = Stack(Settings(project_dir=PROJECT, home=home))
        os.kill(int((home / "services" / "supervisord.pid").read_text()), signal.SIGKILL)
        assert perch("status", home).returncode == 1
        assert processes_of(home)  # orphans
        ports = stack.ports()
        assert stack.down()
        assert processes_of(home) == []
        for port in (ports.mlflow, ports.airflow, ports.serving):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0  # nobody answers there any more
        assert not stack.socket.exists()
    finally:
        perch("down", home)


def test_down__nothing_up__says_so(tmp_path: Path) -> None:
    ended = perch("down", tmp_path)
    assert (ended.returncode, ended.stdout.strip()) == (0, "nothing was up")
