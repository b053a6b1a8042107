"""A real Kubernetes for these tests: a control plane alone, or one with a node, a gateway, Prometheus and S3."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.release.keys import create_key
from pipelines.settings import Settings
from tests.cluster.installed import installed, object_store
from tests.cluster.kubernetes_cluster import SCRIPTS, Cluster, why_not
from tests.cluster.kubernetes_rig import KubernetesRig
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
def phases() -> Phases:
    return _PHASES


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
    if (_NODE_RUN / "pids").exists():  # another run's: what ends this one's would end it
        pytest.fail(
            f"a cluster is in {_NODE_RUN} already; where nobody needs it: bash {SCRIPTS}/down.sh", pytrace=False
        )
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
    with object_store("releases", "predictions") as endpoint:
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
        create_key(settings)
        first, second = (make_release(settings, staged_release, version) for version in ("1", "2"))
        with installed(cluster, settings, IMAGE, folder) as chart:
            yield KubernetesRig(chart.settings, first, second, chart.told, cluster, chart.gateway, settings.home)


@pytest.fixture
def settled(rig: KubernetesRig) -> KubernetesRig:
    rig.settle()
    return rig
