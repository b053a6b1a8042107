"""The release that this process serves: its manifest and its model file, side by side among the Bento's sources."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE, RELEASE_FOLDER, ReleaseManifest
from pipelines.errors import Refusal

_PACKED = Path(__file__).absolute().parent.parent / RELEASE_FOLDER


@dataclass(frozen=True)
class Release:
    """What is served.

    Attributes:
        manifest: which registered version it is, and where it came from.
        model: the ONNX file.
    """

    manifest: ReleaseManifest
    model: Path


def load_release(folder: Path | None = None) -> Release:
    """Read the release's manifest and hold its model file against the digest that the manifest names.

    Args:
        folder: with `release.json` and `model.onnx`; the one packed with this code when None.

    Raises:
        Refusal: a file is missing or unreadable, or the model is not the one that was released.
    """
    folder = folder or _PACKED
    way_out = "serve a file that `perch package` wrote, with `python -m serving FILE`"
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = ReleaseManifest.model_validate_json(text)
        with (folder / MODEL_FILE).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise Refusal(f"the release in {folder}", f"cannot be read: {error}", way_out=way_out) from error
    except ValidationError as error:
        raise Refusal(
            f"the manifest {folder / MANIFEST_FILE}",
            f"is not one that this code reads: {error.errors()[0]['msg']}",
            way_out=way_out,
        ) from error
    if digest != manifest.onnx_sha256:
        raise Refusal(
            f"the model {folder / MODEL_FILE}",
            f"has SHA-256 {digest[:16]}…",
            limit=f"{manifest.onnx_sha256[:16]}…, by the release's manifest",
            way_out="the file was changed after packaging: package the version again",
        )
    return Release(manifest, folder / MODEL_FILE)
