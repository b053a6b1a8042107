"""Two things that Perch changes about BentoML's arbiter, the process (circus) that holds the socket and the workers.

While the server drains it refuses connections.  On SIGTERM the arbiter tells its workers to end and closes the
listening socket when they have; until then the kernel goes on accepting connections that no worker takes any more:
their clients wait for as long as the slowest request drains, and are cut off in the end.  Refused at once, a client or
its proxy goes elsewhere.

And it looks after its workers each second: BentoML asks for every ten, so that a killed worker is missed that long.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

CHECK_INTERVAL_S = 1.0
_ARBITER_MODULE = "bentoml.__main__"  # `python -m bentoml serve`, as `python -m serving` starts it


def amend_arbiter() -> None:
    """Change the arbiter of this process; does nothing in workers, which have none."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main is not None and main.name == _ARBITER_MODULE:
        from circus.arbiter import Arbiter  # type: ignore[import-untyped]

        change(Arbiter)


def change(arbiter: Any) -> None:
    """Make an arbiter's class shut its listening sockets before it ends its workers for good, and look often.

    `shutdown` of a listening socket, unlike `close`, acts on the socket itself and so for every process that holds it.

    Args:
        arbiter: `circus.arbiter.Arbiter`.
    """
    init, stop_watchers = arbiter.__init__, arbiter._stop_watchers

    def look_often(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **{**options, "check_delay": CHECK_INTERVAL_S})

    def shut_then_stop(self: Any, *arguments: Any, **options: Any) -> Any:
        if self._stopping:  # not when it only restarts them
            for listener in self.sockets.values():
                with contextlib.suppress(OSError):  # shut already
                    listener.shutdown(socket.SHUT_RDWR)
        return stop_watchers(self, *arguments, **options)

    arbiter.__init__, arbiter._stop_watchers = look_often, shut_then_stop
