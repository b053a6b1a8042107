"""The three stages from a source to features, as `perch` runs them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.core.workspace import Workspace
from pipelines.params import Params, check_params
from pipelines.settings import get_settings
from pipelines.stages import data_ingestion, data_preprocessing, feature_engineering


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    monkeypatch.setenv("PERCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(tmp_path))
    get_settings.cache_clear()
    folder = tmp_path / "home" / "runs" / "run-1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)  # a stage runs in its workspace, and sources are named relative to the project
    yield Workspace(folder)
    get_settings.cache_clear()


def parameters(**sections: dict[str, object]) -> Params:
    return check_params({"dataset": "pets", "model_name": "pets-classification", **sections})


def test_run__digits_of_the_first_week__goes_from_source_to_features(workspace):
    params = parameters(data_ingestion={"source": "digits", "as_of": "2026-11-01"})
    ingested = data_ingestion.run(params, workspace)
    assert ingested.summary == "897 images, 0 quarantined"
    assert ingested.metrics == {"data/images": 897.0, "data/quarantined": 0.0, "data/classes": 10.0}
    split = data_preprocessing.run(params, workspace)
    counts = [int(split.metrics[f"data/{name}_images"]) for name in ("train", "val", "test")]
    assert sum(counts) == 897
    assert split.summary == "train {} / val {} / test {}".format(*counts)
    features = feature_engineering.run(params, workspace)
    assert features.summary == "12 features"
    statistics = json.loads((workspace.features / "statistics.json").read_text())
    assert statistics["train_images"] == counts[0]
    assert set(statistics["class_weights"]) == set("0123456789")
    train = np.load(workspace.splits / "train.npy")
    assert statistics["mean"] == pytest.approx([train.mean()])


def test_run__colour_folder_of_mixed_sizes__needs_the_parameters_alone(workspace, tmp_path, capsys):
    rng = np.random.default_rng(4)
    for label, count in (("red", 80), ("blue", 30)):
        (tmp_path / "scans" / label).mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(20, 90, size=2)
            pixels = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
            pixels[..., 0 if label == "red" else 2] += 100
            suffix = ("png", "jpg", "bmp", "tif")[number % 4]
            Image.fromarray(pixels).save(tmp_path / "scans" / label / f"{number}.{suffix}")
    (tmp_path / "scans" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    params = parameters(
        data_ingestion={"source": "scans"},
        data_preprocessing={"size_px": 32, "channels": 3, "resize": "pad", "min_images_per_class": 1},
    )
    assert data_ingestion.run(params, workspace).summary == "110 images, 1 quarantined (1 truncated)"
    said = capsys.readouterr().err
    assert "quarantined: red/broken.jpg (truncated: " in said
    assert "`perch quarantine run-1` lists them all" in said
    data_preprocessing.run(params, workspace)
    result = feature_engineering.run(params, workspace)
    assert {"train/mean_r", "train/mean_g", "train/mean_b"} <= set(result.metrics)
    statistics = json.loads((workspace.features / "statistics.json").read_text())
    assert statistics["class_weights"]["blue"] > 1 > statistics["class_weights"]["red"]


def test_run__again_in_another_workspace__gives_the_same_bytes(workspace, tmp_path):
    params = parameters(data_ingestion={"source": "digits", "as_of": "2026-11-01"})
    second = Workspace(tmp_path / "elsewhere")
    trees = []
    for each in (workspace, second):
        results = [stage.run(params, each) for stage in (data_ingestion, data_preprocessing, feature_engineering)]
        files = {file.relative_to(each.root): file.read_bytes() for file in each.root.rglob("*") if file.is_file()}
        trees.append((results, files))
    assert trees[0] == trees[1]


def test_run__twice_in_one_workspace__replaces_what_was_there(workspace):
    for as_of in ("2026-11-08", "2026-11-01"):
        params = parameters(data_ingestion={"source": "digits", "as_of": as_of})
        data_ingestion.run(params, workspace)
        data_preprocessing.run(params, workspace)
    names = {shard["name"] for shard in json.loads((workspace.raw / "manifest.json").read_text())["shards"]}
    assert {file.name for file in workspace.raw.glob("*.parquet")} == names
