"""What breaks on a cluster while a canary has traffic: the API server, pods; clients notice nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from pipelines.errors import TryLater
from pipelines.release.targets import Routing, Slot
from tests.cluster.kubernetes_cluster import Cluster
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.integration.release_target_behaviour import IN_FORCE_S, share, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.services]


@contextmanager
def killed(cluster: Cluster, program: str) -> Iterator[None]:
    """A part of Kubernetes is killed, and started again as it was when the block ends."""
    process = next(
        known
        for known in psutil.process_iter(["cmdline"])
        if (known.info["cmdline"] or [])[1:2] == [program] and known.cwd() == str(cluster.run)
    )
    command, folder, environment = process.cmdline(), process.cwd(), process.environ()
    process.kill()
    try:
        # It stays as a zombie until whoever started it looks.
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 10)
        yield
    finally:
        with (cluster.run / f"log/{program}.again.log").open("ab") as log:
            again = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        (cluster.run / "pids" / program.removeprefix("kube-")).write_text(str(again.pid))


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
