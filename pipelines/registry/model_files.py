"""The file of a registered model, fetched and held against what was registered."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import Refusal
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import (
    CHAMPION,
    MODEL_FOLDER,
    RegisteredVersion,
    download,
    find_versions,
    pick_version,
)
from pipelines.settings import Settings


@dataclass(frozen=True)
class ModelFile:
    """A registered version's ONNX file on this machine, with the SHA-256 that registry and ledger agree on."""

    path: Path
    version: RegisteredVersion
    onnx_sha256: str


def fetch_model_file(
    settings: Settings, model: str, version: int | None, into: Path, *, candidate_alias: str
) -> ModelFile:
    """Fetch a version's model, and check it against the registry's tag and the ledger's record.

    Args:
        settings: where MLflow and the ledger are.
        model: name of the registered model.
        version: its version; None takes the champion, or before any release the latest candidate.
        into: folder for the file.
        candidate_alias: the alias of the version that may be released next.

    Raises:
        Refusal: there is no such version, or its file is not the one that was registered.
        TryLater: MLflow or the ledger did not answer.
    """

    def fetch(mlflow: Mlflow) -> ModelFile:
        versions = find_versions(mlflow, model)
        if version is not None:
            chosen = pick_version(versions, model, version)
        else:
            chosen = _pick_present(versions, model, candidate_alias)
        file = into / "model.onnx"
        file.unlink(missing_ok=True)  # of an attempt that MLflow's absence ended
        return ModelFile(file, chosen, download_model(mlflow, chosen, into))

    fetched = with_mlflow(settings, fetch)
    _check_ledger(settings, fetched)
    return fetched


def download_model(mlflow: Mlflow, version: RegisteredVersion, into: Path) -> str:
    """Write `model.onnx` of a version into a folder and return its SHA-256.

    Raises:
        Refusal: the file is missing, or is not the one that the version's tag names.
    """
    file = download(mlflow, version.mlflow_run_id, f"{MODEL_FOLDER}/model.onnx", into)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    registered = version.tags.get("perch.onnx_sha256")
    if sha256 != registered:
        raise Refusal(
            f"model.onnx of {version.model} v{version.version}",
            f"has SHA-256 {sha256[:16]}…",
            limit=f"{registered or 'none'} was registered",
            way_out="the stored file was changed: `perch ledger verify`, then restore it or register another version",
        )
    return sha256


def _pick_present(versions: list[RegisteredVersion], model: str, candidate_alias: str) -> RegisteredVersion:
    for alias in (CHAMPION, candidate_alias):
        for version in versions:
            if alias in version.aliases:
                return version
    raise Refusal(
        f"the model {model}",
        f"has neither a {CHAMPION} nor a {candidate_alias}",
        way_out="`perch run` registers a candidate; `perch models` lists what there is",
    )


def _check_ledger(settings: Settings, fetched: ModelFile) -> None:
    """The tag can be edited by whoever may write to MLflow; the ledger cannot."""
    version = fetched.version
    name = f"{version.model} v{version.version}"
    ledger = Ledger(settings.ledger_url)
    try:
        records = ledger.entries(version.model)
    finally:
        ledger.close()
    for record in records:
        if record.event == "registered" and record.version == str(version.version):
            recorded = json.loads(record.evidence).get("model", {}).get("onnx_sha256")
            if recorded != fetched.onnx_sha256:
                raise Refusal(
                    f"model.onnx of {name}",
                    f"has SHA-256 {fetched.onnx_sha256[:16]}…",
                    limit=f"{recorded or 'none'}, row {record.sequence} of the ledger",
                    way_out="file and tag were changed together: find out by whom, and register another version",
                )
            return
    raise Refusal(
        name,
        "is in MLflow, but the ledger has never registered it",
        way_out="register it with `perch model_registration`",
    )
