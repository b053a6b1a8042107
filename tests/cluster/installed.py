"""The chart installed in a namespace, with what its surroundings would bring: S3, a gateway, Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from pipelines.cli import api_keys
from pipelines.release.keys import signing_key
from pipelines.services.secrets import api_keys_file, ensure_demo_key
from pipelines.services.stack import any_free_port
from pipelines.settings import Settings
from tests.cluster.gateway import AdminApi, Gateway
from tests.cluster.installation import API_KEYS, OBJECT_STORE, OWN_KEYS, RELEASE, chart_objects, secret
from tests.cluster.kubernetes_cluster import HOST_SEEN_FROM_PODS, Cluster
from tests.cluster.kubernetes_rig import make_bucket, prometheus

_STORES: dict[int, ThreadedMotoServer] = {}  # by port
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Installed:
    """What stands.

    Attributes:
        settings: of whoever moves releases.
        gateway: in front of it.
        told: what a client was told before there was any release.
    """

    settings: Settings
    gateway: Gateway
    told: httpx.Response


@contextmanager
def object_store(*buckets: str) -> Iterator[str]:
    """An S3 server that pods reach, too; its address.  The environment has its credentials."""
    port = any_free_port()
    _serve_store(port)
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in _CREDENTIALS.items():
                environment.setenv(name, value)
            endpoint = f"http://{HOST_SEEN_FROM_PODS}:{port}"
            for bucket in buckets:
                make_bucket(endpoint, bucket)
            yield endpoint
    finally:
        _STORES.pop(port).stop()


@contextmanager
def killed_store(endpoint: str) -> Iterator[None]:
    """The object store at an address answers nobody until the block ends; it forgets nothing."""
    port = urlsplit(endpoint).port
    assert port is not None
    _STORES.pop(port).stop()
    try:
        yield
    finally:
        _serve_store(port)


def _serve_store(port: int) -> None:
    _STORES[port] = ThreadedMotoServer("0.0.0.0", port, verbose=False)
    _STORES[port].start()


@contextmanager
def installed(
    cluster: Cluster,
    settings: Settings,
    image: str,
    folder: Path,
    *,
    account: str = f"{RELEASE}-engine",
    objects: tuple[dict[str, Any], ...] = (),
    **values: Any,
) -> Iterator[Installed]:
    """Install the chart in the settings' namespace, which is new.

    Args:
        cluster: of one node, which has the image.
        settings: with the addresses of the object store.
        image: of the service.
        folder: new, for what gateway and Prometheus write.
        account: by whose rights `KUBECONFIG` lets others act.
        objects: put into the namespace before the chart's.
        values: further sections of the chart's values.
    """
    namespace = settings.kubernetes_namespace
    settings.home.mkdir(parents=True, exist_ok=True)
    signing_key(settings, make=True)
    ensure_demo_key(settings)
    own_keys = _make_own_keys(settings)
    prometheus_port = any_free_port()
    prometheus_url = f"http://{HOST_SEEN_FROM_PODS}:{prometheus_port}"
    cluster.kubectl("create", "namespace", namespace)
    given = [
        secret(namespace, API_KEYS, {"api-keys.json": api_keys_file(settings).read_bytes()}),
        secret(namespace, OWN_KEYS, {name: value.encode() for name, value in own_keys.items()}),
        secret(namespace, OBJECT_STORE, {name: value.encode() for name, value in _CREDENTIALS.items()}),
        *objects,
    ]
    store = {
        "endpointUrl": settings.s3_endpoint_url,
        "region": _CREDENTIALS["AWS_DEFAULT_REGION"],
        "releasesUrl": settings.releases_url,
        "predictionsUrl": settings.predictions_url,
        **({"runsUrl": settings.runs_url} if settings.runs_url else {}),
    }
    public_key = (settings.keys_dir / "release.pub").read_text()
    cluster.apply(given)
    values = {"objectStore": store, "prometheus": {"url": prometheus_url}, **values}
    cluster.apply(chart_objects(namespace, image, public_key=public_key, **values))
    admin = AdminApi(namespace, str(cluster.kubeconfig))
    with (
        pytest.MonkeyPatch.context() as environment,
        Gateway(folder / "gateway", admin) as gateway,
        prometheus(folder / "prometheus", admin, prometheus_port),
    ):
        # Whoever moves releases may do what the chart's Roles say, and nothing else.
        environment.setenv("KUBECONFIG", str(cluster.kubeconfig_of(namespace, account)))
        own = {"clients_url": gateway.url, "prometheus_url": prometheus_url, "kubernetes_release": RELEASE}
        own |= {name.removeprefix("PERCH_").lower(): key for name, key in own_keys.items()}
        yield Installed(settings.model_copy(update=own), gateway, _ask_before_any_release(gateway))


def _make_own_keys(settings: Settings) -> dict[str, str]:
    """Perch's own keys, as an operator makes them: the variables that hold them."""
    words = ["own", "--file", str(api_keys_file(settings))]
    made = CliRunner().invoke(api_keys.app, words, catch_exceptions=False)
    return dict(line.split("=", 1) for line in made.stdout.splitlines())


def _ask_before_any_release(gateway: Gateway) -> httpx.Response:
    deadline = time.monotonic() + 10
    while True:
        try:
            return httpx.get(f"{gateway.url}/v1/model", headers={"X-Request-ID": "a-question"})
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
