"""No process of a run outlives a killed parent, where it was asked not to."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

# A parent that starts a child which asked to die with it.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; "
                          "from pipelines.runs.parent_death import die_with_parent_if_asked; "
                          "die_with_parent_if_asked(); print('ready', flush=True); time.sleep(60)"],
                         env={**os.environ, **dict(pair.split("=") for pair in sys.argv[1:])}, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


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
