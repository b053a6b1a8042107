"""The prober's images in the store of releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core.file_hash import hash_file
from pipelines.errors import Refusal
from pipelines.release.artifact_store import open_store
from pipelines.release.probe_images import fetch_probe_images, keep_probe_images
from pipelines.settings import Settings

RELEASE = "5c" * 32
IMAGES = [b"one", b"two" * 1000, b""]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(project_dir=tmp_path, home=tmp_path / "home")


def test_fetch__what_was_kept__is_the_same_and_has_the_same_bytes_each_time(settings: Settings) -> None:
    store = open_store(settings)
    digest = keep_probe_images(store, RELEASE, IMAGES)
    assert fetch_probe_images(store, RELEASE, digest) == IMAGES
    assert keep_probe_images(store, RELEASE, IMAGES) == digest
    assert hash_file(settings.releases_dir / f"{RELEASE}.probes.zip") == digest


def test_fetch__others_than_those_of_the_ledger__is_refused(settings: Settings) -> None:
    store = open_store(settings)
    digest = keep_probe_images(store, RELEASE, IMAGES)
    keep_probe_images(store, RELEASE, [b"easy"])
    with pytest.raises(Refusal, match="SHA-256"):
        fetch_probe_images(store, RELEASE, digest)


def test_fetch__none_kept__is_refused(settings: Settings) -> None:
    with pytest.raises(Refusal, match="missing"):
        fetch_probe_images(open_store(settings), RELEASE, "0a" * 32)
