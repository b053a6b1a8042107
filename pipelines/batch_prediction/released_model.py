"""The model inside a packaged release: the very file that a server of this release answers with."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.release_signing import find_public_keys, verify_file
from pipelines.core.release_unit import (
    MANIFEST_FILE,
    MODEL_FILE,
    RELEASE_FOLDER,
    SIGNATURE_SUFFIX,
    ReleaseManifest,
    digest_in_name,
)
from pipelines.errors import Refusal

_INSIDE = f"src/{RELEASE_FOLDER}"


def take_released_model(release: Path, public_keys: Sequence[Path], into: Path) -> tuple[Path, ModelIdentity]:
    """Verify a release as a server does before it starts, and take the model out of it.

    Args:
        release: `<sha256>.bento`, with its `.sig` beside it.
        public_keys: files and folders of the keys that are trusted.
        into: empty folder for the model.

    Returns:
        The model's file, and what the release says it is.

    Raises:
        Refusal: there is no such release, its bytes or signature are not those expected, or it holds no model.
    """
    digest = digest_in_name(release.name)
    if not release.is_file() or digest is None:
        found = "does not exist" if digest else "is not named by its SHA-256"
        raise Refusal(f"the release {release}", found, limit="<sha256>.bento", way_out="`perch package` writes one")
    # Where nobody can change them between the check and the use.
    copy = into / release.name
    signature = into / f"{release.name}{SIGNATURE_SUFFIX}"
    shutil.copyfile(release, copy)
    if (beside := release.with_name(signature.name)).is_file():
        shutil.copyfile(beside, signature)
    verify_file(copy, digest, signature, find_public_keys(public_keys))
    manifest = None
    wanted = {f"{_INSIDE}/{MANIFEST_FILE}", f"{_INSIDE}/{MODEL_FILE}"}
    model = into / MODEL_FILE
    try:
        with tarfile.open(copy, "r|xz") as archive:
            for entry in archive:
                if entry.name not in wanted or (content := archive.extractfile(entry)) is None:
                    continue
                if entry.name.endswith(MANIFEST_FILE):
                    manifest = ReleaseManifest.model_validate_json(content.read())
                else:
                    with model.open("wb") as stream:
                        shutil.copyfileobj(content, stream, 2**20)
    except (tarfile.TarError, lzma.LZMAError, ValidationError) as error:
        raise Refusal(f"the release {digest[:12]}…", f"cannot be read: {error}") from error
    if manifest is None or not model.is_file():
        raise Refusal(f"the release {digest[:12]}…", f"holds no {_INSIDE}/", way_out="package the version again")
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    if sha256 != manifest.onnx_sha256:
        raise Refusal(
            f"the model in the release {digest[:12]}…",
            f"has SHA-256 {sha256[:12]}…",
            limit=f"{manifest.onnx_sha256[:12]}…, its manifest",
            way_out="find out who made and signed this release",
        )
    return model, ModelIdentity(manifest.model, manifest.version, sha256)
