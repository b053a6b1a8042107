"""Build the registered version's release: one file with the model and the service, signed, and noted in the ledger."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipelines.core.results import StageResult
from pipelines.core.workspace import Workspace
from pipelines.params import Params
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.release.service_code import ServiceCode

logger = logging.getLogger(__name__)


class ModelPackagingResult(StageResult):
    """Which file the version became."""

    version: str = Field(description="In MLflow's registry.")
    release_sha256: str = Field(description="Of the release; its name in the artifact store.")
    size_bytes: int = Field(description="Of the release.")
    key_id: str = Field(description="Of the key that signed it.")
    ledger_sequence: int = Field(description="Number of its row in the ledger.")


@dataclass(frozen=True)
class Package:
    """A release in the artifact store.

    Attributes:
        model: name of the registered model.
        version: in the registry.
        digest: SHA-256 of the file.
        size_bytes: of the file.
        address: where it lies.
        key_id: of the key that signed it.
        key_made: whether that key was made for it just now.
        service_git_sha: commit of the service's code in it.
        ledger_sequence: number of its row in the ledger.
    """

    model: str
    version: int
    digest: str
    size_bytes: int
    address: str
    key_id: str
    key_made: bool
    service_git_sha: str
    ledger_sequence: int


def run(params: Params, workspace: Workspace) -> ModelPackagingResult:
    """Package the version that the run was registered as; a second call changes nothing.

    Raises:
        Refusal: the version is not what was registered, or the key that was named is not there.
        TryLater: MLflow, the ledger's database or the artifact store did not answer.
    """
    from pipelines.settings import get_settings

    registration = json.loads(workspace.result_file("model_registration").read_text(encoding="utf-8"))
    # On one machine a run must end without a step by hand; a key that was named is somebody's to make.
    package = package_version(get_settings(), params.model_name, int(registration["version"]), make_key=True)
    made = f", signed with the new key {package.key_id}" if package.key_made else ""
    return ModelPackagingResult(
        summary=f"{package.digest[:12]}, {package.size_bytes / 1e6:.1f} MB{made}",
        version=str(package.version),
        release_sha256=package.digest,
        size_bytes=package.size_bytes,
        key_id=package.key_id,
        ledger_sequence=package.ledger_sequence,
    )


def package_version(
    settings: Settings, model: str, version: int, *, make_key: bool = False, code: ServiceCode | None = None
) -> Package:
    """Build, sign, store and record a release.  Killed anywhere and called again, it ends as if it had not been.

    Args:
        settings: where things lie.
        model: name of the registered model.
        version: its version.
        make_key: make the default signing key where there is none.
        code: the service; by default that of this installation.

    Raises:
        Refusal: the version is not what was registered, or there is no key.
        TryLater: MLflow, the ledger's database or the artifact store did not answer.
    """
    from pipelines.core.file_hash import hash_file
    from pipelines.core.release_unit import release_name
    from pipelines.registry.released_version import fetch_version, record_packaged
    from pipelines.release.artifact_store import open_store
    from pipelines.release.bento import build_release
    from pipelines.release.contract import read_contract
    from pipelines.release.keys import signing_key
    from pipelines.release.publishing import publish_release
    from pipelines.release.service_code import find_service_code

    store = open_store(settings)
    key, key_made = signing_key(settings, make=make_key)
    if key_made:
        logger.warning("made the signing key %s (id %s)", key.private, key.key_id)
    code = code or find_service_code()
    with tempfile.TemporaryDirectory(prefix="perch-release-") as temporary:
        folder = Path(temporary)
        files = fetch_version(settings, model, version, folder)
        built = folder / "release"
        build_release(files.manifest(read_contract(files.model), code.git_sha), files.model, code, built)
        digest, size_bytes = hash_file(built), built.stat().st_size
        file = built.rename(folder / release_name(digest))  # the signature names it
        publish_release(store, file, digest, key)
    record = record_packaged(
        settings,
        files,
        digest=digest,
        evidence={
            "size_bytes": size_bytes,
            "key_id": key.key_id,
            "onnx_sha256": files.evidence["model"]["onnx_sha256"],
            "service_git_sha": code.git_sha,
        },
    )
    return Package(
        model=model,
        version=version,
        digest=digest,
        size_bytes=size_bytes,
        address=store.address(release_name(digest)),
        key_id=key.key_id,
        key_made=key_made,
        service_git_sha=code.git_sha,
        ledger_sequence=record.sequence,
    )
