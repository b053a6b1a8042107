"""Releases from files and folders into the cache; buckets are in tests/integration/test_releases.py."""

import hashlib
from pathlib import Path

import pytest

from pipelines.errors import Refusal
from serving.fetching import fetch_release

CONTENT = b"a release"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / f"{DIGEST}.bento").write_bytes(CONTENT)
    (folder / f"{DIGEST}.bento.sig").write_text("signature")
    return folder


def test_fetch_release__file__comes_with_its_signature_and_the_digest_in_its_name(store: Path, tmp_path: Path) -> None:
    fetched = fetch_release(str(store / f"{DIGEST}.bento"), tmp_path / "cache")
    assert fetched.digest == DIGEST
    assert fetched.file == tmp_path / "cache" / f"{DIGEST}.bento"
    assert fetched.file.read_bytes() == CONTENT
    assert fetched.signature.read_text() == "signature"


def test_fetch_release__folder_with_one_release__is_enough(store: Path, tmp_path: Path) -> None:
    assert fetch_release(str(store), tmp_path / "cache").digest == DIGEST


def test_fetch_release__folder_with_several__wants_to_be_told_which(store: Path, tmp_path: Path) -> None:
    (store / f"{'0' * 64}.bento").write_bytes(b"another")
    with pytest.raises(Refusal, match="holds 2 releases"):
        fetch_release(str(store), tmp_path / "cache")
    assert fetch_release(str(store), tmp_path / "cache", digest=DIGEST).file.read_bytes() == CONTENT


def test_fetch_release__file_under_another_name__needs_the_digest(store: Path, tmp_path: Path) -> None:
    file = (store / f"{DIGEST}.bento").rename(store / "latest.bento")
    with pytest.raises(Refusal, match="is not named by its SHA-256"):
        fetch_release(str(file), tmp_path / "cache")
    assert fetch_release(str(file), tmp_path / "cache", digest=DIGEST).file.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("digest", "says"),
    [("0" * 64, "is not the expected one"), ("abc", "--digest"), ("../" * 21 + "x", "--digest")],
    ids=["another", "short", "no digits"],
)
def test_fetch_release__digest_that_does_not_match_the_name__is_refused(
    store: Path, tmp_path: Path, digest: str, says: str
) -> None:
    with pytest.raises(Refusal, match=says):
        fetch_release(str(store / f"{DIGEST}.bento"), tmp_path / "cache", digest=digest)


def test_fetch_release__not_there__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="does not exist"):
        fetch_release(str(tmp_path / f"{DIGEST}.bento"), tmp_path / "cache")
    with pytest.raises(Refusal, match="holds 0 releases"):
        fetch_release(str(tmp_path), tmp_path / "cache")


def test_fetch_release__prefix_of_a_bucket_without_a_digest__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="names no release"):
        fetch_release("s3://bucket/prefix", tmp_path / "cache")


def test_fetch_release__copy_in_the_cache_was_changed__is_fetched_again(store: Path, tmp_path: Path) -> None:
    address = str(store / f"{DIGEST}.bento")
    fetched = fetch_release(address, tmp_path / "cache")
    fetched.file.write_bytes(b"half a rel")
    assert fetch_release(address, tmp_path / "cache").file.read_bytes() == CONTENT


def test_fetch_release__signature_taken_away__is_not_kept_in_the_cache(store: Path, tmp_path: Path) -> None:
    address = str(store / f"{DIGEST}.bento")
    fetch_release(address, tmp_path / "cache")
    (store / f"{DIGEST}.bento.sig").unlink()
    assert not fetch_release(address, tmp_path / "cache").signature.exists()


def test_fetch_release__twice__leaves_nothing_but_the_two_files(store: Path, tmp_path: Path) -> None:
    for _ in range(2):
        fetch_release(str(store), tmp_path / "cache")
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == [f"{DIGEST}.bento", f"{DIGEST}.bento.sig"]
