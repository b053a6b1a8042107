"""Waiting for a service that is away for a moment: retries with growing pauses, then a clear "try later"."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import TryLater

T = TypeVar("T")

PATIENCE_S = 60.0
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0


def be_patient(operation: Callable[[], T], *, transient: Callable[[Exception], bool], name: str) -> T:
    """Call an idempotent operation until it succeeds, for up to `PATIENCE_S` seconds after its first failure.

    Args:
        operation: is called again from its beginning after a failure.
        transient: tells the failures that time may heal; others pass through at once.
        name: of the service, for the message.

    Raises:
        TryLater: it still failed after `PATIENCE_S`.
    """
    deadline = None
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return operation()
        except Exception as error:
            if not transient(error):
                raise
            now = time.monotonic()
            deadline = deadline or now + PATIENCE_S
            if now + pause_s > deadline:
                cause = str(error).strip().split("\n", 1)[0]
                raise TryLater(
                    f"{name}: not reachable for {PATIENCE_S:.0f} s ({cause})\n"
                    "  what to do: see that it is up (`perch status`), then try again; nothing is lost"
                ) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
