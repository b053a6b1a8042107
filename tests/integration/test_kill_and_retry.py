"""Each stage, killed with SIGKILL in its middle together with all that started it, and run again, ends the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.core.stage_graph import read_stage_graph
from pipelines.errors import EXIT_TRY_LATER
from pipelines.runs.dvc_notes import DvcNotes
from pipelines.runs.replaying import lock_outs
from pipelines.runs.workspaces import find_workspace
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[2]
STAGES = [node.name for node in read_stage_graph(PROJECT / "dvc.yaml")]
OVERRIDES = {"model_training.epochs": 4, "model_training.int8": False, "data_ingestion.as_of": "2026-11-01"}

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


def start(stage: str, home: Path) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "perch"), stage, "--run", "r", "--conf", json.dumps(OVERRIDES)]
    environment = {**os.environ, "PERCH_HOME": str(home), "PERCH_PROJECT_DIR": str(PROJECT)}
    # Its own session, so that one signal reaches the command, DVC and the stage.
    return subprocess.Popen(command, env=environment, cwd=PROJECT, start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, float]]:
    """The digests of an undisturbed run's outputs, and how many seconds each stage took."""
    home = tmp_path_factory.mktemp("undisturbed")
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        assert start(stage, home).wait() == 0
        seconds[stage] = time.monotonic() - started
    return lock_outs(find_workspace(Settings(project_dir=PROJECT, home=home), "r")), seconds


@pytest.mark.slow  # `make test` kills each stage once, in Airflow
def test_stages__each_killed_in_its_middle_and_run_again__leave_the_same_bytes(
    undisturbed: tuple[dict[str, str], dict[str, float]], tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    for stage in STAGES:
        # Late and early in the stage's own work; the first seconds are imports.
        for share in (0.9, 0.6):
            process = start(stage, tmp_path)
            time.sleep(seconds[stage] * share)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert start(stage, tmp_path).wait() == 0
    assert lock_outs(find_workspace(Settings(project_dir=PROJECT, home=tmp_path), "r")) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's own")
def test_stage__only_its_command_killed__ends_with_it_and_can_be_run_at_once(tmp_path: Path) -> None:
    process = start("data_ingestion", tmp_path)
    children: list[psutil.Process] = []
    while not any("pipelines" in child.cmdline() for child in children):  # DVC and, below it, the stage
        assert process.poll() is None, "the stage ended before it was seen"
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert start("data_ingestion", tmp_path).wait() == 0


def test_stage__started_twice_at_once__runs_once_at_a_time(tmp_path: Path) -> None:
    first = start("data_ingestion", tmp_path)
    second = start("data_ingestion", tmp_path)
    # The second waits for the first and finds its work done, or asks to try later where that takes too long.
    assert sorted((first.wait(), second.wait())) in ([0, 0], [0, EXIT_TRY_LATER])
    assert start("data_ingestion", tmp_path).wait() == 0
    workspace = find_workspace(Settings(project_dir=PROJECT, home=tmp_path), "r")
    assert json.loads(workspace.result_file("data_ingestion").read_text())["metrics"]["data/images"] == 897


def test_stage__what_a_killed_dvc_leaves__is_no_obstacle(tmp_path: Path) -> None:
    assert start("data_ingestion", tmp_path).wait() == 0
    workspace = find_workspace(Settings(project_dir=PROJECT, home=tmp_path), "r")
    # A note torn in the middle of a write; or naming a process that lives, as the killed one's number may by now.
    for note in ('{"write": {"', '{"write": {"PATH": {"pid": 1, "cmd": "dvc repro"}}, "read": {}}'):
        (workspace.root / ".dvc" / "tmp" / "rwlock").write_text(note.replace("PATH", str(workspace.raw)))
        workspace.result_file("data_ingestion").unlink()
        assert start("data_ingestion", tmp_path).wait() == 0, note

    lock = workspace.root / "dvc.lock"
    for stage, share in (("data_validation", 0.5), ("data_preprocessing", 0.0)):
        whole = lock.read_bytes()
        DvcNotes(workspace).begin()  # and no end: the DVC that follows is killed while it writes
        lock.write_bytes(whole[: int(len(whole) * share)])
        assert start(stage, tmp_path).wait() == 0, share
        assert lock.read_bytes().startswith(whole)
