"""Folders of small PNGs, a model that takes 8 x 8 grey images, and a batch prediction of the one by the other."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.batch_prediction.locations import open_location
from pipelines.batch_prediction.prediction import Predicted, predict_source
from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.image_limits import ImageLimits
from pipelines.core.workspace import Workspace
from pipelines.settings import Settings

Predict = Callable[..., Predicted]


def png(seed: int, size_px: int = 12) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size_px, size_px), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A nested folder of many files; few of them differ, because making them is slow."""

    def make(images: int, name: str = "scans") -> Path:
        different = tmp_path / f"different-{name}"
        different.mkdir()
        for seed in range(50):
            (different / f"{seed}.png").write_bytes(png(seed))
        folder = tmp_path / name
        for index in range(images):
            file = folder / f"day-{index % 3}" / f"{index:05d}.png"
            if index < 3:
                file.parent.mkdir(parents=True)
            os.link(different / f"{index % 50}.png", file)
        return folder

    return make


@pytest.fixture
def model_file(make_run: Callable[..., Workspace]) -> Path:
    return make_run().model / "model.onnx"


def identify(model_file: Path, version: str = "1") -> ModelIdentity:
    return ModelIdentity("shapes-classification", version, hashlib.sha256(model_file.read_bytes()).hexdigest())


@pytest.fixture
def predict(tmp_path: Path, model_file: Path) -> Predict:
    def run(location: Path | str, out: Path | None = None, **changes: Any) -> Predicted:
        out = out or tmp_path / "predictions.parquet"
        settings = Settings(home=tmp_path / "home")
        source = open_location(str(location), settings, path_column=changes.pop("path_column", "path"), out=out)
        source = changes.pop("wrap", lambda inner: inner)(source)
        given = {"limits": ImageLimits(), "threads": 2, "name": str(location)} | changes
        return predict_source(source, model_file, given.pop("identity", identify(model_file)), out, **given)

    return run
