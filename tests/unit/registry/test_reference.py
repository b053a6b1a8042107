"""What a run is compared with, fetched from a real registry."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.connection import with_mlflow
from pipelines.registry.reference import fetch_reference, fetch_reference_version
from pipelines.registry.registration import register
from pipelines.settings import Settings

MakeRun = Callable[..., Workspace]
MODEL = "shapes-classification"


def read(folder: Path) -> dict[str, object]:
    return json.loads((folder / "reference.json").read_text())


def test_fetch_reference__nothing_registered__is_none(
    registry_settings: Settings, registry_params: Params, tmp_path: Path
) -> None:
    fetch_reference(registry_settings, registry_params, tmp_path / "reference")
    assert read(tmp_path / "reference") == {"kind": "none", "version": None, "run_id": None, "onnx_sha256": None}
    assert [path.name for path in (tmp_path / "reference").iterdir()] == ["reference.json"]


def test_fetch_reference__candidate_then_champion__takes_the_champion(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, tmp_path: Path
) -> None:
    first, second = make_run("run-1", seed=1), make_run("run-2", seed=2)
    register(registry_settings, registry_params, first)
    register(registry_settings, registry_params, second)
    fetch_reference(registry_settings, registry_params, tmp_path / "a")
    assert (read(tmp_path / "a")["kind"], read(tmp_path / "a")["version"]) == ("candidate", "2")

    with_mlflow(registry_settings, lambda mlflow: mlflow.client.set_registered_model_alias(MODEL, "champion", "1"))
    fetch_reference(registry_settings, registry_params, tmp_path / "b")
    assert read(tmp_path / "b")["kind"] == "champion"
    assert read(tmp_path / "b")["run_id"] == "run-1"
    for name, source in {
        "model.onnx": first.model / "model.onnx",
        "images.parquet": first.splits / "images.parquet",
        "manifest.json": first.raw / "manifest.json",
        "metrics.json": first.evaluation / "metrics.json",
    }.items():
        assert (tmp_path / "b" / name).read_bytes() == source.read_bytes()

    # A run that goes on keeps what it began with, though the registry has moved.
    fetch_reference(registry_settings, registry_params, tmp_path / "a")
    assert read(tmp_path / "a")["version"] == "2"


def test_fetch_reference_version__past_run__gets_the_same_bytes(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, tmp_path: Path
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    fetch_reference(registry_settings, registry_params, tmp_path / "then")
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    fetch_reference_version(registry_settings, registry_params, "1", tmp_path / "now", kind="candidate")
    then, now = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("then", "now"))
    assert then == now


def test_fetch_reference_version__none__is_none(
    registry_settings: Settings, registry_params: Params, tmp_path: Path
) -> None:
    fetch_reference_version(registry_settings, registry_params, None, tmp_path / "reference")
    assert read(tmp_path / "reference")["kind"] == "none"


def test_fetch_reference_version__unknown__names_the_known(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, tmp_path: Path
) -> None:
    register(registry_settings, registry_params, make_run())
    with pytest.raises(Refusal, match="versions: v1"):
        fetch_reference_version(registry_settings, registry_params, "9", tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_fetch_reference__stored_model_was_changed__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, tmp_path: Path
) -> None:
    register(registry_settings, registry_params, make_run())
    (stored,) = registry_settings.home.rglob("model/model.onnx")
    stored.write_bytes(stored.read_bytes() + b"\0")
    with pytest.raises(Refusal, match="the stored file was changed"):
        fetch_reference(registry_settings, registry_params, tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_fetch_reference__stored_model_is_gone__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, tmp_path: Path
) -> None:
    register(registry_settings, registry_params, make_run())
    (stored,) = registry_settings.home.rglob("model/model.onnx")
    stored.unlink()
    with pytest.raises(Refusal, match="missing"):
        fetch_reference(registry_settings, registry_params, tmp_path / "reference")
