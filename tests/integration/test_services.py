"""`perch up`, `status` and `down` on real services: nothing is left behind, whatever was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.services.stack import Stack
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[2]
PERCH = str(Path(sys.executable).parent / "perch")

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


def start(command: str, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PERCH_HOME": str(home), "PERCH_PROJECT_DIR": str(PROJECT)}
    return subprocess.Popen(
        [PERCH, command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def perch(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    process = start(command, home)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


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


def test_services__up_twice_at_once_supervisor_killed_and_down__leave_no_process(tmp_path: Path) -> None:
    home = tmp_path / "a folder whose name is long enough that a socket in it would have too long a path" / "home"
    # Whoever exports PERCH_HOME has shells and editors with it.
    bystander = subprocess.Popen(["sleep", "300"], env={**os.environ, "PERCH_HOME": str(home)})
    try:
        pid_file = home / "services" / "supervisord.pid"
        with start("up", home) as first:
            while first.poll() is None and not (pid_file.is_file() and pid_file.read_text()):
                time.sleep(0.1)
            supervisor = pid_file.read_text()
            joined = perch("up", home)  # while the first is still at it
            shown, errors = first.communicate()
        assert (first.returncode, joined.returncode) == (0, 0), errors + joined.stderr
        assert perch("up", home).stdout == joined.stdout == shown  # what runs is left alone
        assert pid_file.read_text() == supervisor
        status = perch("status", home)
        assert status.returncode == 0
        assert status.stdout.count("RUNNING") == 7

        stack = Stack(Settings(project_dir=PROJECT, home=home))
        os.kill(int(supervisor), signal.SIGKILL)
        assert perch("status", home).returncode == 1
        assert len(processes_of(home)) > 1  # orphans
        ports = stack.ports()
        assert stack.down()
        assert processes_of(home) == ["sleep 300"]
        assert bystander.poll() is None
        for port in (ports.mlflow, ports.airflow, ports.serving):
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0  # nobody answers there any more
        assert not stack.socket.exists()
    finally:
        bystander.kill()
        bystander.wait()
        perch("down", home)


def test_down__nothing_up__says_so(tmp_path: Path) -> None:
    ended = perch("down", tmp_path)
    assert (ended.returncode, ended.stdout.strip()) == (0, "nothing was up")
