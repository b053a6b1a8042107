"""What a release is made of: a registered version's model and facts, held against the ledger; and its row there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core.contract import ModelContract
from pipelines.core.file_hash import hash_file
from pipelines.core.hash_chain import Record
from pipelines.core.release_unit import MeasuredMetric, ReleaseManifest
from pipelines.errors import Refusal
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import EVIDENCE_FOLDER, MODEL_FOLDER, download, get_version
from pipelines.settings import Settings

# The evaluation's numbers that a release carries, where they were measured.
_METRICS = ("accuracy", "precision", "recall", "f1", "roc_auc", "log_loss", "brier", "calibration_error")
_METRICS_FILE = "evaluation/metrics.json"


@dataclass(frozen=True)
class VersionFiles:
    """A registered version's files on this machine.

    Attributes:
        model: the ONNX file.
        metrics: the evaluation's numbers, by `split/name`.
        record: the ledger's row of its registration.
        evidence: of that row.
        mlflow_run_id: of the run whose artifacts the files are.
    """

    model: Path
    metrics: Mapping[str, MeasuredMetric]
    record: Record
    evidence: Mapping[str, Any]
    mlflow_run_id: str

    def manifest(self, contract: ModelContract, service_git_sha: str) -> ReleaseManifest:
        """What the release says of itself; all but the service's commit is fixed by the registration.

        Args:
            contract: of the model.
            service_git_sha: commit of the service's code.
        """
        return ReleaseManifest(
            model=self.record.model,
            version=self.record.version,
            labels=contract.labels,
            input=contract.input,
            metrics=dict(self.metrics),
            run_id=self.evidence["run_id"],
            mlflow_run_id=self.mlflow_run_id,
            git_sha=self.evidence["git_sha"],
            service_git_sha=service_git_sha,
            data_sha256=self.evidence["data"]["sha256"],
            onnx_sha256=self.evidence["model"]["onnx_sha256"],
            registered_at=self.record.occurred_at,
        )


def fetch_version(settings: Settings, model: str, version: int, into: Path) -> VersionFiles:
    """Copy a version's model and metrics from MLflow, and hold both against what the ledger has on record.

    Raises:
        Refusal: there is no such version, the ledger has not registered it, or a file is not the registered one.
        TryLater: MLflow or the ledger's database did not answer.
    """
    found = get_version(settings, model, version)
    record = _registration(settings, model, version)
    evidence = json.loads(record.evidence)

    def fetch(mlflow: Mlflow) -> tuple[Path, Path]:
        return (
            download(mlflow, found.mlflow_run_id, f"{MODEL_FOLDER}/model.onnx", into),
            download(mlflow, found.mlflow_run_id, f"{EVIDENCE_FOLDER}/metrics.json", into),
        )

    onnx, metrics = with_mlflow(settings, fetch)
    _refuse_other(f"the model of {model} v{version} in MLflow", onnx, evidence["model"]["onnx_sha256"])
    _refuse_other(f"the metrics of {model} v{version} in MLflow", metrics, evidence["files"][_METRICS_FILE])
    overall = json.loads(metrics.read_text(encoding="utf-8"))["overall"]
    measured = {
        f"test/{name}": MeasuredMetric.model_validate(overall[name])
        for name in _METRICS
        if overall.get(name) is not None
    }
    return VersionFiles(onnx, measured, record, evidence, found.mlflow_run_id)


def record_packaged(settings: Settings, files: VersionFiles, *, digest: str, evidence: Mapping[str, Any]) -> Record:
    """Write into the ledger that a version was packaged; once for each file and key that signed it.

    Args:
        settings: name the ledger.
        files: of the version.
        digest: SHA-256 of the release.
        evidence: with `key_id`, and whatever else was found out.
    """
    record, ledger = files.record, Ledger(settings.ledger_url)
    try:
        return ledger.append(
            "packaged",
            model=record.model,
            version=record.version,
            evidence={"run_id": files.evidence["run_id"], "release_sha256": digest, **evidence},
            key=f"packaged:{record.model}:{record.version}:{digest}:{evidence['key_id']}",
        )
    finally:
        ledger.close()


def packaged_digests(settings: Settings, model: str) -> dict[int, str]:
    """SHA-256 of each version's latest release; a version that was never packaged is left out.

    Raises:
        TryLater: the ledger's database did not answer.
    """
    ledger = Ledger(settings.ledger_url)
    try:
        return {
            int(record.version): json.loads(record.evidence)["release_sha256"]
            for record in ledger.entries(model)
            if record.event == "packaged"
        }
    finally:
        ledger.close()


def _registration(settings: Settings, model: str, version: int) -> Record:
    ledger = Ledger(settings.ledger_url)
    try:
        for record in ledger.entries(model):
            if record.event == "registered" and record.version == str(version):
                return record
    finally:
        ledger.close()
    raise Refusal(
        f"{model} v{version}",
        "is in MLflow, but the ledger has never registered it",
        limit="only what passed its gate and was registered by Perch is packaged",
        way_out="`perch ledger verify` says more; `perch run` registers a model",
    )


def _refuse_other(thing: str, file: Path, expected: str) -> None:
    actual = hash_file(file)
    if actual != expected:
        raise Refusal(
            thing,
            f"has SHA-256 {actual[:16]}…",
            limit=f"{expected[:16]}…, by the ledger",
            way_out="somebody changed the artifact in MLflow; restore it, or register the run again",
        )
