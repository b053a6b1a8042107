"""No process of a run outlives whoever started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

DIE_WITH_PARENT = "PERCH_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1  # prctl(2)


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
