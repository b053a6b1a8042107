"""The S3 source against a real S3-speaking server process."""

import io
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from PIL import Image

from pipelines.core.contract import InputContract
from pipelines.core.free_ports import any_free_port
from pipelines.data.ingestion import Ingested, ingest
from pipelines.data.shards import read_metadata
from pipelines.data.sources.opening import open_source
from pipelines.errors import Refusal, TryLater
from pipelines.params import DataIngestionParams
from pipelines.settings import Settings

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"http://127.0.0.1:{any_free_port()}"
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rpartition(":")[2]],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/moto-api/data.json", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, Path(log.name).read_text()
                time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait(10)
        log.close()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"scans-{abs(hash(request.node.name))}"
    made = boto3.resource("s3", endpoint_url=endpoint).Bucket(name)
    made.create()
    return made


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def fill(bucket: Any, prefix: str, count: int = 5) -> dict[str, bytes]:
    files = {f"{label}/{n:03d}.png": png(100 * n + len(label)) for label in ("cat", "horse") for n in range(count)}
    for key, content in files.items():
        bucket.put_object(Key=prefix + key, Body=content)
    return files


@pytest.fixture
def read(endpoint: str, tmp_path: Path) -> Callable[..., Ingested]:
    def run(source: str, name: str = "run", endpoint_url: str = endpoint, **params: Any) -> Ingested:
        ingestion = DataIngestionParams(source=source, **params)
        (tmp_path / name).mkdir(exist_ok=True)
        return ingest(
            open_source(ingestion, Settings(home=tmp_path / "home", s3_endpoint_url=endpoint_url)),
            ingestion,
            InputContract(size_px=8, channels=1, resize="squash"),
            dataset="pets",
            raw=tmp_path / name / "raw",
            quarantine_file=tmp_path / name / "quarantine.parquet",
            cache_dir=tmp_path / "home" / "ingest-cache",
            threads=2,
        )

    return run


@pytest.mark.parametrize("slash", ["", "/"])
def test_s3_source__prefix_of_class_folders__reads_what_a_folder_would(bucket, read, tmp_path, slash):
    files = fill(bucket, "2026/scans/")
    bucket.put_object(Key="2026/scans-other/cat/000.png", Body=b"another prefix")
    result = read(f"s3://{bucket.name}/2026/scans{slash}")
    assert result.manifest.labels == {"cat": 5, "horse": 5}
    assert read_metadata(tmp_path / "run" / "raw")["key"].to_pylist() == sorted(files)
    assert result.manifest.source == f"s3://{bucket.name}/2026/scans{slash}"


def test_s3_source__more_objects_than_one_page__lists_them_all(bucket, read):
    fill(bucket, "", count=505)
    assert read(f"s3://{bucket.name}").manifest.rows == 1010


def test_s3_source__second_run__reads_only_new_and_changed_objects(bucket, read):
    fill(bucket, "scans/")
    assert read(f"s3://{bucket.name}/scans/").images_read == 10
    assert read(f"s3://{bucket.name}/scans/").images_read == 0
    bucket.put_object(Key="scans/cat/000.png", Body=png(77))
    bucket.put_object(Key="scans/cat/999.png", Body=png(78))
    assert read(f"s3://{bucket.name}/scans/").images_read == 2


def test_s3_source__empty_class_folder__is_named(bucket, read):
    fill(bucket, "scans/")
    bucket.put_object(Key="scans/unicorn/", Body=b"")
    with pytest.raises(Refusal, match="without images: unicorn"):
        read(f"s3://{bucket.name}/scans/")


def test_s3_source__table__finds_images_beside_it_and_by_full_address(bucket, read, tmp_path):
    fill(bucket, "scans/")
    rows = ["path,label", "cat/000.png,cat", f"s3://{bucket.name}/scans/horse/001.png,horse", "gone.png,cat"]
    bucket.put_object(Key="scans/images.csv", Body="\n".join(rows).encode())
    result = read(f"s3://{bucket.name}/scans/images.csv", max_quarantined_share=0.5)
    assert (result.manifest.rows, result.manifest.quarantined) == (2, 1)
    assert read_metadata(tmp_path / "run" / "raw")["key"].to_pylist() == ["cat/000.png", "horse/001.png"]


def test_s3_source__npz__is_fetched_once_per_version(bucket, read):
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (8, 6, 6), dtype=np.uint8)
    np.savez_compressed(stream, train_images=pixels, train_labels=np.arange(8, dtype=np.uint8)[:, None] % 2)
    bucket.put_object(Key="data.npz", Body=stream.getvalue())
    assert read(f"s3://{bucket.name}/data.npz").manifest.labels == {"0": 4, "1": 4}
    assert read(f"s3://{bucket.name}/data.npz").images_read == 0
    with pytest.raises(Refusal, match="SHA-256"):
        read(f"s3://{bucket.name}/data.npz", sha256="0" * 64)


def test_s3_source__no_such_bucket__is_refused(bucket, read):
    with pytest.raises(Refusal, match="NoSuchBucket"):
        read("s3://there-is-none/scans/")


def test_s3_source__nothing_under_the_prefix__is_refused(bucket, read):
    with pytest.raises(Refusal, match="no sub-folders with images"):
        read(f"s3://{bucket.name}/nothing/")


def test_s3_source__no_server__may_be_tried_later(bucket, read, monkeypatch):
    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "1")  # seconds pass between two
    with pytest.raises(TryLater, match="cannot be reached"):
        read(f"s3://{bucket.name}/scans/", endpoint_url=f"http://127.0.0.1:{any_free_port()}")


def test_s3_source__no_credentials__is_refused_with_the_way_out(bucket, read, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(Refusal, match="AWS_ACCESS_KEY_ID"):
        read(f"s3://{bucket.name}/scans/")
