"""What the target writes, held against a real API server; no pod runs, their status is written as a node would."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import ApiException

from pipelines.errors import Refusal, TryLater
from pipelines.release import kubernetes_target
from pipelines.release.kubernetes_api import DEPLOYMENTS, FIELD_MANAGER, ROUTES, Conflict
from pipelines.release.kubernetes_target import KubernetesTarget
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.settings import Settings
from tests.cluster.gateway import AdminApi
from tests.cluster.installation import RELEASE, chart_objects
from tests.cluster.kubernetes_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.services]

ROUTE = "perch-serving"
PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nnobody's\n-----END PUBLIC KEY-----\n"


def ref(version: int) -> ReleaseRef:
    return ReleaseRef("shapes", str(version), f"{version:064x}", f"s3://releases/{version}.bento")


@dataclass
class Installation:
    cluster: Cluster
    api: AdminApi
    target: KubernetesTarget
    gateway_gone: threading.Event

    def route(self) -> dict[str, Any]:
        return self.api.get(ROUTES, "httproutes", ROUTE)

    def deployment(self, server: str) -> dict[str, Any]:
        return self.api.get(DEPLOYMENTS, "deployments", f"{RELEASE}-serving-{server}")

    def kubectl(self, *words: str) -> str:
        return self.cluster.kubectl(f"--namespace={self.api.namespace}", *words)

    def versions(self) -> list[str]:
        """Of everything that the target writes."""
        documents = [self.route(), *(self.deployment(server) for server in ("a", "b", "staging"))]
        return [document["metadata"]["generation"] for document in documents]

    def wait_for_pods(self, server: str, count: int) -> list[str]:
        deadline = time.monotonic() + 20
        while True:
            pods = self.api.list_pods(f"perch/server={server}")
            if len(pods) == count:
                return [pod["metadata"]["name"] for pod in pods]
            assert time.monotonic() < deadline, pods
            time.sleep(0.1)

    def say(self, pod: str, status: dict[str, Any]) -> None:
        """As the node's kubelet would."""
        self.kubectl(
            "patch", "pod", pod, "--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}"
        )

    def make_ready(self, server: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for pod in self.wait_for_pods(server, 1):
            self.say(
                pod,
                {"phase": "Running", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]},
            )

    def release_first(self) -> None:
        """The first release is stable and has all traffic; the second is in the canary's slot."""
        self.target.deploy(Slot.STABLE, ref(1))
        self.make_ready("a")
        self.target.route(Routing())
        self.target.deploy(Slot.CANARY, ref(2))
        self.make_ready("b")


@pytest.fixture
def installation(control_plane: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Installation]:
    """A namespace as the chart leaves it; a gateway that takes every route at once."""
    namespace = f"perch-{secrets.token_hex(3)}"
    # There are no pods that could answer.
    monkeypatch.setattr(KubernetesTarget, "_answers", lambda self, deployment: True)
    control_plane.kubectl("create", "namespace", namespace)
    control_plane.apply(chart_objects(namespace, "perch-serving:v0", public_key=PUBLIC_KEY))
    # The chart's Job does this, and needs a node.
    control_plane.kubectl(f"--namespace={namespace}", "scale", "deployment", "--all", "--replicas=0")
    # As the least that the chart lets whoever moves releases do.
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig_of(namespace, f"{RELEASE}-engine")))
    settings = Settings(home=tmp_path, target="kubernetes", kubernetes_namespace=namespace)
    admin = AdminApi(namespace, str(control_plane.kubeconfig))
    made = Installation(control_plane, admin, KubernetesTarget(settings), threading.Event())
    thread = threading.Thread(target=_accept_routes, args=(made,))
    thread.start()
    try:
        for server in ("a", "b", "staging"):
            made.wait_for_pods(server, 0)
        yield made
    finally:
        made.gateway_gone.set()
        thread.join()
        control_plane.kubectl("delete", "namespace", namespace, "--wait=false")


def _accept_routes(made: Installation) -> None:
    while not made.gateway_gone.wait(0.05):
        try:
            route = made.route()
            condition = {"type": "Accepted", "status": "True", "observedGeneration": route["metadata"]["generation"]}
            status = {"parents": [{"conditions": [condition]}]}
            if route.get("status") != status:
                made.api.merge_status(ROUTES, "httproutes", ROUTE, status)
        except (TryLater, ApiException):  # a test took it away, or wrote it at the same time
            continue


def test_state__chart_just_installed__is_empty(installation: Installation) -> None:
    state = installation.target.state()
    assert (dict(state.slots), state.ready, state.routing) == ({}, frozenset(), Routing())


def test_deploy__twice__writes_once_and_as_one_field_manager(installation: Installation) -> None:
    target = installation.target
    target.deploy(Slot.STABLE, ref(1))
    before = installation.versions()
    target.deploy(Slot.STABLE, ref(1))
    assert installation.versions() == before
    live = installation.deployment("a")
    annotations = live["spec"]["template"]["metadata"]["annotations"]
    assert {key: value for key, value in annotations.items() if key.startswith("perch/")} == {
        "perch/release-url": "s3://releases/1.bento",
        "perch/release-digest": ref(1).digest,
        "perch/release-model": "shapes",
        "perch/release-version": "1",
    }
    assert live["spec"]["replicas"] == 1
    assert [installation.deployment(server)["spec"]["replicas"] for server in ("b", "staging")] == [0, 0]
    for document in (live, installation.route()):
        managers = {
            entry["manager"] for entry in document["metadata"]["managedFields"] if entry["operation"] == "Apply"
        }
        assert FIELD_MANAGER in managers
    assert target.state().slots == {Slot.STABLE: ref(1)}
    assert target.state().ready == frozenset()
    assert target.slot_url(Slot.STABLE).startswith("http://10.")


def test_route__shares_and_copies__are_in_the_rules_of_the_route(installation: Installation) -> None:
    installation.release_first()
    installation.target.route(Routing(10, mirror=True))
    (rule,) = installation.route()["spec"]["rules"]
    assert [(backend["name"], backend["weight"]) for backend in rule["backendRefs"]] == [
        ("perch-serving-a", 90),
        ("perch-serving-b", 10),
    ]
    assert installation.target.state().routing == Routing(10, mirror=True)
    installation.target.promote()
    assert installation.target.state().slots == {Slot.STABLE: ref(2), Slot.CANARY: ref(1)}
    assert installation.route()["metadata"]["annotations"]["perch/stable"] == "b"


def test_route__canary_that_is_not_ready__is_refused(installation: Installation) -> None:
    target = installation.target
    target.deploy(Slot.STABLE, ref(1))
    with pytest.raises(Refusal, match="not ready"):
        target.route(Routing())
    installation.make_ready("a")
    target.route(Routing())
    target.deploy(Slot.CANARY, ref(2))
    with pytest.raises(Refusal, match="not ready"):
        target.route(Routing(10))
    assert target.state().routing == Routing()


def test_apply__of_what_was_read_before_somebody_else_wrote__is_a_conflict(installation: Installation) -> None:
    installation.release_first()
    for group, kind, old in (
        (ROUTES, "httproutes", installation.route()),
        (DEPLOYMENTS, "deployments", installation.deployment("a")),
    ):
        installation.kubectl("annotate", kind, old["metadata"]["name"], "by=somebody")
        metadata = {key: old["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
        document = {"apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": metadata}
        with pytest.raises(Conflict):
            installation.api.apply(group, kind, document)


def test_route__many_callers_at_once__each_ends_with_one_of_their_divisions(installation: Installation) -> None:
    installation.release_first()
    settings, failed = installation.target._settings, []

    def move(percent: int) -> None:
        for _ in range(3):
            try:
                KubernetesTarget(settings).route(Routing(percent))
            except TryLater as error:  # allowed: it may be tried again
                failed.append(str(error))

    threads = [threading.Thread(target=move, args=(10 * number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert installation.target.state().routing in {Routing(10), Routing(20), Routing(30)}
    assert installation.target.state().slots == {Slot.STABLE: ref(1), Slot.CANARY: ref(2)}
    assert len(failed) < 9


def test_state__weights_edited_by_hand__shows_it_and_the_next_routing_puts_it_right(installation: Installation) -> None:
    installation.release_first()
    patch = [{"op": "replace", "path": "/spec/rules/0/backendRefs/0/name", "value": "perch-serving-b"}]
    installation.kubectl("patch", "httproute", ROUTE, "--type=json", f"--patch={json.dumps(patch)}")
    assert installation.target.state().routing == Routing(100)
    with pytest.raises(Refusal, match="has traffic"):
        installation.target.remove(Slot.CANARY)
    installation.target.route(Routing())
    assert installation.target.state().routing == Routing()
    assert installation.route()["spec"]["rules"][0]["backendRefs"][0]["name"] == "perch-serving-a"


def test_state__record_taken_away_by_hand__is_not_taken_for_nothing_released(installation: Installation) -> None:
    installation.release_first()
    installation.kubectl("annotate", "httproute", ROUTE, "perch/plan-")
    with pytest.raises(TryLater, match="perch/plan cannot be read"):
        installation.target.state()
    with pytest.raises(TryLater, match="perch/plan cannot be read"):
        installation.target.route(Routing())


def test_deploy__running_service_scaled_by_others__stays_as_large(installation: Installation) -> None:
    installation.release_first()
    installation.kubectl("scale", "deployment", "perch-serving-a", "--replicas=4")
    installation.target.deploy(Slot.STABLE, ref(1))
    assert installation.deployment("a")["spec"]["replicas"] == 4
    installation.target.remove(Slot.CANARY)
    assert installation.deployment("b")["spec"]["replicas"] == 0
    assert installation.deployment("a")["spec"]["replicas"] == 4


def test_deploy__deployment_edited_by_hand__is_not_ready_and_put_right_by_the_same_call(
    installation: Installation,
) -> None:
    installation.release_first()
    assert installation.target.state().ready == {Slot.STABLE, Slot.CANARY}
    patch = {"spec": {"template": {"metadata": {"annotations": {"perch/release-digest": "f" * 64}}}}}
    installation.kubectl("patch", "deployment", "perch-serving-b", "--type=merge", f"--patch={json.dumps(patch)}")
    installation.target.deploy(Slot.CANARY, ref(2))
    found = installation.deployment("b")["spec"]["template"]["metadata"]["annotations"]
    assert found["perch/release-digest"] == ref(2).digest


def test_wait_ready__release_refused_by_its_pod__is_refused(installation: Installation) -> None:
    installation.release_first()
    installation.target.deploy(Slot.STAGING, ref(3))
    (pod,) = installation.wait_for_pods("staging", 1)
    with pytest.raises(TryLater, match="not ready after"):
        installation.target.wait_ready(Slot.STAGING, 0.5)
    ended = {"exitCode": 65, "reason": "Error"}
    container = {
        "name": "serving",
        "image": "i",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"terminated": ended},
    }
    installation.say(pod, {"containerStatuses": [container]})
    with pytest.raises(Refusal, match="its release was refused"):
        installation.target.wait_ready(Slot.STAGING, 5)


def test_route__no_gateway__says_so_and_is_written_all_the_same(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation.release_first()
    installation.gateway_gone.set()
    time.sleep(0.2)
    monkeypatch.setattr(kubernetes_target, "_IN_FORCE_LIMIT_S", 0.3)
    with pytest.raises(TryLater, match="no gateway takes"):
        installation.target.route(Routing(10))
    assert installation.target.state().routing == Routing(10)


def test_route__deployments_deleted__still_moves_traffic_and_goes_away_with_both(installation: Installation) -> None:
    installation.release_first()
    installation.target.route(Routing(10))
    installation.kubectl("delete", "deployment", "perch-serving-b")
    installation.target.route(Routing())
    assert installation.target.state().routing == Routing()
    installation.kubectl("delete", "deployment", "perch-serving-a")
    deadline = time.monotonic() + 60  # the collector learns of a new kind every 30 s
    while ROUTE in installation.kubectl("get", "httproutes", "--output=name"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(TryLater, match="install the chart"):
        installation.target.state()


def test_target__api_server_away__is_to_be_tried_later_and_soon_said(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = installation.cluster.kubeconfig.read_text()
    address = next(word for word in text.split('"') if word.startswith("https://"))
    (file := tmp_path / "kubeconfig").write_text(text.replace(address, "https://127.0.0.1:9"))
    monkeypatch.setenv("KUBECONFIG", str(file))
    away, began = KubernetesTarget(installation.target._settings), time.monotonic()
    for call in (
        away.state,
        away.promote,
        lambda: away.deploy(Slot.STAGING, ref(1)),
        lambda: away.remove(Slot.STAGING),
    ):
        with pytest.raises(TryLater, match="no answer"):
            call()
    assert time.monotonic() - began < 12
