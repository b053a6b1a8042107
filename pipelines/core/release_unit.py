"""The release unit: one file, named by its SHA-256, and the manifest inside it that says what it is.

The file is an exported Bento.  Among its sources lie `release/model.onnx` and `release/release.json`; beside the file
in the artifact store lies `<name>.sig`, the signature over it.  `docs/reference/releases.md` describes both.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines.core.contract import InputContract

RELEASE_FOLDER = "release"  # in the Bento's sources
MODEL_FILE = "model.onnx"
MANIFEST_FILE = "release.json"
RELEASE_SUFFIX = ".bento"  # BentoML reads the kind of an archive from its name
SIGNATURE_SUFFIX = ".sig"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class MeasuredMetric(BaseModel):
    """A number of the evaluation with its confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


class ReleaseManifest(BaseModel):
    """Which registered version a release holds, and where it came from; the same version gives the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str = Field(description="Name of the registered model.")
    version: str = Field(description="Its version in the registry.")
    labels: tuple[str, ...] = Field(description="In the order of the model's outputs.")
    input: InputContract
    metrics: dict[str, MeasuredMetric] = Field(description="On the test split, e.g. `test/accuracy`.")
    run_id: str = Field(description="The Perch run that trained it.")
    mlflow_run_id: str = Field(description="The MLflow run that holds its files.")
    git_sha: str = Field(description="Commit of the training code.")
    service_git_sha: str = Field(description="Commit of the service code inside the release.")
    data_sha256: Sha256 = Field(description="Digest of the ingested data.")
    onnx_sha256: Sha256 = Field(description="Digest of the model file.")
    registered_at: str = Field(description="When it was registered, UTC, ISO 8601.")


def release_name(digest: str) -> str:
    """Name of the file with this SHA-256 in the artifact store."""
    return f"{digest}{RELEASE_SUFFIX}"


def digest_in_name(name: str) -> str | None:
    """The SHA-256 that a file is named by; None where it is named otherwise."""
    found = re.fullmatch(rf"([0-9a-f]{{64}}){re.escape(RELEASE_SUFFIX)}", name)
    return found[1] if found else None
