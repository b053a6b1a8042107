from pathlib import Path

import pytest

from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE
from pipelines.errors import Refusal
from serving.release import load_release


def test_load_release__folder_as_packed__gives_manifest_and_model(release_folder: Path) -> None:
    release = load_release(release_folder)
    assert release.manifest.version == "7"
    assert release.model == release_folder / MODEL_FILE


def test_load_release__flipped_byte_in_the_model__is_refused_with_both_digests(release_folder: Path) -> None:
    model = release_folder / MODEL_FILE
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(Refusal, match=r"has SHA-256 .*…, by the release's manifest"):
        load_release(release_folder)


def test_load_release__no_manifest__names_what_to_serve_instead(release_folder: Path) -> None:
    (release_folder / MANIFEST_FILE).unlink()
    with pytest.raises(Refusal, match="python -m serving FILE"):
        load_release(release_folder)


def test_load_release__manifest_of_another_schema__is_refused(release_folder: Path) -> None:
    manifest = release_folder / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(Refusal, match="not one that this code reads"):
        load_release(release_folder)
