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
    until = time.monotonic() + (0.3 if survives else 20)
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    alive = is_alive(child)
    if alive:
        child.kill()
    assert alive is survives


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; in a container nobody may have taken note of its end."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
