"""Two nodes, of which one at a time is in trouble while a canary has traffic: the slots stand on both of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.release.targets import Routing, Slot
from tests.cluster.conftest import ARCHIVE, Phases
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.cluster.outages import drained_node, keep_one_pod, killed
from tests.cluster.second_node import FIRST, SECOND, second_node
from tests.integration.release_target_behaviour import IN_FORCE_S, share, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.services]

SLOTS = (Slot.STABLE, Slot.CANARY)
DOWN_S = 10.0
HEALTHY_S = 3.0  # for the gateway to find new pods healthy


@pytest.fixture(scope="module")
def spread(rig: KubernetesRig, phases: Phases) -> Iterator[KubernetesRig]:
    """Both slots with two pods each, one on each node, and a budget that keeps one of them."""
    namespace = f"--namespace={rig.settings.kubernetes_namespace}"
    with second_node(rig.cluster, Path(ARCHIVE)):
        phases.end("second node up, image given to it")
        rig.settle()
        deployments = [f"deployment/perch-{rig.process_of(slot)}" for slot in SLOTS]
        rig.cluster.kubectl("scale", *deployments, "--replicas=2", namespace)
        budgets = keep_one_pod(rig.cluster, rig.settings.kubernetes_namespace, *SLOTS)
        try:
            for slot in SLOTS:
                rig.target.wait_ready(slot, 90)
            yield rig
        finally:
            rig.cluster.kubectl("delete", *budgets, namespace)
            rig.cluster.kubectl("scale", *deployments, "--replicas=1", namespace)
    for slot in SLOTS:
        rig.target.wait_ready(slot, 90)
    phases.end("tests on two nodes, and the second one drained and gone")


@pytest.fixture
def at_half(spread: KubernetesRig) -> Iterator[KubernetesRig]:
    """Half of the traffic to each slot, and every pod ready where it belongs."""
    wait_until(lambda: all(nodes_of(spread, slot) == {FIRST, SECOND} for slot in SLOTS), 120)
    for slot in SLOTS:
        spread.target.wait_ready(slot, 90)
    time.sleep(HEALTHY_S)
    spread.target.route(Routing(50))
    yield spread
    spread.target.route(Routing())


def nodes_of(rig: KubernetesRig, slot: Slot) -> set[str]:
    return {pod["spec"].get("nodeName", "") for pod in rig.pods(rig.process_of(slot))}


@pytest.mark.parametrize("node", [FIRST, SECOND])
def test_kubelet__of_one_node_killed_and_started_again__no_request_fails(at_half: KubernetesRig, node: str) -> None:
    before, services = at_half.target.state(), at_half.identities()
    counted = at_half.observe(Slot.CANARY)
    with at_half.traffic() as traffic:
        traffic.wait_for(50)
        with killed(at_half.cluster, "kubelet", node):
            time.sleep(DOWN_S)
        began = time.monotonic()
        unready_s = wait_for_probes(at_half, node, began)
        assert {exchange.version for exchange in traffic.wait_for(100)} == {"1", "2"}
        at_half.target.route(Routing())
        time.sleep(IN_FORCE_S)
        assert share(traffic.wait_for(50), "1") == 1
    assert traffic.failed == []
    after = at_half.target.state()
    assert (after.slots, after.ready, after.routing) == (before.slots, before.ready, Routing())
    assert at_half.identities() == services
    assert at_half.observe(Slot.CANARY).crashes == counted.crashes
    print(f"kubelet of {node} away for {DOWN_S:g} s: its pods were ready again {unready_s:.1f} s later, 0 failed")


def wait_for_probes(rig: KubernetesRig, node: str, since: float) -> float:
    """Seconds until the node's pods, which its kubelet calls not ready when it starts, are ready again."""
    pods = [pod for slot in SLOTS for pod in rig.pods(rig.process_of(slot)) if pod["spec"]["nodeName"] == node]
    names = [f"pod/{pod['metadata']['name']}" for pod in pods]
    assert len(names) == len(SLOTS)
    namespace = f"--namespace={rig.settings.kubernetes_namespace}"
    time.sleep(DOWN_S)  # it has to say so first
    rig.cluster.kubectl("wait", "--for=condition=Ready", *names, namespace, "--timeout=60s")
    return time.monotonic() - since


def test_node__one_of_two_drained__its_pods_move_and_no_request_fails(at_half: KubernetesRig) -> None:
    target = at_half.target
    counted = at_half.observe(Slot.CANARY)
    with at_half.traffic() as traffic:
        traffic.wait_for(50)
        began = time.monotonic()
        with drained_node(at_half.cluster, 90, FIRST) as said:
            took_s = time.monotonic() - began
            assert f"node/{FIRST} evicted" in said or "drained" in said, said
            wait_until(lambda: all(nodes_of(at_half, slot) == {SECOND} for slot in SLOTS), 60)
            for slot in SLOTS:
                target.wait_ready(slot, 90)
            assert {exchange.version for exchange in traffic.wait_for(100)} == {"1", "2"}
        assert target.state().routing == Routing(50)
    assert traffic.failed == []
    assert at_half.observe(Slot.CANARY).crashes == counted.crashes  # somebody asked for it
    print(f"{FIRST} drained in {took_s:.1f} s: both slots stand on {SECOND}, 0 of {len(traffic.since(0))} failed")
