"""Runs stages: bare, in the workspace at hand (what `dvc.yaml` calls), or as part of a run, through DVC."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from pipelines.core.locking import hold
from pipelines.core.results import StageResult, write_json
from pipelines.core.stage_graph import StageNode, read_stage_graph
from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED, PerchError, Refusal, TryLater
from pipelines.object_storage.settings import read_s3_settings
from pipelines.params import load_params
from pipelines.runs.dvc_notes import DvcNotes
from pipelines.runs.parent_death import DIE_WITH_PARENT, die_with_parent
from pipelines.settings import Settings

_LOCK_WAIT_S = 30.0
_BEGUN = ".stage-begun"  # DVC's exit code does not say whether it ended before the stage, or the stage did
IN_RUN = "PERCH_IN_RUN"  # set for a stage whose outcome the run that started it will tell


def run_bare(stage: str, workspace: Workspace) -> StageResult:
    """Run one stage in this process and leave its result, or its refusal, as a file.

    Raises:
        PerchError: as the stage raised it; `refusals/<stage>.json` then holds it too, because DVC hides exit codes.
    """
    with hold(workspace.root / ".stage.lock", wait_s=_LOCK_WAIT_S):
        refusal_file = workspace.refusal_file(stage)
        refusal_file.unlink(missing_ok=True)
        try:
            if IN_RUN in os.environ:
                (workspace.root / _BEGUN).touch()
            params = load_params(workspace.params_file)
            module = importlib.import_module(f"pipelines.stages.{stage}")
            result: StageResult = module.run(params, workspace)
            write_json(workspace.result_file(stage), result.model_dump(mode="json"))
        except PerchError as error:
            write_json(refusal_file, _describe(error))
            raise
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            full = TryLater(f"{stage}: the disk of {workspace.root} is full\n  what to do: free some space, then retry")
            with suppress(OSError):
                write_json(refusal_file, _describe(full))
            raise full from error
        return result


def run_lock(workspace: Workspace) -> AbstractContextManager[None]:
    """One process at a time works on a run.

    Raises:
        TryLater: another was at it for too long.
    """
    return hold(workspace.root / ".run.lock", wait_s=_LOCK_WAIT_S)


def run_in_workspace(
    settings: Settings, workspace: Workspace, stage: str, *, mlflow_run_id: str = "", use_run_cache: bool = True
) -> dict[str, Any]:
    """Run one stage of a run in a process of its own and return its result.

    The caller holds `run_lock`.  A stage of `dvc.yaml` goes through DVC, which skips what did not change and restores
    what any run has done before.  Other stages have side effects and run each time.

    Raises:
        Refusal: the stage refused, or a stage before it has not run.
        TryLater: the stage asked for another try.
        PerchError: the stage's process ended in another way; its own log says how.
    """
    workspace.refusal_file(stage).unlink(missing_ok=True)
    (workspace.root / _BEGUN).unlink(missing_ok=True)
    nodes = {node.name: node for node in read_stage_graph(workspace.root / "dvc.yaml")}
    if stage in nodes:
        _refuse_skipped_steps(workspace, nodes[stage])
        notes = DvcNotes(workspace)
        notes.begin()
        command = dvc_command("repro", "--quiet", "--single-item", stage)
        command += [] if use_run_cache else ["--no-run-cache"]
        command += ["--pull"] if settings.runs_url else []
        code = _run_process(command, workspace, settings, mlflow_run_id)
        if code >= 0:  # below zero, a signal ended it
            notes.end()
    else:
        code = _run_process([sys.executable, "-m", "pipelines", stage], workspace, settings, mlflow_run_id)
    if code == 0:
        return read_result(workspace, stage)
    if stage in nodes and code > 0 and settings.runs_url and not (workspace.root / _BEGUN).is_file():
        raise TryLater(
            f"{stage}: DVC ended with exit code {code} before the stage began; the log above says why\n"
            "  what to do: look whether the object store of PERCH_RUNS_URL answers, then try again; nothing is lost"
        )
    raise _read_refusal(workspace, stage) or PerchError(
        f"{stage}: its process ended with exit code {code} and no word of its own\n"
        f"  what to do: read the log above; in {workspace.root}, `dvc repro --dry --single-item {stage}` says what DVC "
        "objects to, if it does"
    )


def _refuse_skipped_steps(workspace: Workspace, node: StageNode) -> None:
    """DVC would only say that files are missing, and that to nobody."""
    if missing := [name for name in node.upstream if not workspace.result_file(name).is_file()]:
        run_id = workspace.root.name
        raise Refusal(
            f"{node.name} of run {run_id}",
            f"needs what {' and '.join(missing)} {'makes' if len(missing) == 1 else 'make'}",
            limit="the steps in their order",
            way_out=f"`perch {missing[0]} --run {run_id}` first; `perch run --run {run_id}` does all that are left",
        )


def read_result(workspace: Workspace, stage: str) -> dict[str, Any]:
    """The result that a finished stage left."""
    result: dict[str, Any] = json.loads(workspace.result_file(stage).read_text(encoding="utf-8"))
    return result


def _run_process(command: list[str], workspace: Workspace, settings: Settings, mlflow_run_id: str) -> int:
    """Run a command in the workspace, its output passing through; SIGTERM and Ctrl-C reach it and are waited for."""
    environment = {
        **os.environ,
        DIE_WITH_PARENT: "1",
        IN_RUN: "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PERCH_HOME": str(settings.home.resolve()),
        "PERCH_PROJECT_DIR": str(settings.project_dir.resolve()),
        # Threads that wait by spinning take the cores from those that work: training took 4 times as long on busy ones.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONDONTWRITEBYTECODE": "1",  # the workspace's copy of the code is an input, not a place for caches
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        "MLFLOW_RUN_ID": mlflow_run_id,  # training logs its curves there while it runs
        # Of DVC's remote, which has no word for it; Perch's own clients say it themselves.
        "AWS_MAX_ATTEMPTS": os.environ.get("AWS_MAX_ATTEMPTS", str(read_s3_settings().attempts)),
        "SHELL": "/bin/sh",  # DVC runs commands with the user's shell, which may be anything
    }
    # Nothing of the caller's may shadow the workspace's own copy of the code, which `python -m` puts first.
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(command, cwd=workspace.root, env=environment, preexec_fn=die_with_parent)

    def forward(signum: int, _frame: object) -> None:
        process.send_signal(signum)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # DVC ignores Ctrl-C while a stage runs, and a stage may be where it cannot hear it.
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:
            process.kill()
            process.wait()


def dvc_command(*words: str) -> list[str]:
    """DVC's command of this environment, whether or not the environment is activated."""
    return [str(Path(sys.executable).parent / "dvc"), *words]


def run_tool(command: list[str], workspace: Workspace, settings: Settings) -> None:
    """Run a command in the workspace as a stage would be run.

    Raises:
        subprocess.CalledProcessError: its exit code was not 0.
    """
    code = _run_process(command, workspace, settings, "")
    if code:
        raise subprocess.CalledProcessError(code, command)


def _describe(error: PerchError) -> dict[str, Any]:
    fields = ("thing", "value", "limit", "way_out", "reports") if isinstance(error, Refusal) else ()
    return {"exit_code": error.exit_code, "message": str(error), **{name: getattr(error, name) for name in fields}}


def _read_refusal(workspace: Workspace, stage: str) -> PerchError | None:
    file = workspace.refusal_file(stage)
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["exit_code"] == EXIT_REFUSED:
        fields = {name: record[name] for name in ("limit", "way_out", "reports")}
        return Refusal(record["thing"], record["value"], **fields)
    return TryLater(record["message"])
