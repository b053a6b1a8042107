"""Talks to the supervisor (supervisord) that keeps this home's programs alive, over its Unix socket."""

from __future__ import annotations

import os
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.errors import EXIT_REFUSED, TryLater

_STOP_LIMIT_S = 40.0  # the supervisor kills after 15


SOCKET = "PERCH_SUPERVISOR_SOCKET"


def supervisor_socket(home: Path) -> Path:
    """The socket of the supervisor of a home; a Unix socket's path may have 107 bytes, a checkout's may have more.

    Containers that share a home have no folder for temporary files in common: there the environment names the socket.
    """
    if given := os.environ.get(SOCKET):
        return Path(given)
    digest = sha256(str(home).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"perch-{os.getuid()}-{digest}.sock"


def supervisor_proxy(socket: Path) -> Any:
    """Supervisord's XML-RPC interface."""
    from supervisor.xmlrpc import SupervisorTransport

    return xmlrpc.client.ServerProxy("http://127.0.0.1", SupervisorTransport(serverurl=f"unix://{socket}"))


class Supervisor:
    """Starts, stops and shows programs by name.

    Args:
        home: whose supervisor it is.
    """

    def __init__(self, home: Path) -> None:
        self._socket = supervisor_socket(home)

    def info(self, program: str) -> dict[str, Any]:
        """What the supervisor knows of a program: `statename`, `pid`, `exitstatus` and more.

        Raises:
            TryLater: the supervisor does not answer.
        """
        with self._asked() as supervisor:
            found: dict[str, Any] = supervisor.getProcessInfo(program)
        return found

    def is_up(self, program: str) -> bool:
        """Whether it runs, or the supervisor is about to start it again."""
        info = self.info(program)
        if info["statename"] == "EXITED":  # for a moment also what is about to be started again
            return bool(info["exitstatus"] != EXIT_REFUSED)
        return info["statename"] not in {"STOPPED", "FATAL"}

    def start(self, program: str) -> None:
        """Start a program that does not run."""
        with self._asked() as supervisor, _expected("ALREADY_STARTED"):
            supervisor.startProcess(program, False)

    def stop(self, program: str) -> None:
        """End a program, and wait until it has ended."""
        deadline = time.monotonic() + _STOP_LIMIT_S
        while self.is_up(program):
            with self._asked() as supervisor, _expected("NOT_RUNNING"):
                supervisor.stopProcess(program, True)
            time.sleep(0.02)
            if time.monotonic() > deadline:
                raise TryLater(f"{program} does not end\n  what to do: `perch status`; try again")

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        try:
            yield supervisor_proxy(self._socket).supervisor
        except xmlrpc.client.Fault as fault:
            raise TryLater(f"the supervisor refuses: {fault.faultString}\n  what to do: `perch up`") from fault
        except (OSError, xmlrpc.client.Error) as error:
            raise TryLater(f"the supervisor does not answer: {error}\n  what to do: `perch up`") from error


@contextmanager
def _expected(name: str) -> Iterator[None]:
    """Swallows one of supervisord's faults: what was asked for is so already."""
    from supervisor.xmlrpc import Faults

    try:
        yield
    except xmlrpc.client.Fault as fault:
        if fault.faultCode != getattr(Faults, name):
            raise
