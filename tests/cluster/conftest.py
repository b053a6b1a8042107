"""A real Kubernetes for these tests: a control plane alone, or one with a node, a gateway, Prometheus and S3."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from moto.server import ThreadedMotoServer

from pipelines.release.keys import create_key
from pipelines.services.secrets import api_keys_file, ensure_demo_key
from pipelines.services.stack import any_free_port
from pipelines.settings import Settings
from tests.cluster.gateway import AdminApi, Gateway
from tests.cluster.installation import API_KEYS, OBJECT_STORE, RELEASE, chart_objects, secret
from tests.cluster.kubernetes_cluster import HOST_SEEN_FROM_PODS, Cluster, why_not
from tests.cluster.kubernetes_rig import KubernetesRig, make_bucket, prometheus
from tests.integration.conftest import staged_release  # noqa: F401 - a fixture of these tests too
from tests.integration.release_target_behaviour import PROJECT, make_release
from tests.missing_parts import miss

NAMESPACE = "perch"
IMAGE, ARCHIVE = os.environ.get("PERCH_SERVING_IMAGE", ""), os.environ.get("PERCH_SERVING_ARCHIVE", "")
_NODE_RUN = Path(tempfile.gettempdir()) / "perch-kube"


class Phases:
    """What took how long, said at the end."""

    def __init__(self) -> None:
        self.took: list[tuple[str, float]] = []
        self._since = time.monotonic()

    def end(self, name: str) -> None:
        now = time.monotonic()
        self.took.append((name, now - self._since))
        self._since = now


_PHASES = Phases()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, took_s in _PHASES.took:
        terminalreporter.write_line(f"{took_s:7.1f} s  {name}")


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server with controllers and a scheduler; no pod ever runs."""
    if reason := why_not():
        miss("no Kubernetes can be started here", reason)
    cluster = Cluster(tmp_path_factory.mktemp("control-plane") / "run", node=False)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node, which has the image of the service."""
    if reason := why_not():
        miss("no Kubernetes can be started here", reason)
    if not IMAGE:
        miss("PERCH_SERVING_IMAGE and PERCH_SERVING_ARCHIVE name no image", "`make cluster-test` makes one")
    cluster = Cluster(_NODE_RUN, node=True)
    _PHASES.end("tests without a node")
    try:
        cluster.start()
        _PHASES.end("cluster up")
        cluster.load_image(Path(ARCHIVE))
        _PHASES.end("image given to the node")
        yield cluster
    finally:
        _PHASES.end("release tests on the cluster")
        cluster.stop()
        _PHASES.end("cluster down")


@pytest.fixture(scope="session")
def rig(
    cluster: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
    staged_release: Path,  # noqa: F811 - the fixture
) -> Iterator[KubernetesRig]:
    """The chart's objects, a gateway, Prometheus and an S3 store; nothing is released yet."""
    folder = tmp_path_factory.mktemp("perch-on-a-cluster")
    store = ThreadedMotoServer("0.0.0.0", port := any_free_port(), verbose=False)
    store.start()
    credentials = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    endpoint = f"http://{HOST_SEEN_FROM_PODS}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in credentials.items():
            environment.setenv(name, value)
        settings = Settings(
            project_dir=PROJECT,
            home=folder / "home",
            target="kubernetes",
            kubernetes_namespace=NAMESPACE,
            s3_endpoint_url=endpoint,
            releases_url="s3://releases/perch",
            predictions_url="s3://predictions/perch",
        )
        settings.home.mkdir()
        for bucket in ("releases", "predictions"):
            make_bucket(endpoint, bucket)
        create_key(settings)
        ensure_demo_key(settings)
        first, second = (make_release(settings, staged_release, version) for version in ("1", "2"))
        cluster.kubectl("create", "namespace", NAMESPACE)
        given = [
            secret(NAMESPACE, API_KEYS, {"api-keys.json": api_keys_file(settings).read_bytes()}),
            secret(NAMESPACE, OBJECT_STORE, {name: value.encode() for name, value in credentials.items()}),
        ]
        store_values = {"endpointUrl": endpoint, "region": credentials["AWS_DEFAULT_REGION"]}
        urls = {"releasesUrl": settings.releases_url, "predictionsUrl": settings.predictions_url}
        public_key = (settings.keys_dir / "release.pub").read_text()
        chart = chart_objects(NAMESPACE, IMAGE, public_key=public_key, objectStore={**store_values, **urls})
        cluster.apply([*given, *chart])
        # Whoever moves releases may do what the chart's Role says, and nothing else.
        environment.setenv("KUBECONFIG", str(cluster.kubeconfig_of(NAMESPACE, f"{RELEASE}-engine")))
        admin = AdminApi(NAMESPACE, str(cluster.kubeconfig))
        try:
            with (
                Gateway(folder / "gateway", admin) as gateway,
                prometheus(folder / "prometheus", admin) as prometheus_url,
            ):
                own = {"clients_url": gateway.url, "prometheus_url": prometheus_url, "kubernetes_release": RELEASE}
                settings = settings.model_copy(update=own)
                told = _ask_before_any_release(gateway)
                yield KubernetesRig(settings, first, second, told, cluster, gateway, settings.home)
        finally:
            store.stop()


@pytest.fixture
def settled(rig: KubernetesRig) -> KubernetesRig:
    rig.settle()
    return rig


def _ask_before_any_release(gateway: Gateway) -> httpx.Response:
    deadline = time.monotonic() + 10
    while True:
        try:
            return httpx.get(f"{gateway.url}/v1/model", headers={"X-Request-ID": "a-question"})
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
