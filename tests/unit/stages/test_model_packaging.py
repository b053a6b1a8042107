"""A registered version becomes one file: the same each time, once in the ledger, whatever happens in between."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.release_signing import find_public_keys, verify_file
from pipelines.core.release_unit import ReleaseManifest
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import MODEL_FOLDER
from pipelines.registry.registration import register
from pipelines.release import artifact_store, keys, publishing
from pipelines.release.bento import build_release
from pipelines.release.service_code import find_service_code
from pipelines.settings import Settings
from pipelines.stages import model_packaging
from pipelines.stages.model_packaging import package_version

MakeRun = Callable[..., Workspace]
MODEL = "shapes-classification"


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def packaged_rows(settings: Settings) -> list[dict[str, Any]]:
    records = Ledger(settings.ledger_url).entries()
    return [json.loads(record.evidence) for record in records if record.event == "packaged"]


@pytest.fixture
def registered(registry_settings: Settings, registry_params: Params, make_run: MakeRun) -> Workspace:
    workspace = make_run()
    register(registry_settings, registry_params, workspace)
    return workspace


def test_package_version__registered_version__is_one_verifiable_file_with_its_origins(
    registry_settings: Settings, registered: Workspace, tmp_path: Path
) -> None:
    pair = keys.create_key(registry_settings)
    package = package_version(registry_settings, MODEL, 1)

    file = Path(package.address)
    assert file == registry_settings.releases_dir / f"{package.digest}.bento"
    signature = file.with_name(f"{file.name}.sig")
    assert verify_file(file, package.digest, signature, find_public_keys([pair.public])) == package.key_id
    assert sorted(path.name for path in registry_settings.releases_dir.iterdir()) == [file.name, signature.name]

    with tarfile.open(file, "r:xz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    release = tmp_path / "unpacked/src/release"
    onnx = (registered.model / "model.onnx").read_bytes()
    assert (release / "model.onnx").read_bytes() == onnx
    manifest = ReleaseManifest.model_validate_json((release / "release.json").read_text())
    assert (manifest.model, manifest.version, manifest.labels) == (MODEL, "1", ("circle", "square"))
    assert (manifest.run_id, manifest.git_sha) == ("run-1", "3e9d1c2" + "0" * 33)
    assert manifest.onnx_sha256 == hashlib.sha256(onnx).hexdigest()
    assert manifest.metrics["test/accuracy"].low == 0.926
    assert manifest.registered_at == Ledger(registry_settings.ledger_url).entries()[0].occurred_at

    (row,) = packaged_rows(registry_settings)
    assert row == {
        "run_id": "run-1",
        "release_sha256": package.digest,
        "size_bytes": file.stat().st_size,
        "key_id": pair.key_id,
        "onnx_sha256": manifest.onnx_sha256,
        "service_git_sha": manifest.service_git_sha,
    }
    assert no_trace_of_this_machine(tmp_path / "unpacked")

    # Imported by BentoML's own command, from the file as it is.
    home = {"BENTOML_HOME": str(tmp_path / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    bentoml = [sys.executable, "-m", "bentoml"]
    subprocess.run([*bentoml, "import", file], env={**os.environ, **home}, check=True, capture_output=True)
    listed = subprocess.run(
        [*bentoml, "get", f"{MODEL}:v1", "-o", "json"], env={**os.environ, **home}, check=True, capture_output=True
    )
    assert json.loads(listed.stdout)["labels"]["run_id"] == "run-1"


def no_trace_of_this_machine(folder: Path) -> bool:
    """No file names the project's folder, or the temporary one that it was built in."""
    marks = (str(find_service_code().root).encode(), b"perch-package-")
    contents = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    return bool(contents) and not any(mark in content for content in contents for mark in marks)


def test_package_version__again_elsewhere_and_later__gives_the_same_bytes(
    registry_settings: Settings, registered: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.create_key(registry_settings)
    first = package_version(registry_settings, MODEL, 1)
    signature = Path(f"{first.address}.sig").read_bytes()
    # Another place for temporary files, another number of workers, another store, another clock.
    (tmp_path / "another-place").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "another-place"))
    monkeypatch.setenv("PERCH_SERVING_WORKERS", "7")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    second = package_version(registry_settings, MODEL, 1)
    assert second == first
    assert Path(f"{first.address}.sig").read_bytes() == signature
    assert len(packaged_rows(registry_settings)) == 1


def test_run__without_a_key__makes_one_and_says_so(
    registry_settings: Settings, registry_params: Params, registered: Workspace
) -> None:
    registered.result_file("model_registration").write_text(json.dumps({"version": "1"}))
    result = model_packaging.run(registry_params, registered)
    (pair,) = keys.list_keys(registry_settings)
    assert result.key_id == pair.key_id
    assert f"signed with the new key {pair.key_id}" in result.summary
    assert result.ledger_sequence == 2
    assert str(registry_settings.home) not in result.model_dump_json()


def test_package_version__without_a_key__is_refused_before_anything_is_built(
    registry_settings: Settings, registered: Workspace
) -> None:
    with pytest.raises(Refusal, match="perch keys init"):
        package_version(registry_settings, MODEL, 1)
    assert not registry_settings.releases_dir.exists()


def test_package_version__model_changed_in_mlflow__is_refused(
    registry_settings: Settings, registered: Workspace
) -> None:
    def change(mlflow: Mlflow) -> None:
        (run_id,) = {version.run_id for version in mlflow.client.search_model_versions(f"name = '{MODEL}'")}
        file = registered.root / "changed" / "model.onnx"
        file.parent.mkdir()
        file.write_bytes((registered.model / "model.onnx").read_bytes() + b"\0")
        mlflow.artifacts(run_id).log_artifacts(str(file.parent), MODEL_FOLDER)

    keys.create_key(registry_settings)
    with_mlflow(registry_settings, change)
    with pytest.raises(Refusal, match="the model of shapes-classification v1 in MLflow: has SHA-256"):
        package_version(registry_settings, MODEL, 1)


def test_package_version__not_registered_by_perch__is_refused(
    registry_settings: Settings, registered: Workspace
) -> None:
    keys.create_key(registry_settings)
    with pytest.raises(Refusal, match="v2: not registered"):
        package_version(registry_settings, MODEL, 2)
    for suffix in ("", "-wal", "-shm"):
        (registry_settings.home / f"ledger.db{suffix}").unlink(missing_ok=True)
    with pytest.raises(Refusal, match="the ledger has never registered it"):
        package_version(registry_settings, MODEL, 1)


def test_build_release__module_that_the_service_needs_is_missing__stops_the_build(tmp_path: Path) -> None:
    """Not the server, later: what is left out is not found in the project's own environment."""
    from dataclasses import replace

    from pipelines.core.contract import InputContract

    manifest = ReleaseManifest(
        model=MODEL,
        version="1",
        labels=("a", "b"),
        input=InputContract(size_px=8, channels=1, resize="squash"),
        metrics={},
        run_id="run-1",
        mlflow_run_id="1",
        git_sha="1",
        service_git_sha="1",
        data_sha256="0" * 64,
        onnx_sha256="0" * 64,
        registered_at="2026-11-01T02:00:00+00:00",
    )
    (tmp_path / "model.onnx").write_bytes(b"")
    code = find_service_code()
    lacking = replace(code, files=tuple(file for file in code.files if file != "pipelines/core/contract.py"))
    with pytest.raises(Exception, match=r"No module named 'pipelines\.core\.contract'"):
        build_release(manifest, tmp_path / "model.onnx", lacking, tmp_path / "file")


# Publishing: a kill between any two writes


@pytest.fixture
def built(tmp_path: Path) -> Path:
    content = b"a release"
    file = tmp_path / "built" / f"{hashlib.sha256(content).hexdigest()}.bento"
    file.parent.mkdir()
    file.write_bytes(content)
    return file


def publish(settings: Settings, built: Path, pair: keys.KeyPair) -> None:
    # As from a new temporary folder.
    file = Path(shutil.copy(built, settings.home / built.name))
    publishing.publish_release(artifact_store.open_store(settings), file, built.stem, pair)


@pytest.fixture
def pair(registry_settings: Settings) -> keys.KeyPair:
    return keys.create_key(registry_settings)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", [0, 1, 2], ids=["release", "sign", "signature"])
def test_publish_release__killed_at_a_write__is_completed_by_the_second_call(
    registry_settings: Settings,
    pair: keys.KeyPair,
    built: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    after: bool,
) -> None:
    writes = 0

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def perform(*arguments: Any) -> Any:
            nonlocal writes
            number, writes = writes, writes + 1
            if number == step and not after:
                raise Killed
            answer = call(*arguments)
            if number == step:
                raise Killed
            return answer

        return perform

    with monkeypatch.context() as patched:
        patched.setattr(artifact_store._Folder, "put", guarded(artifact_store._Folder.put))
        patched.setattr(publishing, "sign_file", guarded(publishing.sign_file))
        with pytest.raises(Killed):
            publish(registry_settings, built, pair)
    publish(registry_settings, built, pair)
    stored = registry_settings.releases_dir / built.name
    trusted = find_public_keys([pair.public])
    assert verify_file(stored, built.stem, stored.with_name(f"{stored.name}.sig"), trusted) == pair.key_id
    assert len(list(registry_settings.releases_dir.iterdir())) == 2


def test_publish_release__stored_file_was_changed__is_put_right(
    registry_settings: Settings, pair: keys.KeyPair, built: Path
) -> None:
    publish(registry_settings, built, pair)
    stored = registry_settings.releases_dir / built.name
    stored.write_bytes(b"half a rel")
    publish(registry_settings, built, pair)
    assert stored.read_bytes() == built.read_bytes()


def test_publish_release__key_was_replaced__signs_anew(
    registry_settings: Settings, pair: keys.KeyPair, built: Path
) -> None:
    publish(registry_settings, built, pair)
    successor = keys.create_key(registry_settings, "2026-b")
    publish(registry_settings, built, successor)
    stored = registry_settings.releases_dir / built.name
    trusted = find_public_keys([successor.public])
    assert verify_file(stored, built.stem, stored.with_name(f"{stored.name}.sig"), trusted) == successor.key_id
