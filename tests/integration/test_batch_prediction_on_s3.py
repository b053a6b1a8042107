"""Batch prediction from an S3-speaking server: a prefix, and a table in it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from pipelines.batch_prediction.locations import open_location
from pipelines.batch_prediction.prediction import Predicted, predict_source
from pipelines.batch_prediction.rows import ModelIdentity
from pipelines.core.free_ports import any_free_port
from pipelines.core.image_limits import ImageLimits
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.settings import Settings

pytestmark = pytest.mark.services


IMAGES = 150


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port := any_free_port(), verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small images, flat and nested, by key."""
    found, file = {}, tmp_path_factory.mktemp("images") / "image.png"
    for index in range(IMAGES):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (9, 9), dtype=np.uint8)).save(file)
        found[f"{'nested/' if index % 2 else ''}{index:03d}.png"] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def bucket(endpoint: str, images: dict[str, bytes]) -> str:
    name = "scans"
    bucket: Any = boto3.resource("s3", endpoint_url=endpoint).Bucket(name)
    bucket.create()
    for key, content in images.items():
        bucket.put_object(Key=f"new/{key}", Body=content)
    bucket.put_object(Key="new/images.csv", Body=b"path\n001.png\nnested/001.png\n")
    bucket.put_object(Key="newer/x.png", Body=b"another prefix")
    return name


@pytest.fixture
def predict(endpoint: str, make_run: Callable[..., Workspace], tmp_path: Path) -> Callable[..., Predicted]:
    model_file = make_run().model / "model.onnx"

    def run(location: str, name: str = "predictions.parquet") -> Predicted:
        out = tmp_path / name
        settings = Settings(home=tmp_path / "home", s3_endpoint_url=endpoint)
        source = open_location(location, settings, path_column="path", out=out)
        identity = ModelIdentity("shapes", "1", "0" * 64)
        return predict_source(source, model_file, identity, out, limits=ImageLimits(), threads=2, name=location)

    return run


@pytest.mark.parametrize("slash", ["", "/"])
def test_s3__prefix__gives_what_a_folder_would(
    slash: str, bucket: str, images: dict[str, bytes], predict: Callable[..., Predicted], tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    for key, content in images.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)
    (folder / "images.csv").write_bytes(b"path\n001.png\nnested/001.png\n")
    predict(str(folder), "here.parquet")
    predicted = predict(f"s3://{bucket}/new{slash}", "there.parquet")
    assert predicted.summary == f"{IMAGES} predicted, 1 unreadable: 1 not_an_image"
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()


def test_s3__table__finds_its_images(bucket: str, predict: Callable[..., Predicted], tmp_path: Path) -> None:
    assert predict(f"s3://{bucket}/new/images.csv").errors == {"unreadable": 1}
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [(row["key"], row["error"]) for row in rows] == [("001.png", "unreadable"), ("nested/001.png", None)]


def test_s3__nothing_under_the_prefix__is_refused(bucket: str, predict: Callable[..., Predicted]) -> None:
    with pytest.raises(Refusal, match="holds no file"):
        predict(f"s3://{bucket}/nothing")
