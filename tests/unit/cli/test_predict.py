"""`perch predict`, on a real registry and a real ledger."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.connection import with_mlflow
from pipelines.registry.models import CHAMPION
from pipelines.registry.registration import register
from pipelines.settings import Settings

MakeRun = Callable[..., Workspace]


@pytest.fixture
def registered(registry_settings: Settings, registry_params: Params, make_run: MakeRun) -> Settings:
    """Two versions; the second is the candidate."""
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    return registry_settings


@pytest.fixture
def predict(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command on a folder of two images and one text, and gives the first row of its output."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, grey in (("a.png", 10), ("b.png", 200)):
        Image.fromarray(np.full((9, 9), grey, np.uint8)).save(folder / name)
    (folder / "c.txt").write_text("no image")

    def run(*options: str) -> dict[str, Any]:
        out = tmp_path / "predictions.parquet"
        result = CliRunner().invoke(app, ["predict", str(folder), "--out", str(out), *options], catch_exceptions=False)
        if result.exception:
            raise result.exception
        assert "2 predicted, 1 unreadable: 1 not_an_image →" in " ".join(result.output.split())
        return dict(pq.read_table(out).to_pylist()[0])

    return run


def test_predict__no_champion_yet__takes_the_candidate(registered: Settings, predict: Any) -> None:
    row = predict()
    assert (row["key"], row["model"], row["model_version"]) == ("a.png", "shapes-classification", "2")


def test_predict__a_champion__takes_it_unless_a_version_is_named(registered: Settings, predict: Any) -> None:
    with_mlflow(
        registered, lambda mlflow: mlflow.client.set_registered_model_alias("shapes-classification", CHAMPION, "1")
    )
    assert predict()["model_version"] == "1"
    assert predict("--version", "v2", "--model", "shapes-classification")["model_version"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--version", "7"), "versions: v2, v1"),
        (("--version", "one"), "a number, e.g. 3"),
        (("--model", "other"), "neither a champion nor a candidate"),
    ],
)
def test_predict__no_such_model__is_refused(
    options: tuple[str, ...], message: str, registered: Settings, predict: Any
) -> None:
    with pytest.raises(Refusal, match=message):
        predict(*options)


def test_predict__stored_file_changed__is_refused_even_with_its_tag(registered: Settings, predict: Any) -> None:
    for file in (registered.home / "mlflow").rglob("model.onnx"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(Refusal, match="was registered"):
        predict("--version", "1")
    digests = {
        hashlib.sha256(file.read_bytes()).hexdigest() for file in (registered.home / "mlflow").rglob("model.onnx")
    }
    refusals = []
    for sha256 in digests:
        with_mlflow(
            registered,
            lambda mlflow, sha256=sha256: mlflow.client.set_model_version_tag(
                "shapes-classification", "1", "perch.onnx_sha256", sha256
            ),
        )
        with pytest.raises(Refusal) as refused:
            predict("--version", "1")
        refusals.append("of the ledger" in str(refused.value))
    assert sorted(refusals) == [False, True]
