"""What breaks on a cluster while a canary has traffic: the API server; clients notice nothing."""

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
    in_node = program in {"kubelet", "kube-proxy"}
    process.kill()
    try:
        # What has another parent than this process stays as a zombie until that one looks.
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 10)
        yield
    finally:
        init = (cluster.run / "pids/nodeinit").read_text().strip()
        inside = ["nsenter", "--target", init, "--net", "--mount", "--pid"] if in_node else []
        with (cluster.run / f"log/{program}.again.log").open("ab") as log:
            again = subprocess.Popen(
                [*inside, *command], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if program == "kube-apiserver":
            (cluster.run / "pids/apiserver").write_text(str(again.pid))


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
