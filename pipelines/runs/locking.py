"""One process at a time in a workspace, and no process that outlives whoever started it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import TryLater

DIE_WITH_PARENT = "PERCH_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1  # prctl(2)


@contextmanager
def hold(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold an advisory lock on `path` for the block; the kernel drops it when the process dies, however it dies.

    Args:
        path: the lock file; its content is the holder's process id, for messages only.
        wait_s: seconds to wait for another holder, who may be dying of a kill just now.

    Raises:
        TryLater: somebody else still held the lock after `wait_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise TryLater(
                        f"{path.parent}: process {file.read().strip() or 'unknown'} is at work here, and was for "
                        f"{wait_s:.0f} s (limit: one at a time)\n  what to do: wait for it, or end it, then try again"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def die_with_parent_if_asked() -> None:
    """`die_with_parent`, where the parent asked for it by environment."""
    if os.environ.get(DIE_WITH_PARENT):
        die_with_parent()


def die_with_parent() -> None:
    """Have the kernel end this process when its parent dies.

    A scheduler that is killed with SIGKILL cannot end its tasks; without this they would go on, while the scheduler,
    started again, tries them a second time.  SIGKILL, because every stage survives it and nothing can ignore it.
    Linux only; elsewhere `hold` alone keeps the two apart.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
