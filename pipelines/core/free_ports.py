"""TCP ports of the loopback interface that nobody listens at."""

from __future__ import annotations

import socket

_HOST = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether a server could listen at a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def any_free_port() -> int:
    """A port that is free just now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
