"""Ends a connection to a database at a time: its driver would wait for an answer for ever."""

from __future__ import annotations

import contextlib
import os
import socket
import threading


class Deadline:
    """Breaks a connection at a time, so that whoever waits for its answer gets an error.

    The driver itself waits for an answer for ever: a server that hangs keeps its connections up.

    Args:
        descriptor: of the connection's socket.
        limit_s: from now.
    """

    def __init__(self, descriptor: int, limit_s: float) -> None:
        # A descriptor of our own: the driver's may be closed, and its number be another file's, when the time comes.
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._lock = threading.Lock()
        self._timer = threading.Timer(limit_s, self._break)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Leave the connection as it is."""
        self._timer.cancel()
        with self._lock:
            self._socket.close()

    def _break(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # closed, or broken already
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._socket.close()
