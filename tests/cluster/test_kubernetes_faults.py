"""What breaks on a cluster while a canary has traffic: parts of Kubernetes, pods, the node; clients notice nothing."""

from __future__ import annotations

import time

import pytest

from pipelines.errors import TryLater
from pipelines.release.targets import Routing, Slot
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.cluster.outages import ON_THE_NODE, PROBED_AGAIN_S, drained_node, keep_one_pod, killed
from tests.integration.release_target_behaviour import IN_FORCE_S, share, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.services]


def test_api_server__killed_at_half_of_the_traffic__clients_notice_nothing_and_nothing_is_forgotten(
    settled: KubernetesRig,
) -> None:
    target = settled.target
    target.route(Routing(50))
    before, services = target.state(), settled.identities()
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        with killed(settled.cluster, "kube-apiserver"):
            began = time.monotonic()
            for call in (target.state, lambda: target.route(Routing())):
                with pytest.raises(TryLater, match="no answer"):
                    call()
            assert target.observe(Slot.CANARY) is None
            assert time.monotonic() - began < 10
            assert {exchange.version for exchange in traffic.wait_for(100)} == {"1", "2"}
        wait_until(lambda: settled.cluster.kubectl("get", "--raw=/readyz", check=False) == "ok")
        target.route(Routing())  # what could not be done then
        time.sleep(IN_FORCE_S)
        assert share(traffic.wait_for(50), "1") == 1
    assert traffic.failed == []
    after = target.state()
    assert (after.slots, after.ready, after.routing) == (before.slots, before.ready, Routing())
    assert settled.identities() == services


def test_canary__its_pod_deleted_under_traffic__another_one_follows_and_no_request_fails(
    settled: KubernetesRig,
) -> None:
    target = settled.target
    target.route(Routing(50))
    before = settled.observe(Slot.CANARY)
    (old,) = [pod["metadata"]["name"] for pod in settled.pods(settled.process_of(Slot.CANARY))]
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        settled.cluster.kubectl(
            "delete", "pod", old, f"--namespace={settled.settings.kubernetes_namespace}", "--wait=false"
        )
        wait_until(
            lambda: Slot.CANARY in target.state().ready and len(settled.pods(settled.process_of(Slot.CANARY))) == 1
        )
        traffic.wait_for(100)
    assert traffic.failed == []
    after = settled.observe(Slot.CANARY)
    assert after.crashes == before.crashes  # somebody asked for it
    assert after.requests >= before.requests  # what the first one counted is not forgotten


def test_canary__its_container_starts_again_in_its_pod__what_it_counts_is_seen_at_once_and_nothing_is_forgotten(
    settled: KubernetesRig,
) -> None:
    target = settled.target
    target.route(Routing(50))
    pods = target.pod_uids(Slot.CANARY)
    with settled.traffic() as traffic:
        traffic.wait_for(200)
    before = settled.observe(Slot.CANARY)
    settled.kill_service(Slot.CANARY)
    wait_until(lambda: Slot.CANARY not in target.state().ready)
    down_s = wait_until(lambda: Slot.CANARY in target.state().ready)
    assert target.pod_uids(Slot.CANARY) == pods
    with settled.traffic() as traffic:
        wait_until(lambda: any(exchange.version == "2" for exchange in traffic.since(0)))
        traffic.wait_for(30)
    assert traffic.failed == []
    served = sum(exchange.version == "2" for exchange in traffic.since(0))
    after = settled.observe(Slot.CANARY)
    print(f"container back after {down_s:.1f} s: {before.requests} counted before, {served} served since, {after}")
    assert 0 < served < before.requests  # less than what the first one had counted
    assert after.requests == before.requests + served
    assert after.crashes == before.crashes + 1


def test_stable__two_pods_and_one_deleted_under_traffic__no_request_fails(settled: KubernetesRig) -> None:
    target, namespace = settled.target, f"--namespace={settled.settings.kubernetes_namespace}"
    process = settled.process_of(Slot.STABLE)
    settled.cluster.kubectl("scale", "deployment", f"perch-{process}", "--replicas=2", namespace)
    try:
        target.wait_ready(Slot.STABLE, 90)
        time.sleep(3)  # for the gateway to find the second one healthy
        with settled.traffic() as traffic:
            traffic.wait_for(50)
            one = settled.pods(process)[0]["metadata"]["name"]
            settled.cluster.kubectl("delete", "pod", one, namespace, "--wait=false")
            target.wait_ready(Slot.STABLE, 90)
            traffic.wait_for(100)
        assert traffic.failed == []
        assert share(traffic.since(0), "1") == 1
    finally:
        settled.cluster.kubectl("scale", "deployment", f"perch-{process}", "--replicas=1", namespace)


@pytest.mark.parametrize("program", ON_THE_NODE)
def test_node__its_agent_killed_at_half_of_the_traffic__pods_go_on_traffic_moves_and_new_pods_start_afterwards(
    settled: KubernetesRig, program: str
) -> None:
    target = settled.target
    target.route(Routing(50))
    before, services = target.state(), settled.identities()
    counted = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        with killed(settled.cluster, program):
            assert {exchange.version for exchange in traffic.wait_for(100)} == {"1", "2"}
            assert settled.observe(Slot.CANARY).requests > counted.requests
            target.route(Routing())
            time.sleep(IN_FORCE_S)
            assert share(traffic.wait_for(50), "1") == 1
            assert traffic.failed == []
        again_at = time.monotonic()
        target.deploy(Slot.STAGING, settled.first)
        target.wait_ready(Slot.STAGING, 90)
        took_s = time.monotonic() - again_at
        target.remove(Slot.STAGING)
    failed = traffic.failed
    if program == "kubelet":
        # It has forgotten what its probes found, and calls every pod of its node not ready until they have been asked
        # again.  With no other node the Services are empty until then.
        assert all("no healthy upstream" in exchange.detail for exchange in failed)
        assert all(exchange.sent_at < again_at + PROBED_AGAIN_S for exchange in failed)
    else:
        assert failed == []
    after = target.state()
    assert (after.slots, after.ready, after.routing) == (before.slots, before.ready, Routing())
    assert settled.identities() == services
    assert settled.observe(Slot.CANARY).crashes == counted.crashes
    outage_s = failed[-1].ended_at - failed[0].sent_at if failed else 0.0
    print(
        f"{program} killed: a new pod was ready {took_s:.1f} s after it was started again; no pod of the node took "
        f"requests for {outage_s:.1f} s, {len(failed)} failed"
    )


def test_node__drained_at_half_of_the_traffic__budgets_keep_a_pod_each_and_the_route_goes_back(
    settled: KubernetesRig,
) -> None:
    target, namespace = settled.target, f"--namespace={settled.settings.kubernetes_namespace}"
    slots = (Slot.STABLE, Slot.CANARY)
    deployments = [f"deployment/perch-{settled.process_of(slot)}" for slot in slots]
    target.route(Routing(50))
    settled.cluster.kubectl("scale", *deployments, "--replicas=2", namespace)
    budgets = []
    try:
        for slot in slots:
            target.wait_ready(slot, 90)
        budgets = keep_one_pod(settled.cluster, settled.settings.kubernetes_namespace, *slots)
        before = settled.observe(Slot.CANARY)
        time.sleep(3)  # for the gateway to find the second ones healthy
        with settled.traffic() as traffic:
            traffic.wait_for(50)
            with drained_node(settled.cluster, 25) as said:
                assert "disruption budget" in said
                left = {slot: settled.pods(settled.process_of(slot)) for slot in slots}
                assert {slot: sum("nodeName" in pod["spec"] for pod in pods) for slot, pods in left.items()} == {
                    Slot.STABLE: 1,
                    Slot.CANARY: 1,
                }
                assert target.state().ready == set(slots)
                assert {exchange.version for exchange in traffic.wait_for(100)} == {"1", "2"}
                target.route(Routing())
                time.sleep(IN_FORCE_S)
                assert share(traffic.wait_for(50), "1") == 1
                with pytest.raises(TryLater, match="not ready"):
                    target.wait_ready(Slot.CANARY, 0.5)  # its second pod has no node
            for slot in slots:
                target.wait_ready(slot, 90)
            traffic.wait_for(50)
        assert traffic.failed == []
        assert settled.observe(Slot.CANARY).crashes == before.crashes  # somebody asked for it
    finally:
        if budgets:
            settled.cluster.kubectl("delete", *budgets, namespace)
        settled.cluster.kubectl("scale", *deployments, "--replicas=1", namespace)
