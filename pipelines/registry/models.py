"""The registered versions of a model as MLflow holds them, and whether the ledger agrees."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.champions import aliases_by_ledger, find_alias_disagreements
from pipelines.core.hash_chain import Record, missing_anchors
from pipelines.errors import Refusal
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.settings import Settings

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION = "champion"
MODEL_FOLDER = "model_registration/model"  # artifacts of the version's MLflow run: the model, as MLflow loads it
EVIDENCE_FOLDER = "model_registration/evidence"  # and what the decision to register it rests on


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model.

    Attributes:
        model: its name.
        version: 1, 2, …
        aliases: e.g. `("candidate",)`.
        registered_at: UTC.
        mlflow_run_id: of the run whose artifacts it is made of.
        tags: `perch.*`, written when it was registered.
    """

    model: str
    version: int
    aliases: tuple[str, ...]
    registered_at: datetime
    mlflow_run_id: str
    tags: Mapping[str, str]

    @property
    def run_id(self) -> str:
        """The Perch run it came from; empty when it was registered by other means."""
        return self.tags.get("perch.run_id", "")

    @property
    def accuracy(self) -> tuple[float, float, float] | None:
        """Test accuracy and its interval: value, low, high."""
        try:
            value, low, high = (float(self.tags[f"perch.test_accuracy{part}"]) for part in ("", "_low", "_high"))
        except (KeyError, ValueError):
            return None
        return value, low, high

    @property
    def data_rows(self) -> int | None:
        """Images that its run ingested."""
        rows = self.tags.get("perch.data_rows", "")
        return int(rows) if rows.isdigit() else None


def list_versions(settings: Settings, model: str) -> list[RegisteredVersion]:
    """All versions of a model, newest first; none where it was never registered.

    Raises:
        TryLater: MLflow did not answer.
    """
    return with_mlflow(settings, lambda mlflow: find_versions(mlflow, model))


def find_versions(mlflow: Mlflow, model: str) -> list[RegisteredVersion]:
    """As `list_versions`, over a connection at hand."""
    registered = find_model(mlflow, model)
    if registered is None:
        return []
    aliases: dict[int, list[str]] = {}
    for alias, version in registered.aliases.items():
        aliases.setdefault(int(version), []).append(alias)
    found: list[ModelVersion] = []
    token = None
    while token != "":
        page = mlflow.client.search_model_versions(f"name = '{model}'", max_results=200, page_token=token)
        found += page
        token = page.token or ""
    versions = [_from_mlflow(entry, tuple(sorted(aliases.get(int(entry.version), [])))) for entry in found]
    return sorted(versions, key=lambda entry: entry.version, reverse=True)


def find_model(mlflow: Mlflow, model: str) -> RegisteredModel | None:
    """The registered model with its aliases; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def get_version(settings: Settings, model: str, version: int) -> RegisteredVersion:
    """One version.

    Raises:
        Refusal: there is none of this number; the message names those there are.
        TryLater: MLflow did not answer.
    """
    versions = list_versions(settings, model)
    return pick_version(versions, model, version)


def pick_version(versions: Sequence[RegisteredVersion], model: str, version: int) -> RegisteredVersion:
    """The version with a number.

    Raises:
        Refusal: there is none of this number; the message names those there are.
    """
    for candidate in versions:
        if candidate.version == version:
            return candidate
    known = ", ".join(f"v{entry.version}" for entry in versions[:10]) or "none"
    raise Refusal(f"{model} v{version}", "not registered", limit=f"versions: {known}", way_out="`perch models`")


def read_card(settings: Settings, version: RegisteredVersion) -> str:
    """The model card of a version, as Markdown.

    Raises:
        Refusal: the version has no card: it was registered by other means.
        TryLater: MLflow did not answer.
    """

    def read(mlflow: Mlflow) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = download(mlflow, version.mlflow_run_id, f"{EVIDENCE_FOLDER}/model_card.md", Path(folder))
            return file.read_text(encoding="utf-8")

    if not version.run_id:
        raise Refusal(
            f"{version.model} v{version.version}", "has no model card", way_out="it was not registered by Perch"
        )
    return with_mlflow(settings, read)


def download(mlflow: Mlflow, mlflow_run_id: str, artifact: str, into: Path) -> Path:
    """Copy one artifact of a run into a folder; the file keeps its name.

    Raises:
        Refusal: the run has no such artifact.
    """
    artifacts = mlflow.artifacts(mlflow_run_id)
    parent, _, name = artifact.rpartition("/")
    # Asked first, because the kinds of storage fail in their own ways on a missing file.
    if artifact not in {entry.path for entry in artifacts.list_artifacts(parent or None)}:
        raise Refusal(
            f"the artifact {artifact} of MLflow's run {mlflow_run_id}",
            "missing",
            way_out="somebody removed it; register the run again with `perch run --from model_registration`",
        )
    with tempfile.TemporaryDirectory(dir=into, prefix=".download-") as folder:  # it mirrors the artifact's folders
        return Path(artifacts.download_artifacts(artifact, dst_path=folder)).rename(into / name)


def find_disagreements(
    model: str, versions: Iterable[RegisteredVersion], records: Sequence[Record], *, candidate_alias: str
) -> list[str]:
    """Where MLflow's registry and the ledger contradict each other, one sentence each.

    MLflow's versions carry the hash of their row of the ledger, which also shows rows cut off at the ledger's end.

    Args:
        model: name of the registered model.
        versions: its versions in MLflow.
        records: the whole ledger, of all models.
        candidate_alias: the alias of the version that may be released next.
    """
    problems = []
    registered = {
        int(record.version): record for record in records if record.model == model and record.event == "registered"
    }
    versions = list(versions)
    for version in sorted(versions, key=lambda entry: entry.version):
        name = f"{model} v{version.version}"
        record = registered.get(version.version)
        if missing_anchors(records, filter(None, [version.tags.get("perch.ledger_sha256")])):
            problems.append(
                f"{name} names row {version.tags.get('perch.ledger_sequence')} of the ledger, which is gone"
            )
        if record is None:
            problems.append(f"{name} is in MLflow, but the ledger has never registered it")
        elif _onnx_sha256(record) != version.tags.get("perch.onnx_sha256"):
            problems.append(f"{name} is tagged in MLflow with another model file than the ledger recorded")
    expected = aliases_by_ledger(records, model, {version.version for version in versions}, candidate_alias)
    aliases = {alias: str(version.version) for version in versions for alias in version.aliases}
    return problems + find_alias_disagreements(model, aliases, expected)


def _onnx_sha256(record: Record) -> Any:
    return json.loads(record.evidence).get("model", {}).get("onnx_sha256")


def _from_mlflow(entry: ModelVersion, aliases: tuple[str, ...]) -> RegisteredVersion:
    return RegisteredVersion(
        model=entry.name,
        version=int(entry.version),
        aliases=aliases,
        registered_at=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC),
        mlflow_run_id=entry.run_id or "",
        tags=dict(entry.tags),
    )
