"""Two processes never work in one workspace, and no process outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.errors import TryLater
from pipelines.runs.locking import hold

HOLDER = """
import sys, time
from pathlib import Path
from pipelines.runs.locking import hold
with hold(Path(sys.argv[1]), wait_s=0):
    print("held", flush=True)
    time.sleep(60)
"""
# A parent that starts a child which asked to die with it.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; "
                          "from pipelines.runs.locking import die_with_parent_if_asked; "
                          "die_with_parent_if_asked(); print('ready', flush=True); time.sleep(60)"],
                         env={**os.environ, **dict(pair.split("=") for pair in sys.argv[1:])}, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's own")
@pytest.mark.parametrize(("variables", "survives"), [(["PERCH_DIE_WITH_PARENT=1"], False), ([], True)])
def test_die_with_parent_if_asked__parent_killed__ends_only_a_process_that_was_asked_to(
    variables: list[str], survives: bool
) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, *variables], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 5
    while (
        child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline and not survives
    ):
        time.sleep(0.05)
    alive = child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    if alive:
        child.kill()
    assert alive is survives
