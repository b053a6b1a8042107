"""One step of a run, from opening the workspace to the record in MLflow; and the order of the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from typing import Any

from pipelines.core.stage_graph import STEPS_AFTER_DVC, read_stage_graph
from pipelines.core.workspace import Workspace
from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.params import load_params
from pipelines.runs.kept_params import describe_kept_params
from pipelines.runs.stages import run_in_workspace, run_lock
from pipelines.runs.workspaces import open_workspace
from pipelines.settings import Settings


def pipeline_steps(settings: Settings) -> list[str]:
    """Every step of a run in order: the stages of `dvc.yaml`, then those with side effects."""
    return [*(node.name for node in read_stage_graph(settings.project_dir / "dvc.yaml")), *STEPS_AFTER_DVC]


def run_step(
    settings: Settings,
    run_id: str,
    stage: str,
    *,
    overrides: Mapping[str, Any],
    as_of: date | None = None,
    requested_by: str = "",
    on_open: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run one step of a run and record it; the first step opens the run.

    With `PERCH_RUNS_URL`, the run's workspace is fetched before and shared after, so that each step may run on another
    machine.

    Args:
        settings: where runs live.
        run_id: any scheduler's name for the run.
        stage: the step.
        overrides: dotted parameter keys to values.
        as_of: the run's date, where nothing else names one.
        requested_by: who asked for the run, for the record.
        on_open: called when the run's workspace is there, before the step.

    Returns:
        The stage's result, with `links`: title to address, where MLflow has a web address.

    Raises:
        TryLater: another process is at work on the run.
        PerchError: the stage refused or failed; its reports are recorded all the same, and its `links` lead there.
    """

    def open_here() -> Workspace:
        workspace = open_workspace(settings, run_id, overrides, requested_by=requested_by, as_of=as_of)
        if on_open is not None:
            on_open()
        return workspace

    if settings.runs_url:
        return _run_shared(settings, run_id, stage, open_here)
    return _run_here(settings, open_here(), stage)


def _run_shared(settings: Settings, run_id: str, stage: str, open_here: Callable[[], Workspace]) -> dict[str, Any]:
    """Run a step between fetching the run's workspace and sharing what became of it."""
    from pipelines.runs.sharing import SharedRun, ending_on_sigterm

    shared = SharedRun(settings, run_id)
    with ending_on_sigterm(), shared.lease(stage):
        shared.forget_outcome(stage)
        result: dict[str, Any] | None = None
        failure: PerchError | None = None
        try:
            shared.fetch()
            workspace = open_here()
            shared.share_opened()
            in_dvc = stage not in STEPS_AFTER_DVC
            if not in_dvc:
                shared.fetch_inputs(stage)
            try:
                with shared.checkpoints_shared():
                    result = _run_here(settings, workspace, stage)
            finally:
                shared.share(stage, outputs=in_dvc and result is not None)
        except PerchError as error:
            failure = error
            raise
        finally:
            if result is not None or failure is not None:
                shared.share_outcome(stage, None if failure else result, failure)
        return result


def _run_here(settings: Settings, workspace: Workspace, stage: str) -> dict[str, Any]:
    """Run a step in its workspace on this machine, and record it."""
    params = load_params(workspace.params_file)
    from pipelines.registry.tracking import ensure_run, publish_stage

    with run_lock(workspace):
        mlflow_run_id = ensure_run(settings, params, workspace)
        try:
            result = run_in_workspace(settings, workspace, stage, mlflow_run_id=mlflow_run_id)
        except PerchError as error:
            error.stage = stage
            # Who has mended params.yaml as the refusal says would otherwise be told to mend it again.
            if isinstance(error, Refusal) and (note := describe_kept_params(settings, workspace)):
                error.add_note(note)
            with suppress(TryLater):  # what the stage said matters more than that MLflow is away, too
                publish_stage(settings, params, workspace, stage, mlflow_run_id)
                error.links = links(settings, workspace, stage, mlflow_run_id, error.reports)
            raise
        publish_stage(settings, params, workspace, stage, mlflow_run_id)
        return {**result, "links": links(settings, workspace, stage, mlflow_run_id, result["reports"])}


def links(
    settings: Settings, workspace: Workspace, stage: str, mlflow_run_id: str, reports: Mapping[str, str]
) -> dict[str, str]:
    """Addresses of a step's MLflow run and of its reports."""
    from pipelines.registry.tracking import artifact_url, report_artifact, run_url

    found = {"MLflow run": run_url(settings, mlflow_run_id)}
    for title, path in reports.items():
        found[title] = artifact_url(settings, mlflow_run_id, report_artifact(workspace, stage, path))
    return {title: address for title, address in found.items() if address}
