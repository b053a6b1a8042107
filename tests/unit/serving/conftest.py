"""What the service's tests share: a release folder around a tiny real model, and images to send."""

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.core.contract import InputContract
from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE, MeasuredMetric, ReleaseManifest
from pipelines.core.workspace import Workspace
from serving.release import Release, load_release

MakeImage = Callable[..., bytes]


@pytest.fixture
def release_folder(tmp_path: Path, make_run: Callable[..., Workspace]) -> Path:
    """As it lies in a Bento: manifest and model."""
    folder = tmp_path / "release"
    folder.mkdir()
    shutil.copyfile(make_run().model / "model.onnx", folder / MODEL_FILE)
    manifest = ReleaseManifest(
        model="shapes-classification",
        version="7",
        labels=("circle", "square"),
        input=InputContract(size_px=8, channels=1, resize="squash"),
        metrics={"test/accuracy": MeasuredMetric(value=0.963, low=0.926, high=0.985)},
        run_id="run-1",
        mlflow_run_id="0a" * 16,
        git_sha="3e9d1c2" + "0" * 33,
        service_git_sha="4f0e2d3" + "0" * 33,
        data_sha256="77ab" * 16,
        onnx_sha256=hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest(),
        registered_at="2026-11-01T02:00:00+00:00",
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def release(release_folder: Path) -> Release:
    return load_release(release_folder)


@pytest.fixture
def make_image() -> MakeImage:
    """Makes the bytes of an image of noise, the same for the same arguments."""

    def make(side_px: int = 12, mode: str = "L", image_format: str = "PNG", seed: int = 0, **options: object) -> bytes:
        channels = len(Image.new(mode, (1, 1)).getbands())
        shape = (side_px, side_px) if channels == 1 else (side_px, side_px, channels)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels, mode=None).save(stream, image_format, **options)
        return stream.getvalue()

    return make
