"""Servers as processes under measurement: started on chosen cores, timed to their first answer, weighed, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MIB = 2**20


class ServerProcess:
    """A server and whatever processes it starts.

    Args:
        command: program and arguments.
        environment: added to this process's.
        log: file that takes its output.
        cores: e.g. `0` or `0,1`; empty runs it anywhere.
        niceness: added to this process's; whoever measures must get a core when it wants one.
        folder: to run it in.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        cores: str = "",
        niceness: int = 0,
        folder: Path,
    ) -> None:
        pinned = ["taskset", "-c", cores] if cores else []
        yielding = ["nice", "-n", str(niceness)] if niceness else []
        self._log = log
        with log.open("ab") as stream:
            self.started = time.perf_counter()
            self._process = subprocess.Popen(
                [*pinned, *yielding, *command],
                env={**os.environ, **environment},
                cwd=folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def wait_for_answer(self, request: urllib.request.Request, limit_s: float = 120.0) -> tuple[float, bytes]:
        """Ask until the answer is 200.

        Returns:
            Seconds since the start, and the answer's body.

        Raises:
            RuntimeError: the server ended, or gave no good answer in time; the message ends with its log.
        """
        problem: object = "never asked"
        while time.perf_counter() - self.started < limit_s:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    body = answer.read()
                return time.perf_counter() - self.started, body
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read()[:300]!r}"
            except OSError as error:
                problem = error
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        code = self._process.poll()
        state = "gave no good answer" if code is None else f"ended with {code}"
        raise RuntimeError(f"the server {state} ({problem}); its log ends with:\n{self.log_tail()}")

    def processes(self) -> list[psutil.Process]:
        """The server's processes, itself first."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory_mib(self) -> float:
        """Proportional set size of all its processes: shared pages count once."""
        return sum(memory_of(process) for process in self.processes())

    def cpu_s(self) -> float:
        """Processor seconds of its living processes so far."""
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def terminate(self) -> None:
        """Send SIGTERM to the process that was started, as a container's runtime does; does not wait."""
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self, limit_s: float) -> int | None:
        """Wait for its end; None when it has not ended in time."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, limit_s: float = 15.0) -> None:
        """SIGTERM, then SIGKILL for what is left of its session."""
        family = self.processes()
        self.terminate()
        self.wait(limit_s)
        for process in family:
            try:
                if process.is_running():
                    process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.wait(5.0)

    def log_tail(self, characters: int = 3_000) -> str:
        """The end of its output."""
        return self._log.read_text(errors="replace")[-characters:]


def memory_of(process: psutil.Process) -> float:
    """Proportional set size of one process in MiB; 0 once it is gone."""
    try:
        return float(process.memory_full_info().pss) / MIB
    except psutil.NoSuchProcess:
        return 0.0


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
