"""The chart in Helm's own hands, on a real API server: installed, upgraded, rolled back and removed under releases.

There is no node.  Two doubles stand for it: one writes into the status of each pod what a kubelet would, and one runs
the setup Job's script, as it lies in the cluster, with the arguments and the account of the Job.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from helm_python import Chart, Config, HelmError
from kubernetes.client import ApiException

from pipelines.errors import TryLater
from pipelines.release.kubernetes_api import ROUTES
from pipelines.release.kubernetes_target import KubernetesTarget
from pipelines.release.targets import Routing, Slot
from pipelines.settings import Settings
from tests.cluster.gateway import AdminApi
from tests.cluster.installation import RELEASE
from tests.cluster.kubernetes_cluster import Cluster
from tests.cluster.test_kubernetes_control_plane import ROUTE, Installation, _accept_routes, ref
from tests.helm import rendering
from tests.helm.rendering import CHART, SERVERS

pytestmark = [pytest.mark.cluster, pytest.mark.services, pytest.mark.timeout(300)]

# What is not Helm's to write: `kubectl scale`, the autoscaler and the engine do.
BY_THE_ENGINE = ("perch/plan", "perch/deployed-at", "perch/stable", "perch/canary")


@dataclass
class Helm:
    """Helm on a namespace."""

    config: Config
    namespace: str

    def values(self, tag: str) -> dict[str, Any]:
        return rendering.values_of(
            "dev",
            images={"tag": tag},
            route={"parentRefs": [{"name": "clients"}]},
            mlflow={"enabled": False},
            watchdog={"enabled": False},
            # A control plane runs no pod, but it accepts what the larger environments have.
            autoscaling={"enabled": True, "minReplicas": 1},
            podDisruptionBudget={"enabled": True},
            networkPolicy={"enabled": True},
        )

    def install(self, tag: str) -> None:
        with Chart.load(CHART) as chart:
            self.config.install(chart, RELEASE, self.values(tag), namespace=self.namespace)

    def upgrade(self, tag: str) -> None:
        with Chart.load(CHART) as chart:
            self.config.upgrade(chart, RELEASE, self.values(tag), namespace=self.namespace)


@dataclass
class Installed(Installation):
    """The chart as Helm installed it."""

    kubeconfig: Path  # of the engine's account
    folder: Path

    def revisions(self) -> list[int]:
        """Those that Helm has kept, in Secrets of its own."""
        kept = json.loads(self.kubectl("get", "secrets", "--selector=owner=helm", "--output=json"))["items"]
        return sorted(int(secret["metadata"]["labels"]["version"]) for secret in kept)

    def jobs(self) -> dict[str, str]:
        """Name of each setup Job, and its identity."""
        found = json.loads(self.kubectl("get", "jobs", "--output=json"))["items"]
        return {job["metadata"]["name"]: job["metadata"]["uid"] for job in found}

    def run_setup_job(self, revision: int) -> str:
        """What the Job's pod does, with the rights that it has; what it printed."""
        job = json.loads(self.kubectl("get", "job", f"{RELEASE}-setup-{revision}", "--output=json"))
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert spec["serviceAccountName"] == f"{RELEASE}-engine"
        interpreter, script = container["command"]
        (volume,) = (known for known in spec["volumes"] if "configMap" in known)
        texts = json.loads(self.kubectl("get", "configmap", volume["configMap"]["name"], "--output=json"))["data"]
        assert interpreter == "python"
        # Where a pod finds its account is no place of this machine's.
        account = self.folder / "account"
        account.mkdir(exist_ok=True)
        text = texts[Path(script).name].replace("/var/run/secrets/kubernetes.io/serviceaccount", str(account))
        tree = yaml.safe_load(self.kubeconfig.read_text())
        cluster = tree["clusters"][0]["cluster"]
        (account / "ca.crt").write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
        (account / "token").write_text(tree["users"][0]["user"]["token"])
        address = urlsplit(cluster["server"])
        where = {"KUBERNETES_SERVICE_HOST": str(address.hostname), "KUBERNETES_SERVICE_PORT": str(address.port)}
        done = subprocess.run(
            [sys.executable, "-c", text, *container["args"]],
            env={"PATH": os.environ["PATH"], **where},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def decided_by_the_engine(self) -> dict[str, Any]:
        """Replicas, releases and the route, which is the record of slots and traffic."""
        route = self.route()
        annotations = {key: route["metadata"]["annotations"].get(key) for key in BY_THE_ENGINE}
        found: dict[str, Any] = {"route": (route["spec"], annotations, route["metadata"]["uid"])}
        for server in SERVERS:
            spec = self.deployment(server)["spec"]
            released = spec["template"]["metadata"]["annotations"]
            found[server] = spec["replicas"], {key: released[key] for key in released if key.startswith("perch/")}
        return found

    def images(self, server: str) -> set[str]:
        """Of the pods that there are, each seen through the API."""
        pods = self.api.list_pods(f"perch/server={server}")
        return {pod["spec"]["containers"][0]["image"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}

    def ready_pods(self, server: str) -> int:
        return int(self.deployment(server).get("status", {}).get("readyReplicas", 0))

    def wait_until_exchanged(self, server: str, image: str) -> int:
        """Until the server's pods all have an image; the fewest that were ready meanwhile."""
        fewest, deadline = self.ready_pods(server), time.monotonic() + 60
        while self.images(server) != {image}:
            fewest = min(fewest, self.ready_pods(server))
            assert time.monotonic() < deadline, self.images(server)
            time.sleep(0.05)
        return fewest


@pytest.fixture
def helm(control_plane: Cluster) -> Iterator[Helm]:
    namespace = f"helm-{secrets.token_hex(3)}"
    control_plane.kubectl("create", "namespace", namespace)
    config = Config(kubeconfig_path=control_plane.kubeconfig, namespace=namespace)
    yield Helm(config, namespace)
    config.close()
    control_plane.kubectl("delete", "namespace", namespace, "--wait=false")


def target_in(namespace: str, home: Path) -> KubernetesTarget:
    """The target, by the account in the file that KUBECONFIG names."""
    return KubernetesTarget(Settings(home=home, target="kubernetes", kubernetes_namespace=namespace))


@pytest.fixture
def installed(
    helm: Helm, control_plane: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Installed]:
    """The chart as Helm installs it, and its Job done."""
    monkeypatch.setattr(KubernetesTarget, "_answers", lambda self, deployment: True)  # there are no pods that could
    helm.install("v1")
    kubeconfig = control_plane.kubeconfig_of(helm.namespace, f"{RELEASE}-engine")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    admin = AdminApi(helm.namespace, str(control_plane.kubeconfig))
    gone = threading.Event()
    made = Installed(control_plane, admin, target_in(helm.namespace, tmp_path), gone, kubeconfig, tmp_path)
    made.run_setup_job(1)
    doubles = [threading.Thread(target=play, args=(made,)) for play in (_accept_routes, _play_kubelet)]
    for double in doubles:
        double.start()
    yield made
    gone.set()
    for double in doubles:
        double.join()


def _play_kubelet(made: Installed) -> None:
    """Says of each pod that it runs and is ready, a while after it was made."""
    seen: dict[str, float] = {}
    while not made.gateway_gone.wait(0.1):
        try:
            for pod in made.api.list_pods("app.kubernetes.io/component=serving"):
                name, status = pod["metadata"]["name"], pod.get("status", {})
                is_ready = any(
                    known["type"] == "Ready" and known["status"] == "True" for known in status.get("conditions") or ()
                )
                if is_ready or time.monotonic() - seen.setdefault(name, time.monotonic()) < 0.5:
                    continue
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                ready = {"type": "Ready", "status": "True", "lastTransitionTime": now}
                made.say(name, {"phase": "Running", "conditions": [ready]})
        except (TryLater, ApiException, RuntimeError):  # it went away meanwhile
            continue


def released(installed: Installed) -> None:
    """The first release has all traffic but 10 %, which the second has."""
    target = installed.target
    target.deploy(Slot.STABLE, ref(1))
    target.wait_ready(Slot.STABLE, 30)
    target.route(Routing())
    target.deploy(Slot.CANARY, ref(2))
    target.wait_ready(Slot.CANARY, 30)
    target.route(Routing(10))


def test_chart__just_installed__rests_until_something_is_released(installed: Installed) -> None:
    assert [installed.deployment(server)["spec"]["replicas"] for server in SERVERS] == [0, 0, 0]
    assert set(installed.jobs()) == {f"{RELEASE}-setup-1"}
    state = installed.target.state()
    assert (dict(state.slots), state.routing) == ({}, Routing())


def test_chart__upgraded_and_rolled_back__exchanges_pods_and_moves_neither_releases_nor_traffic(
    installed: Installed, helm: Helm
) -> None:
    released(installed)
    installed.kubectl("scale", "deployment", f"{RELEASE}-serving-a", "--replicas=4")  # as the autoscaler would
    deadline = time.monotonic() + 30
    while installed.ready_pods("a") != 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before, first_job = installed.decided_by_the_engine(), installed.jobs()
    assert [before[server][0] for server in SERVERS] == [4, 1, 0]

    helm.upgrade("v2")
    assert installed.decided_by_the_engine() == before
    # Pods are exchanged without a moment in which fewer were ready.
    assert installed.wait_until_exchanged("a", "perch-serving:v2") == 4
    assert installed.wait_until_exchanged("b", "perch-serving:v2") == 1
    # One Job for this revision, that of the one before is gone; it finds releases, and leaves them.
    assert set(installed.jobs()) == {f"{RELEASE}-setup-2"}
    said = installed.run_setup_job(2)
    assert said.count("left as it is") == 3
    assert installed.decided_by_the_engine() == before

    # To the first revision, from before anything was released.
    helm.config.rollback(RELEASE, version=1)
    assert installed.decided_by_the_engine() == before
    assert installed.wait_until_exchanged("a", "perch-serving:v1") == 4
    assert installed.revisions() == [1, 2, 3]
    # The manifest is the first revision's, and so is the Job's name; it is another Job, which runs once more.
    again = installed.jobs()
    assert set(again) == set(first_job)
    assert again != first_job
    assert installed.run_setup_job(1).count("left as it is") == 3
    assert installed.decided_by_the_engine() == before

    # The engine goes on where it was.
    installed.target.route(Routing(50))
    assert installed.target.state().routing == Routing(50)
    installed.target.promote()
    assert dict(installed.target.state().slots) == {Slot.STABLE: ref(2), Slot.CANARY: ref(1)}
    after = installed.decided_by_the_engine()
    helm.upgrade("v3")
    assert installed.decided_by_the_engine() == after


def _routes(helm: Helm, cluster: Cluster) -> list[str]:
    found = json.loads(cluster.kubectl("get", "httproutes", "--namespace", helm.namespace, "--output=json"))["items"]
    return [route["metadata"]["name"] for route in found]


def test_chart__whose_first_installation_failed__has_its_route_after_an_upgrade(
    helm: Helm, control_plane: Cluster
) -> None:
    """`helm install --wait` gave up: hooks after an installation did not run, and those of an upgrade have to."""
    with Chart.load(CHART) as chart, pytest.raises(HelmError):
        helm.config.install(chart, RELEASE, helm.values("v1"), namespace=helm.namespace, wait="watcher", timeout=5)
    assert _routes(helm, control_plane) == []
    helm.upgrade("v2")
    assert _routes(helm, control_plane) == [ROUTE]
    helm.upgrade("v3")
    assert _routes(helm, control_plane) == [ROUTE]


def test_chart__under_a_release_whose_record_was_taken_away__does_not_say_that_there_is_none(
    installed: Installed, helm: Helm, control_plane: Cluster
) -> None:
    released(installed)
    before = {server: installed.deployment(server)["spec"]["replicas"] for server in SERVERS}
    record = json.loads(installed.kubectl("get", "httproute", ROUTE, "--output=json"))
    installed.kubectl("delete", "httproute", ROUTE)
    helm.upgrade("v2")
    assert _routes(helm, control_plane) == []
    # Put back, as it has to be, it is what it was.
    for key in ("resourceVersion", "uid", "creationTimestamp", "generation"):
        record["metadata"].pop(key)
    control_plane.apply([record])
    assert dict(installed.target.state().slots) == {Slot.STABLE: ref(1), Slot.CANARY: ref(2)}
    assert installed.target.state().routing == Routing(10)
    assert {server: installed.deployment(server)["spec"]["replicas"] for server in SERVERS} == before


def test_chart__removed_and_installed_again__begins_anew(
    installed: Installed, helm: Helm, control_plane: Cluster
) -> None:
    released(installed)
    helm.config.uninstall(RELEASE)
    # The route goes after the servers that it led to, by its owner references.
    installed.kubectl("wait", "--for=delete", f"httproute/{ROUTE}", "--timeout=60s")
    helm.install("v1")
    # The account has its name again, and is another one: the API server knows the old one's token for seconds at most.
    control_plane.kubeconfig_of(helm.namespace, f"{RELEASE}-engine")
    assert dict(target_in(helm.namespace, installed.folder).state().slots) == {}
    assert installed.api.get(ROUTES, "httproutes", ROUTE)["metadata"]["annotations"]["perch/stable"] == "none"
