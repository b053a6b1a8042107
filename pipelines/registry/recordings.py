"""Brings back from MLflow what a run recorded of itself, where its workspace is gone."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.errors import Refusal
from pipelines.params import load_params
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.reference import fetch_reference_version
from pipelines.settings import Settings

_FILES = ("run.json", "params.yaml", "dvc.yaml", "dvc.lock", "reference.json")


def download_recording(settings: Settings, run_id: str, into: Path) -> None:
    """Write a run's recording into a folder laid out like its workspace: its files, results and reference.

    Raises:
        Refusal: MLflow knows no such run, or a file of its recording is missing.
        TryLater: MLflow did not answer.
    """

    def fetch(mlflow: Mlflow) -> None:
        experiments = [experiment.experiment_id for experiment in mlflow.client.search_experiments()]
        runs = mlflow.client.search_runs(experiments, f"tags.`perch.run_id` = '{run_id}'")
        if not runs:
            raise Refusal(f"run {run_id}", "not found here, nor in MLflow", way_out="`perch runs` lists runs")
        artifacts = mlflow.artifacts(runs[0].info.run_id)
        known = {file.path for file in artifacts.list_artifacts()}
        missing = [name for name in _FILES if name not in known]
        if missing:
            raise Refusal(
                f"the recording of run {run_id}",
                f"has no {', '.join(missing)}",
                limit=f"a replay needs {', '.join(_FILES)}",
                way_out="choose a run that finished",
            )
        for name in (*_FILES, "results", *({"tuning"} & known)):
            artifacts.download_artifacts(name, str(into))

    with_mlflow(settings, fetch)
    reference = json.loads((into / "reference.json").read_text(encoding="utf-8"))
    params = load_params(into / "params.yaml")
    fetch_reference_version(settings, params, reference["version"], into / "reference", kind=reference["kind"])
