"""Who gets in: a bound on the requests at work and on the bytes they hold, so that overload is a fast 503.

A queue that grows makes every client wait until the slowest gives up; a bound lets the ones inside be answered in
time and tells the others at once when to come again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serving.problems import OVERLOADED, Problem

_RETRY_AFTER_S = "1"
_LONGEST_WAIT = 0.25  # of a request's time, for the model; the rest is for what the load does to this machine
_FEWEST = 8  # at once, however slow the model is


def bound_requests(most: int, *, model_s: float, threads: int, timeout_s: float) -> int:
    """Requests that a worker should hold at once: as many as allowed, fewer where the last would wait too long.

    Args:
        most: allowed by the settings.
        model_s: seconds that the model takes for one image.
        threads: that ask the model.
        timeout_s: seconds that a request has.
    """
    return min(most, max(_FEWEST, int(_LONGEST_WAIT * timeout_s * threads / model_s)))


class Admission:
    """Counts what is inside this worker; used from its event loop alone.

    Args:
        max_requests: that are being computed.
        max_buffered_bytes: of bodies that are being received or computed.
    """

    def __init__(self, *, max_requests: int, max_buffered_bytes: int) -> None:
        self.max_requests, self.max_buffered_bytes = max_requests, max_buffered_bytes
        self.requests = 0
        self.buffered_bytes = 0

    @contextmanager
    def work(self) -> Iterator[None]:
        """Hold one of the places for requests that are computed.

        Raises:
            Problem: all are taken.
        """
        if self.requests >= self.max_requests:
            raise Problem(
                OVERLOADED,
                f"{self.requests} requests are being answered (limit: {self.max_requests} per worker); "
                "try again after the time in Retry-After.",
                headers={"Retry-After": _RETRY_AFTER_S},
            )
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def take_bytes(self, count: int) -> None:
        """Take room for so many bytes of a body; give it back with `give_bytes`.

        Raises:
            Problem: there is no more room.
        """
        if self.buffered_bytes + count > self.max_buffered_bytes:
            raise Problem(
                OVERLOADED,
                f"The bodies of other requests fill {self.buffered_bytes:,} bytes "
                f"(limit: {self.max_buffered_bytes:,} per worker); try again after the time in Retry-After.",
                headers={"Retry-After": _RETRY_AFTER_S, "Connection": "close"},
            )
        self.buffered_bytes += count

    def give_bytes(self, count: int) -> None:
        """Give room back."""
        self.buffered_bytes -= count
