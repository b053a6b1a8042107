"""Two processes never hold the same lock, and a killed one holds none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core.locking import hold
from pipelines.errors import TryLater

HOLDER = """
import sys, time
from pathlib import Path
from pipelines.core.locking import hold
with hold(Path(sys.argv[1]), wait_s=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_hold__held_by_another_process__says_who_and_asks_to_try_later(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(TryLater, match=str(holder.pid)), hold(lock, wait_s=0.2):
            pytest.fail("the lock was given twice")
        holder.kill()


def test_hold__holder_killed__is_free_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        os.kill(holder.pid, signal.SIGKILL)
        with hold(lock, wait_s=10):
            assert lock.read_text() == str(os.getpid())
