"""The model of a release, taken only from a file whose digest and signature are right."""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.batch_prediction.released_model import take_released_model
from pipelines.core.file_hash import hash_file
from pipelines.core.release_signing import sign_file
from pipelines.core.release_unit import ReleaseManifest, release_name
from pipelines.errors import Refusal
from pipelines.release.archive import pack_folder
from pipelines.release.keys import KeyPair, create_key
from pipelines.settings import Settings

MakeRelease = Callable[..., Path]


@pytest.fixture
def key(tmp_path: Path) -> KeyPair:
    return create_key(Settings(home=tmp_path / "home"))


@pytest.fixture
def make_release(tmp_path: Path, model_file: Path, key: KeyPair) -> MakeRelease:
    """Packs and signs a release that holds what `take_released_model` reads of one."""

    def make(*, onnx_sha256: str = "", inside: str = "src/release") -> Path:
        model = model_file.read_bytes()
        folder = tmp_path / "bento" / inside
        folder.mkdir(parents=True)
        manifest = ReleaseManifest(
            model="shapes-classification",
            version="7",
            labels=("circle", "square"),
            input={"size_px": 8, "channels": 1, "resize": "squash"},
            metrics={},
            run_id="run-1",
            mlflow_run_id="0a" * 16,
            git_sha="3e" * 20,
            service_git_sha="4f" * 20,
            data_sha256="77" * 32,
            onnx_sha256=onnx_sha256 or hashlib.sha256(model).hexdigest(),
            registered_at="2026-11-01T02:00:00+00:00",
        )
        (folder / "release.json").write_text(json.dumps(manifest.model_dump(mode="json")))
        (folder / "model.onnx").write_bytes(model)
        packed = tmp_path / "packed"
        pack_folder(tmp_path / "bento", packed, modified=datetime(2026, 11, 1, tzinfo=UTC))
        release = packed.rename(tmp_path / release_name(hash_file(packed)))
        sign_file(release, release.with_name(f"{release.name}.sig"), key.private)
        return release

    return make


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def test_release__signed_by_a_trusted_key__gives_its_model(
    make_release: MakeRelease, key: KeyPair, model_file: Path, into: Path
) -> None:
    model, identity = take_released_model(make_release(), [key.public.parent], into)
    assert model.read_bytes() == model_file.read_bytes()
    assert (identity.name, identity.version) == ("shapes-classification", "7")
    assert identity.onnx_sha256 == hashlib.sha256(model_file.read_bytes()).hexdigest()


def test_release__a_bit_flipped__is_refused(make_release: MakeRelease, key: KeyPair, into: Path) -> None:
    release = make_release()
    content = bytearray(release.read_bytes())
    content[len(content) // 2] ^= 1
    release.write_bytes(content)
    with pytest.raises(Refusal, match="was changed"):
        take_released_model(release, [key.public], into)


def test_release__without_signature_or_with_a_strangers__is_refused(
    make_release: MakeRelease, key: KeyPair, into: Path, tmp_path: Path
) -> None:
    release = make_release()
    stranger = create_key(Settings(home=tmp_path / "elsewhere"))
    with pytest.raises(Refusal, match="not trusted here"):
        take_released_model(release, [stranger.public], into)
    release.with_name(f"{release.name}.sig").unlink()
    (into / f"{release.name}.sig").unlink()
    with pytest.raises(Refusal, match="has no signature"):
        take_released_model(release, [key.public], into)


def test_release__signed_but_another_model_than_it_says__is_refused(
    make_release: MakeRelease, key: KeyPair, into: Path
) -> None:
    with pytest.raises(Refusal, match="its manifest"):
        take_released_model(make_release(onnx_sha256="ab" * 32), [key.public], into)


def test_release__signed_but_without_a_model__is_refused(make_release: MakeRelease, key: KeyPair, into: Path) -> None:
    with pytest.raises(Refusal, match="holds no src/release"):
        take_released_model(make_release(inside="src/other"), [key.public], into)


def test_release__missing_or_named_otherwise__is_refused(key: KeyPair, into: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="does not exist"):
        take_released_model(tmp_path / release_name("ab" * 32), [key.public], into)
    (tmp_path / "latest.bento").write_bytes(b"")
    with pytest.raises(Refusal, match="not named by its SHA-256"):
        take_released_model(tmp_path / "latest.bento", [key.public], into)
