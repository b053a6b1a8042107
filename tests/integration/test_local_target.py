"""The local target with real parts: supervised services behind Envoy, under traffic, with kills."""

from __future__ import annotations

import time

import psutil
import pytest

from pipelines.release.targets import Routing, Slot
from tests.integration.local_rig import Rig
from tests.integration.release_target_behaviour import *  # noqa: F403 - each of its tests
from tests.integration.release_target_behaviour import wait_until

pytestmark = pytest.mark.services


@pytest.mark.slow
def test_canary__its_first_process_killed__the_workers_left_over_are_ended_before_it_starts_again(settled: Rig) -> None:
    target = settled.target
    target.route(Routing(50))
    before = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        first, *workers = settled.processes(Slot.CANARY)
        assert workers
        first.kill()
        psutil.wait_procs(workers, timeout=20)
        assert not any(worker.is_running() for worker in workers)
        wait_until(lambda: Slot.CANARY in target.state().ready)
        traffic.wait_for(50)
    assert len(traffic.failed) <= traffic.clients  # a request may meet the closing of its connection
    assert settled.observe(Slot.CANARY).crashes == before.crashes + 1


def test_envoy__killed__comes_back_with_the_same_routes(settled: Rig) -> None:
    target = settled.target
    target.route(Routing(50))
    before = target.state()
    with settled.traffic() as traffic:
        traffic.wait_for(30)
        killed_at = time.monotonic()
        psutil.Process(settled.pid("envoy")).kill()
        target.route(Routing(50, mirror=True))  # waits for it
        back_s = time.monotonic() - killed_at
        traffic.wait_for(30)
        assert not [exchange for exchange in traffic.wait_for(100) if exchange.status != 200]
    assert target.state().slots == before.slots
    assert target.state().routing == Routing(50, mirror=True)
    print(f"Envoy killed: back after {back_s:.1f} s")
