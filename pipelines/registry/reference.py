"""Fetches what a run is compared with: the champion, or before any release the latest candidate, with its evidence."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from pipelines.core.results import write_json
from pipelines.params import Params
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.model_files import download_model
from pipelines.registry.models import (
    CHAMPION,
    EVIDENCE_FOLDER,
    RegisteredVersion,
    download,
    find_versions,
    pick_version,
)
from pipelines.settings import Settings

Kind = Literal["champion", "candidate", "none"]
_EVIDENCE = ("images.parquet", "manifest.json", "metrics.json")


def fetch_reference(settings: Settings, params: Params, into: Path) -> None:
    """Write `reference/` with the present champion, else the present candidate, else nobody.

    A folder that is complete stays as it is: what a run is compared with is fixed when the run begins.

    Raises:
        Refusal: the version's files are missing or are not those that were registered.
        TryLater: MLflow did not answer.
    """
    if (into / "reference.json").is_file():
        return

    def fetch(mlflow: Mlflow) -> None:
        versions = find_versions(mlflow, params.model_name)
        aliases: tuple[tuple[str, Kind], ...] = (
            (CHAMPION, "champion"),
            (params.model_registration.candidate_alias, "candidate"),
        )
        for alias, kind in aliases:
            for version in versions:
                if alias in version.aliases:
                    _write(mlflow, version, kind, into)
                    return
        _write(mlflow, None, "none", into)

    with_mlflow(settings, fetch)


def fetch_reference_version(
    settings: Settings, params: Params, version: str | None, into: Path, *, kind: Kind = "champion"
) -> None:
    """Write `reference/` with a given version, as a past run had it; None: it had nobody.

    Args:
        settings: where MLflow is.
        params: names the model.
        version: as in the past run's `reference.json`.
        into: the folder to make.
        kind: as in the past run's `reference.json`.

    Raises:
        Refusal: there is no such version, or its files are missing or are not those that were registered.
        TryLater: MLflow did not answer.
    """

    def fetch(mlflow: Mlflow) -> None:
        if version is None:
            _write(mlflow, None, "none", into)
            return
        versions = find_versions(mlflow, params.model_name)
        _write(mlflow, pick_version(versions, params.model_name, int(version)), kind, into)

    with_mlflow(settings, fetch)


def _write(mlflow: Mlflow, version: RegisteredVersion | None, kind: Kind, into: Path) -> None:
    """Fill a folder beside `into` and rename it, so that a kill leaves no half of a reference."""
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=".reference-") as temporary:
        draft = Path(temporary) / "reference"
        draft.mkdir()
        onnx_sha256 = None
        if version is not None:
            onnx_sha256 = download_model(mlflow, version, draft)
            for name in _EVIDENCE:
                download(mlflow, version.mlflow_run_id, f"{EVIDENCE_FOLDER}/{name}", draft)
        write_json(
            draft / "reference.json",
            {
                "kind": kind,
                "version": str(version.version) if version else None,
                "run_id": version.run_id if version else None,
                "onnx_sha256": onnx_sha256,
            },
        )
        draft.rename(into)
