"""A release from the registry to a server: packaged into a bucket, fetched, verified, served; and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from pipelines.core.release_signing import key_id
from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER, Refusal, TryLater
from pipelines.params import Params
from pipelines.registry.registration import register
from pipelines.release import keys
from pipelines.release.artifact_store import open_store
from pipelines.services.stack import any_free_port
from pipelines.settings import Settings
from pipelines.stages.model_packaging import Package, package_version

pytestmark = pytest.mark.services

BUCKET = "releases"
MODEL = "shapes-classification"
START_LIMIT_S = 60.0  # 2 s on an idle machine
AWAY = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port := any_free_port(), verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        address = f"http://127.0.0.1:{port}"
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket=BUCKET)
        yield address
    server.stop()


@dataclass(frozen=True)
class Released:
    """A release in the bucket, and what a server is told about it."""

    package: Package
    settings: Settings
    public: Path
    cache: Path

    @property
    def log(self) -> Path:
        """What the last server said."""
        return self.cache.with_name("server.log")

    def start(self, *arguments: str, **settings: str) -> "subprocess.Popen[bytes]":
        """Start a server in a session of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_")}
        given = {"WORKERS": "1", "AUTHENTICATION": "off", "CACHE_DIR": str(self.cache), "HOST": "127.0.0.1"}
        given |= {"SPOOL_DIR": str(self.cache / "spool"), "S3_ENDPOINT_URL": self.settings.s3_endpoint_url} | settings
        environment |= {f"PERCH_SERVING_{name}": value for name, value in given.items()}
        if given["S3_ENDPOINT_URL"] == AWAY:
            environment["PERCH_S3_ATTEMPTS"] = "1"  # seconds pass between two
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "serving", *arguments],
                cwd=Path(__file__).parents[2],
                env=environment,
                stderr=log,
                start_new_session=True,
            )

    def refused(self, *arguments: str, code: int = EXIT_REFUSED, **settings: str) -> str:
        """What a server that does not start says; nothing was unpacked."""
        process = self.start(*arguments, **settings)
        process.wait(START_LIMIT_S)
        said = self.log.read_text()
        assert process.returncode == code, said
        assert not list(self.cache.glob("unpacked/*"))
        return said


@pytest.fixture
def released(
    endpoint: str,
    registry_settings: Settings,
    registry_params: Params,
    make_run: Callable[..., Workspace],
    tmp_path: Path,
) -> Released:
    settings = registry_settings.model_copy(
        update={"releases_url": f"s3://{BUCKET}/some/prefix", "s3_endpoint_url": endpoint}
    )
    register(settings, registry_params, make_run())
    pair = keys.create_key(settings)
    return Released(package_version(settings, MODEL, 1), settings, pair.public, tmp_path / "cache")


def wait_until_ready(released: Released, process: "subprocess.Popen[bytes]", url: str) -> None:
    until = time.monotonic() + START_LIMIT_S
    while True:
        assert process.poll() is None, released.log.read_text()
        assert time.monotonic() < until, released.log.read_text()
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the server as an orchestrator would."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def starts(url: str) -> set[str]:
    """Since when the server's counters count, as they say themselves."""
    return set(re.findall(r'^perch_\w+_total{.*started="([^"]+)"', httpx.get(f"{url}/metrics").text, re.MULTILINE))


def objects_of(released: Released) -> dict[str, Any]:
    """What the bucket holds of a release: key to digest and time."""
    client: Any = boto3.client("s3", endpoint_url=released.settings.s3_endpoint_url)
    listing = client.list_objects_v2(Bucket=BUCKET, Prefix=f"some/prefix/{released.package.digest}")
    return {entry["Key"]: (entry["ETag"], entry["LastModified"]) for entry in listing["Contents"]}


def test_release__packaged_into_a_bucket__is_fetched_verified_and_served(released: Released, tmp_path: Path) -> None:
    package = released.package
    assert package.address == f"s3://{BUCKET}/some/prefix/{package.digest}.bento"
    stored = objects_of(released)
    assert len(stored) == 2
    assert package_version(released.settings, MODEL, 1) == package
    assert objects_of(released) == stored  # neither written again, the signature's bytes would differ

    port = any_free_port()
    url = f"http://127.0.0.1:{port}"
    server = released.start(package.address, "--public-key", str(released.public), "--port", str(port))
    try:
        wait_until_ready(released, server, url)
        # The service reads the manifest beside its own code, so that this is the release's code, although an installed
        # copy of the same packages is on the path.
        model = httpx.get(f"{url}/v1/model").json()
        assert (model["model"], model["version"], model["run_id"]) == (MODEL, "1", "run-1")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.png")
        answer = httpx.post(f"{url}/v1/predict", files={"image": (tmp_path / "image.png").read_bytes()})
        assert answer.status_code == 200, answer.text
        assert answer.json()["label"] in {"circle", "square"}
        (first_start,) = starts(url)
    finally:
        end(server)
    assert f"release {package.digest[:12]} signed by {package.key_id}" in released.log.read_text()

    # The store goes away; what was fetched and verified once is verified again, and serves.
    server = released.start(
        package.address, "--public-key", str(released.public), "--port", str(port), S3_ENDPOINT_URL=AWAY
    )
    try:
        wait_until_ready(released, server, url)
        (second_start,) = starts(url)
        assert first_start < second_start  # so that neither's counters hide behind the other's
    finally:
        end(server)


def test_release__fetched_first__is_served_from_a_read_only_folder_without_the_store(
    released: Released, tmp_path: Path
) -> None:
    package, folder = released.package, tmp_path / "pod" / "release"
    trusted, away = ("--public-key", str(released.public)), AWAY
    fetching = ("--fetch-only", str(folder))
    stranger = keys.create_key(released.settings, "stranger")

    refused = released.refused(package.address, *fetching, "--public-key", str(stranger.public))
    assert "which is not trusted here" in refused
    shutil.rmtree(folder)
    released.refused(package.address, *fetching, *trusted, code=EXIT_TRY_LATER, S3_ENDPOINT_URL=away)

    # As in a pod: what to fetch comes by the environment.
    given = {"RELEASE_DIGEST": package.digest, "PUBLIC_KEYS": str(released.public)}
    prefix = package.address.rpartition("/")[0]
    fetched = released.refused(*fetching, code=0, RELEASE_URL=prefix, **given)
    assert f"release {package.digest[:12]} signed by {package.key_id}" in fetched
    assert {file.name for file in folder.iterdir()} == {f"{package.digest}.bento", f"{package.digest}.bento.sig"}
    assert not released.cache.exists()

    folder.chmod(0o555)
    port = any_free_port()
    server = released.start("--port", str(port), RELEASE_URL=str(folder), S3_ENDPOINT_URL=away, **given)
    try:
        wait_until_ready(released, server, f"http://127.0.0.1:{port}")
    finally:
        end(server)
    assert "verified in" in released.log.read_text()


def test_release__each_way_to_be_wrong__keeps_the_server_from_starting_and_is_named(
    released: Released, tmp_path: Path
) -> None:
    digest, store = released.package.digest, tmp_path / "store"
    store.mkdir()
    source = open_store(released.settings)
    file, signature = store / f"{digest}.bento", store / f"{digest}.bento.sig"
    assert source.get(file.name, file)
    assert source.get(signature.name, signature)
    good = file.read_bytes()
    trusted = ("--public-key", str(released.public))

    assert "limit: at least one" in released.refused(str(file))
    assert "none is named" in released.refused(*trusted)

    file.write_bytes(good[:-1000] + bytes([good[-1000] ^ 1]) + good[-999:])
    assert "was changed: its bytes have SHA-256" in released.refused(str(file), *trusted)
    file.write_bytes(good)

    stranger = keys.create_key(released.settings, "stranger")
    said = released.refused(str(file), "--public-key", str(stranger.public))
    assert f"is signed with the key {key_id(released.public)}, which is not trusted here" in said

    signature.rename(store / "aside")
    assert "has no signature" in released.refused(str(file), *trusted)
    signature.write_text(json.dumps(json.loads((store / "aside").read_text()) | {"dsseEnvelope": {}}))
    assert "its signature does not fit it" in released.refused(str(file), *trusted)
    shutil.copy(store / "aside", signature)

    # Another release under the same signature: a file that the key never signed.
    assert "is not the expected one" in released.refused(str(file), "--digest", "0" * 64, *trusted)
    shutil.rmtree(released.cache)
    away = released.refused(released.package.address, *trusted, code=EXIT_TRY_LATER, S3_ENDPOINT_URL=AWAY)
    assert "cannot be reached" in away
    absent = f"s3://{BUCKET}/elsewhere/{digest}.bento"
    assert "does not exist" in released.refused(absent, *trusted)


def test_bucket__missing_or_away__is_refused_or_told_to_try_later(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_S3_ATTEMPTS", "1")  # seconds pass between two
    file = tmp_path / "file"
    file.write_bytes(b"content")
    missing = Settings(home=tmp_path, releases_url="s3://no-such-bucket/x", s3_endpoint_url=endpoint)
    with pytest.raises(Refusal, match="NoSuchBucket"):
        open_store(missing).put("name", file)
    away = missing.model_copy(update={"s3_endpoint_url": AWAY})
    with pytest.raises(TryLater, match="cannot be reached"):
        open_store(away).put("name", file)
