"""Everything that talks to S3, against a real S3 server behind a proxy that fails: 503, slow, cut off, reset, TLS."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from PIL import Image

from pipelines.batch_prediction.locations import open_location
from pipelines.batch_prediction.prediction import ModelIdentity, predict_source
from pipelines.core.image_limits import ImageLimits
from pipelines.core.release_signing import find_public_keys, verify_file
from pipelines.core.release_unit import release_name
from pipelines.core.workspace import Workspace
from pipelines.data.sources.s3 import S3Store as SourceStore
from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.object_storage import transfers
from pipelines.predictions.stores import S3Store as KeptPredictions
from pipelines.release.artifact_store import open_store
from pipelines.release.keys import create_key
from pipelines.release.publishing import publish_release
from pipelines.settings import Settings
from serving.fetching import fetch_release
from serving.prediction_stores import S3PredictionStore
from tests.integration.s3_fault_proxy import Fault, FaultProxy, make_authority
from tests.integration.s3_server import TIMEOUT_S, make_impatient

pytestmark = pytest.mark.services

BUCKET = "perch"
# `test_fetch` has every fault; of the rest `make test` takes what each use can get wrong by itself.
RESET, SLOW = (pytest.param(fault, marks=pytest.mark.slow) for fault in ("reset", "slow"))
LOST_QUESTIONS = ["503", RESET, SLOW]

each_fault = pytest.mark.parametrize("fault", [*LOST_QUESTIONS, "truncated", "damaged"])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_server, slow_s=3 * TIMEOUT_S)
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(s3_server: str) -> Any:
    """An empty bucket, asked without the proxy."""
    bucket: Any = boto3.resource("s3", endpoint_url=s3_server).Bucket(BUCKET)
    bucket.create()
    bucket.objects.all().delete()
    return bucket


def content_of(bucket: Any, key: str) -> bytes:
    content: bytes = bucket.Object(key).get()["Body"].read()
    return content


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A file of three chunks, named as a release is."""
    content = np.random.default_rng(1).bytes(2_500_000)
    file = tmp_path / release_name(hashlib.sha256(content).hexdigest())
    file.write_bytes(content)
    return file


class Publisher:
    """Publishes a release through an endpoint, and fetches it as a server does."""

    def __init__(self, folder: Path, unit: Path) -> None:
        self.folder, self.unit, self.digest = folder, unit, unit.name.partition(".")[0]
        self.key = create_key(Settings(home=folder / "home"))

    def publish(self, endpoint: str) -> None:
        store = open_store(Settings(home=self.folder, releases_url=f"s3://{BUCKET}/some", s3_endpoint_url=endpoint))
        publish_release(store, self.unit, self.digest, self.key)

    def fetch(self, endpoint: str) -> bytes:
        address = f"s3://{BUCKET}/some/{self.unit.name}"
        fetched = fetch_release(address, self.folder / "cache", s3_endpoint_url=endpoint)
        verify_file(fetched.file, self.digest, fetched.signature, find_public_keys([self.key.public]))
        return fetched.file.read_bytes()


@pytest.fixture
def publisher(tmp_path: Path, unit: Path, bucket: Any) -> Publisher:
    return Publisher(tmp_path, unit)


@pytest.mark.parametrize("fault", LOST_QUESTIONS)
def test_publish__store_fails_twice__is_whole_in_the_end(
    publisher: Publisher, proxy: FaultProxy, bucket: Any, s3_server: str, fault: Fault
) -> None:
    names = {f"some/{publisher.unit.name}", f"some/{publisher.unit.name}.sig"}
    for methods in ("HEAD", "PUT"):
        bucket.objects.all().delete()
        proxy.set(fault, 2, methods)
        publisher.publish(proxy.url)
        assert proxy.left == 0
        assert content_of(bucket, f"some/{publisher.unit.name}") == publisher.unit.read_bytes()
        assert {entry.key for entry in bucket.objects.all()} == names
    signature = content_of(bucket, f"some/{publisher.unit.name}.sig")
    proxy.set(fault, 2, "GET")
    publisher.publish(proxy.url)
    assert proxy.left == 0
    assert content_of(bucket, f"some/{publisher.unit.name}.sig") == signature
    assert publisher.fetch(s3_server) == publisher.unit.read_bytes()


@pytest.mark.parametrize("fault", ["503", "reset", "slow", "truncated", "shortened", "damaged"])
def test_fetch__store_fails_twice__has_every_byte(
    publisher: Publisher, proxy: FaultProxy, s3_server: str, fault: Fault
) -> None:
    publisher.publish(s3_server)
    proxy.set(fault, 2)
    assert publisher.fetch(proxy.url) == publisher.unit.read_bytes()
    assert proxy.left == 0


def test_fetch__answer_drips__is_given_up_in_time(
    publisher: Publisher, proxy: FaultProxy, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One byte every 50 ms never runs into a timeout between two bytes.
    monkeypatch.setattr(transfers, "_SLOWEST_BYTES_PER_S", 5_000_000)
    publisher.publish(s3_server)
    proxy.set("drip", 2, "GET")
    began = time.monotonic()
    assert publisher.fetch(proxy.url) == publisher.unit.read_bytes()
    assert 2 * TIMEOUT_S < time.monotonic() - began < 60


def test_fetch__object_was_replaced_by_another__is_refused_by_its_name(
    publisher: Publisher, proxy: FaultProxy, s3_server: str, bucket: Any
) -> None:
    publisher.publish(s3_server)
    bucket.put_object(Key=f"some/{publisher.unit.name}", Body=b"another")
    with pytest.raises(Refusal, match="was changed: its bytes have SHA-256"):
        publisher.fetch(proxy.url)


@each_fault
def test_each_use__store_fails_all_the_time__says_which_and_to_try_later(
    publisher: Publisher, proxy: FaultProxy, s3_server: str, bucket: Any, tmp_path: Path, fault: Fault, monkeypatch
) -> None:
    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "2")
    publisher.publish(s3_server)
    bucket.put_object(Key="predictions/day/1.parquet", Body=b"x" * 1000)
    uses: dict[str, Callable[[], object]] = {
        f"the artifact store s3://{BUCKET}": lambda: publisher.fetch(proxy.url),
        f"the source s3://{BUCKET}/predictions/": lambda: SourceStore(BUCKET, "predictions", proxy.url).read(
            "day/1.parquet", 9**9
        ),
        f"s3://{BUCKET}/predictions/": lambda: KeptPredictions(BUCKET, "predictions", proxy.url).fetch(
            ["day/1.parquet"], tmp_path
        ),
    }
    if fault == "damaged":  # what is damaged each time is a changed object to whoever verifies it
        fetch = uses.pop(f"the artifact store s3://{BUCKET}")
        proxy.set(fault, 1000)
        with pytest.raises(Refusal, match="was changed: its bytes have SHA-256"):
            fetch()
    if fault in {"503", "reset", "slow"}:
        uses |= {
            f"the artifact store s3://{BUCKET}/some/": lambda: publisher.publish(proxy.url),
            f"the store of predictions s3://{BUCKET}/kept/": lambda: S3PredictionStore(BUCKET, "kept", proxy.url).put(
                "a", b"b"
            ),
        }
    for name, use in uses.items():
        proxy.set(fault, 1000)
        began = time.monotonic()
        with pytest.raises(TryLater, match=r"(?s)^" + name + r" (answers|cannot be reached).*what to do: try again"):
            use()
        assert time.monotonic() - began < 6 * TIMEOUT_S + 20


@pytest.mark.parametrize("fault", LOST_QUESTIONS)
def test_shipping__store_fails_once__says_so_at_once_and_the_next_try_stores(
    proxy: FaultProxy, bucket: Any, fault: Fault
) -> None:
    store = S3PredictionStore(BUCKET, "shipped", proxy.url)  # a late question may still arrive among later tests
    content = np.random.default_rng(2).bytes(300_000)
    proxy.set(fault)
    with pytest.raises(TryLater, match="the store of predictions"):
        store.put("day=1/a.parquet", content)
    assert len(proxy.seen) == 1
    store.put("day=1/a.parquet", content)
    assert content_of(bucket, "shipped/day=1/a.parquet") == content


@each_fault
def test_kept_predictions__store_fails_twice__are_listed_and_read_whole(
    proxy: FaultProxy, bucket: Any, tmp_path: Path, fault: Fault
) -> None:
    files = {f"day={day}/{n}.parquet": np.random.default_rng(n).bytes(9000) for day in (1, 2) for n in (1, 2, 3)}
    for path, content in files.items():
        bucket.put_object(Key=f"kept/{path}", Body=content)
    store = KeptPredictions(BUCKET, "kept", proxy.url)
    if fault != "damaged":  # nothing vouches for the bytes of a listing
        proxy.set(fault, 2)
    assert sorted(store.list_folder("day=1")[1]) == ["1.parquet", "2.parquet", "3.parquet"]
    proxy.set(fault, 2)
    copies = store.fetch(list(files), tmp_path)
    assert [copy.read_bytes() for copy in copies] == list(files.values())


@each_fault
def test_batch_prediction__store_fails_twice__no_image_is_called_unreadable(
    proxy: FaultProxy, bucket: Any, tmp_path: Path, make_run: Callable[..., Workspace], fault: Fault
) -> None:
    for index in range(12):
        file = tmp_path / "image.png"
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (30, 30), dtype=np.uint8)).save(file)
        bucket.put_object(Key=f"scans/{index:02d}.png", Body=file.read_bytes())
    proxy.set(fault, 2)
    out = tmp_path / "predictions.parquet"
    settings = Settings(home=tmp_path / "home", s3_endpoint_url=proxy.url)
    if fault == "damaged":  # only the images carry a checksum
        proxy.set(fault, 0)
    source = open_location(f"s3://{BUCKET}/scans", settings, path_column="path", out=out)
    proxy.set(fault, 2)
    identity, model = ModelIdentity("shapes", "1", "0" * 64), make_run().model / "model.onnx"
    found = predict_source(source, model, identity, out, limits=ImageLimits(), threads=2, name="scans")
    assert found.summary.startswith("12 predicted")
    assert not found.errors


def test_local_copy__answer_is_cut_off__is_fetched_again_and_kept_once(
    proxy: FaultProxy, bucket: Any, tmp_path: Path
) -> None:
    content = np.random.default_rng(3).bytes(2_000_000)
    bucket.put_object(Key="sets/all.npz", Body=content)
    store = SourceStore(BUCKET, "sets", proxy.url)
    proxy.set("truncated", 2, "GET")
    kept = store.local_copy("all.npz", tmp_path / "cache")
    assert kept.read_bytes() == content
    asked = len(proxy.seen)
    assert store.local_copy("all.npz", tmp_path / "cache") == kept
    assert proxy.seen[asked:] == [("HEAD", f"/{BUCKET}/sets/all.npz")]


def test_each_use__endpoint_of_its_own__puts_the_bucket_into_the_path(publisher: Publisher, proxy: FaultProxy) -> None:
    publisher.publish(proxy.url)
    publisher.fetch(proxy.url)
    SourceStore(BUCKET, "some", proxy.url).list_tree()
    KeptPredictions(BUCKET, "some", proxy.url).list_folder("day")
    S3PredictionStore(BUCKET, "kept", proxy.url).put("a", b"b")
    assert len(proxy.seen) >= 8
    assert {path.split("?")[0].split("/")[1] for _, path in proxy.seen} == {BUCKET}


@pytest.fixture
def tls(s3_server: str, tmp_path: Path) -> Iterator[tuple[FaultProxy, Path]]:
    bundle, context = make_authority(tmp_path)
    proxy = FaultProxy(s3_server, context)
    yield proxy, bundle
    proxy.close()


def test_tls__private_authority_in_the_bundle__everything_works_and_a_stranger_does_not(
    publisher: Publisher, tls: tuple[FaultProxy, Path], bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy, bundle = tls
    uses: list[Callable[[], object]] = [
        lambda: publisher.publish(proxy.url),
        lambda: publisher.fetch(proxy.url),
        lambda: SourceStore(BUCKET, "some", proxy.url).list_tree(),
        lambda: KeptPredictions(BUCKET, "some", proxy.url).list_folder("day"),
        lambda: S3PredictionStore(BUCKET, "kept", proxy.url).put("a", b"b"),
    ]
    for use in uses:
        with pytest.raises(Refusal, match=r"(?s)TLS failed.*what to do: PERCH_S3_CA_BUNDLE names the PEM file"):
            use()
    assert not proxy.seen, "somebody asked without trusting"
    monkeypatch.setenv("PERCH_S3_CA_BUNDLE", str(bundle))
    for use in uses:
        use()
    assert content_of(bucket, "kept/a") == b"b"
    assert publisher.fetch(proxy.url) == publisher.unit.read_bytes()


def test_tls__wrong_scheme__names_the_other_one(proxy: FaultProxy, bucket: Any) -> None:
    with pytest.raises(Refusal, match="write http:// in PERCH_S3_ENDPOINT_URL"):
        SourceStore(BUCKET, "some", proxy.url.replace("http:", "https:")).list_tree()


def test_source__object_vanished_or_forbidden__is_the_objects_fault_alone(proxy: FaultProxy, bucket: Any) -> None:
    with pytest.raises(OSError, match="NoSuchKey") as caught:
        SourceStore(BUCKET, "some", proxy.url).read("gone.png", 100)
    assert not isinstance(caught.value, PerchError)


def test_source__larger_than_the_limit__brings_one_byte_more_and_no_error(proxy: FaultProxy, bucket: Any) -> None:
    bucket.put_object(Key="some/large.png", Body=b"x" * 3_000_000)
    store = SourceStore(BUCKET, "some", proxy.url)
    assert store.read("large.png", 10) == b"x" * 11
    assert len(store.read("large.png", 2_999_999)) == 3_000_000
    assert len(store.read("large.png", 9_000_000)) == 3_000_000
