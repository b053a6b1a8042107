"""One process at a time, by a lock that no dead process keeps."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import TryLater


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
