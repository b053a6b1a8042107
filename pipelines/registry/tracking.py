"""Records a run in MLflow: what it was asked to do, and each stage's numbers and reports once the stage has ended.

Everything here can be done again after a kill at any line and adds nothing twice: what is there is read first, and only
what is missing is written.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import yaml

from pipelines.core.results import read_json
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params, flatten
from pipelines.registry.connection import Mlflow, page_url, with_mlflow
from pipelines.settings import Settings

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Run

LAST_STAGE = "model_registration"  # what follows it only tells people
_BATCH = 100  # parameters or tags that MLflow takes in one call
_MAX_METRICS = 1000
_MAX_TAG_LENGTH = 8000
_MAX_DIGEST_LENGTH = 36

State = Literal["done", "refused", "failed"]


def ensure_run(settings: Settings, params: Params, workspace: Workspace) -> str:
    """Find or create the MLflow run of this Perch run, and record what it was asked to do.

    Returns:
        The MLflow run id.

    Raises:
        TryLater: MLflow did not answer.
    """
    record = read_json(workspace.run_file)

    def ensure(mlflow: Mlflow) -> str:
        run = _find_run(mlflow, params, record["run_id"]) or _create_run(mlflow, params, record)
        _describe_run(mlflow, run, params, record)
        return str(run.info.run_id)

    return with_mlflow(settings, ensure)


def find_run(settings: Settings, params: Params, workspace: Workspace) -> str:
    """The MLflow run id of this Perch run.

    Raises:
        Refusal: MLflow does not know the run.
        TryLater: MLflow did not answer.
    """
    run_id = read_json(workspace.run_file)["run_id"]
    run = with_mlflow(settings, lambda mlflow: _find_run(mlflow, params, run_id))
    if run is None:
        raise Refusal(
            f"run {run_id}",
            f"not known to MLflow's experiment {params.model_name}",
            way_out="run any stage of it, which records it",
        )
    return str(run.info.run_id)


def publish_stage(settings: Settings, params: Params, workspace: Workspace, stage: str, mlflow_run_id: str) -> None:
    """Record how a stage ended: its numbers, its reports, and a tag that says so.

    A stage counts as done when it left a result, as refused when it left a refusal instead, else as failed.

    Raises:
        TryLater: MLflow did not answer.
    """
    outcome = _read_outcome(workspace, stage)

    def publish(mlflow: Mlflow) -> None:
        run = mlflow.client.get_run(mlflow_run_id)
        _upload(mlflow, mlflow_run_id, workspace, stage, outcome)
        if outcome.state == "done":
            last_steps: Mapping[str, int] = {}
            if stage == "data_ingestion":
                _record_data(mlflow, run, workspace)
            if stage == "model_training":
                last_steps = _complete_curves(mlflow, mlflow_run_id, workspace.model / "curves.csv")
                _record_tuned(mlflow, run, params, workspace)
            _record_metrics(mlflow, mlflow_run_id, outcome.metrics, last_steps)
        tag = f"{outcome.state}: {outcome.line}"[:_MAX_TAG_LENGTH]
        mlflow.client.set_tag(mlflow_run_id, f"perch.stage.{stage}", tag)
        _set_status(mlflow, mlflow_run_id, stage, outcome.state)

    with_mlflow(settings, publish)


def report_artifact(workspace: Workspace, stage: str, report: str) -> str:
    """Where `publish_stage` keeps a report, and which page of it to show.

    Args:
        workspace: of the run.
        stage: whose report it is.
        report: a file or folder relative to the workspace, as in `StageResult.reports`.

    Returns:
        A path for `artifact_url`: `<stage>/<name>`; of a folder that is a web site, its first page.
    """
    path = PurePosixPath(report)
    if path.name == "index.html":
        return f"{stage}/{path.parent.name}/index.html"
    first_page = workspace.root / path / "index.html"
    return f"{stage}/{path.name}/index.html" if first_page.is_file() else f"{stage}/{path.name}"


def run_url(settings: Settings, mlflow_run_id: str) -> str | None:
    """Address of the run in MLflow's web interface; None where there is no server."""
    return page_url(settings, "runs", mlflow_run_id)


def artifact_url(settings: Settings, mlflow_run_id: str, path: str) -> str | None:
    """Address that shows an artifact in MLflow's web interface; None where there is no server.

    The interface renders HTML, Markdown, pictures and text beside the list of artifacts.  There is no address of the
    bare page: the server sends every artifact as a download, so that none can run scripts in its name.

    Raises:
        TryLater: MLflow did not answer.
    """
    if page_url(settings) is None:
        return None
    experiment_id = with_mlflow(settings, lambda mlflow: mlflow.client.get_run(mlflow_run_id).info.experiment_id)
    return page_url(settings, "experiments", str(experiment_id), "runs", mlflow_run_id, "artifacts", path)


@dataclass(frozen=True)
class _Outcome:
    """How a stage ended, as its files tell."""

    state: State
    line: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    reports: Mapping[str, str] = field(default_factory=dict)


def _read_outcome(workspace: Workspace, stage: str) -> _Outcome:
    # A stage that is tried again drops its old refusal first, so a refusal is always the latest word.
    if workspace.refusal_file(stage).is_file():
        refusal = read_json(workspace.refusal_file(stage))
        return _Outcome("refused", refusal["message"], reports=refusal.get("reports", {}))
    if workspace.result_file(stage).is_file():
        result = read_json(workspace.result_file(stage))
        return _Outcome("done", result["summary"], result["metrics"], result["reports"])
    return _Outcome("failed", "its process ended without a word; see its log")


def _find_run(mlflow: Mlflow, params: Params, run_id: str) -> Run | None:
    experiment = mlflow.client.get_experiment_by_name(params.model_name)
    if experiment is None:
        return None
    quote = '"' if "'" in run_id else "'"
    runs = mlflow.client.search_runs(
        [experiment.experiment_id],
        f"tags.`perch.run_id` = {quote}{run_id}{quote}",
        order_by=["attributes.start_time ASC"],
    )
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _create_run(mlflow: Mlflow, params: Params, record: Mapping[str, Any]) -> Run:
    """Create the run; where an answer was lost and the request made again, the earliest of them counts."""
    experiment = _ensure_experiment(mlflow, params.model_name)
    mlflow.client.create_run(
        experiment.experiment_id, run_name=record["run_id"], tags={"perch.run_id": record["run_id"]}
    )
    run = _find_run(mlflow, params, record["run_id"])
    if run is None:
        raise RuntimeError(f"MLflow does not find the run {record['run_id']} that it has just created")
    return run


def _ensure_experiment(mlflow: Mlflow, name: str) -> Experiment:
    from mlflow.exceptions import MlflowException

    experiment = mlflow.client.get_experiment_by_name(name)
    if experiment is None:
        try:
            mlflow.client.create_experiment(name, artifact_location=mlflow.artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was quicker
                raise
        experiment = mlflow.client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise Refusal(
            f"MLflow's experiment {name}",
            "deleted",
            way_out=f"bring it back with `mlflow experiments restore -x {experiment.experiment_id}`",
        )
    return experiment


def _describe_run(mlflow: Mlflow, run: Run, params: Params, record: Mapping[str, Any]) -> None:
    """Log parameters, tags and environment, as far as they are missing."""
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    wanted = {
        key: value for key, value in _as_text(params.model_dump(mode="json")).items() if key not in run.data.params
    }
    tags = {key: value for key, value in _run_tags(params, record).items() if run.data.tags.get(key) != value}
    for batch in _batches([Param(key, value) for key, value in wanted.items()], _BATCH):
        mlflow.client.log_batch(run_id, params=batch)
    if tags:
        mlflow.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    if "perch.environment" not in run.data.tags:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "environment.txt"
            packages = "".join(f"{name}=={version}\n" for name, version in sorted(record["packages"].items()))
            file.write_text(f"# Python {record['python']}\n{packages}", encoding="utf-8")
            mlflow.artifacts(run_id).log_artifact(str(file))
        mlflow.client.set_tag(run_id, "perch.environment", "environment.txt")


def _run_tags(params: Params, record: Mapping[str, Any]) -> dict[str, str]:
    tags = {
        "mlflow.source.name": "perch",
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": record["git_sha"],
        "mlflow.user": record["requested_by"],
        "perch.git_sha": record["git_sha"],
        "perch.git_clean": json.dumps(record["git_clean"]),
        "perch.requested_by": record["requested_by"],
        "perch.created": record["created"],
        "perch.overrides": json.dumps(record["overrides"], sort_keys=True),
        "perch.dataset": params.dataset,
        "perch.source": params.data_ingestion.source,
        # Set by Airflow in every task; the run's own id is made from it.
        "airflow.run_id": os.environ.get("AIRFLOW_CTX_DAG_RUN_ID", ""),
    }
    return {key: value[:_MAX_TAG_LENGTH] for key, value in tags.items() if value}


def _as_text(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as dotted keys and text, lists as JSON: `{"model_training.epochs": "20", …}`."""
    flat = flatten(tree, prefix).items()
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat}


def _upload(mlflow: Mlflow, run_id: str, workspace: Workspace, stage: str, outcome: _Outcome) -> None:
    """Upload the reports, and what a later replay needs: parameters, lock, and what the run was compared with."""
    artifacts = mlflow.artifacts(run_id)
    for report in outcome.reports.values():
        path = workspace.root / report
        folder = path.parent if path.name == "index.html" else path
        if folder.is_dir():
            artifacts.log_artifacts(str(folder), f"{stage}/{folder.name}")
        else:
            artifacts.log_artifact(str(path), stage)
    if stage == "model_training" and outcome.state == "done":
        for name in ("training.json", "curves.csv", "trials.csv"):
            if (workspace.model / name).is_file():
                artifacts.log_artifact(str(workspace.model / name), stage)
    for path in (workspace.result_file(stage), workspace.refusal_file(stage)):
        if path.is_file():
            artifacts.log_artifact(str(path), path.parent.name)
    root = workspace.root
    for path in (root / "dvc.lock", root / "dvc.yaml", workspace.params_file, workspace.run_file):
        if path.is_file():
            artifacts.log_artifact(str(path))
    reference = workspace.reference / "reference.json"
    if reference.is_file():
        artifacts.log_artifact(str(reference))
    trials = workspace.tuning / "trials.json"
    if trials.is_file():
        artifacts.log_artifact(str(trials), "tuning")


def _record_data(mlflow: Mlflow, run: Run, workspace: Workspace) -> None:
    """Log the ingested data as an MLflow dataset, and its hashes as tags."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

    manifest = read_json(workspace.raw / "manifest.json")
    digest = manifest["data_sha256"][:_MAX_DIGEST_LENGTH]
    name = manifest["dataset"]
    known = run.inputs.dataset_inputs if run.inputs else []
    if not any((entry.dataset.name, entry.dataset.digest) == (name, digest) for entry in known):
        source_type, source = _describe_source(manifest["source"])
        profile = {key: manifest[key] for key in ("rows", "labels", "quarantined", "as_of")}
        dataset = Dataset(name, digest, source_type, json.dumps(source), profile=json.dumps(profile))
        entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])
        mlflow.client.log_inputs(run.info.run_id, [entry])
    tags = {"perch.data_sha256": manifest["data_sha256"], "perch.data_rows": str(manifest["rows"])}
    md5 = data_md5(workspace)
    if md5:
        tags["perch.data_md5"] = md5
    mlflow.client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def data_md5(workspace: Workspace) -> str:
    """DVC's digest of `data/raw` in this run's `dvc.lock`; empty where DVC had no part in it."""
    lock = workspace.root / "dvc.lock"
    if not lock.is_file():
        return ""
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {})
    outs = stages.get("data_ingestion", {}).get("outs", [])
    return next((str(out["md5"]) for out in outs if out["path"] == "data/raw"), "")


def _describe_source(source: str) -> tuple[str, dict[str, str]]:
    """A source in the words that MLflow's web interface links: (type, description)."""
    if source.startswith(("http://", "https://")):
        return "http", {"url": source}
    if source.startswith("s3://"):
        return "s3", {"uri": source}
    return "local", {"uri": source}


def _complete_curves(mlflow: Mlflow, run_id: str, file: Path) -> dict[str, int]:
    """Log the points of the training curves that are missing: all of them when DVC restored the training.

    Returns:
        The last epoch of each metric.
    """
    curves: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            curves.setdefault(_metric_name(row["metric"]), {})[int(row["epoch"])] = float(row["value"])
    missing: list[Metric] = []
    for name, points in curves.items():
        logged = {metric.step for metric in mlflow.client.get_metric_history(run_id, name)}
        for step in sorted(points.keys() - logged):
            missing += _metrics({name: points[step]}, {name: step})
    for batch in _batches(missing, _MAX_METRICS):
        mlflow.client.log_batch(run_id, metrics=batch)
    return {name: max(points) for name, points in curves.items()}


def _record_metrics(mlflow: Mlflow, run_id: str, metrics: Mapping[str, float], steps: Mapping[str, int]) -> None:
    """Log a stage's final numbers, as far as MLflow's latest values differ from them.

    A number that is also a curve goes to the curve's last step, where it becomes the value that run tables show.
    """
    latest = mlflow.client.get_run(run_id).data.metrics
    named = {_metric_name(name): value for name, value in metrics.items()}
    changed = {name: value for name, value in named.items() if latest.get(name) != value}
    for batch in _batches(_metrics(changed, steps), _MAX_METRICS):
        mlflow.client.log_batch(run_id, metrics=batch)


def _metrics(values: Mapping[str, float], steps: Mapping[str, int]) -> list[Metric]:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    # A number that does not exist (NaN, infinite) has no place in a chart.
    return [Metric(name, value, now_ms, steps.get(name, 0)) for name, value in values.items() if math.isfinite(value)]


def _metric_name(name: str) -> str:
    """A metric's name with what MLflow does not take, such as a label's brackets, replaced."""
    return re.sub(r"[^/\w.\- :]", "_", name)[:250]


def _record_tuned(mlflow: Mlflow, run: Run, params: Params, workspace: Workspace) -> None:
    """Log the hyperparameters that tuning chose, beside the ones that were asked for."""
    from mlflow.entities import Param

    if params.model_training.trials == 0:
        return
    tuned = _as_text(read_json(workspace.model / "training.json")["hyperparameters"], "tuned.")
    missing = [Param(key, value) for key, value in tuned.items() if key not in run.data.params]
    for batch in _batches(missing, _BATCH):
        mlflow.client.log_batch(run.info.run_id, params=batch)


def _set_status(mlflow: Mlflow, run_id: str, stage: str, state: State) -> None:
    if state != "done":
        mlflow.client.set_terminated(run_id, "FAILED")
    elif stage == LAST_STAGE:
        mlflow.client.set_terminated(run_id, "FINISHED")
    elif mlflow.client.get_run(run_id).info.status == "FAILED":
        mlflow.client.update_run(run_id, status="RUNNING")  # it was refused before, and goes on now


def _batches(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
