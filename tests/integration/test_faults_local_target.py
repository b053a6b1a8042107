"""What clients and slots keep when the supervisor is killed."""

from __future__ import annotations

import time

import psutil
import pytest

from pipelines.errors import TryLater
from pipelines.release.local_plan import PROCESSES
from pipelines.release.supervision import supervisor_proxy
from pipelines.release.targets import Routing, Slot
from pipelines.services.programs import Ports
from tests.integration.local_rig import Rig
from tests.integration.release_target_behaviour import wait_until

pytestmark = pytest.mark.services

_UP_LIMIT_S = 90.0


def test_supervisor__killed_at_half_of_the_traffic__clients_are_served_traffic_moves_and_up_takes_over(
    settled: Rig,
) -> None:
    target, ports = settled.target, settled.stack.ports()
    target.route(Routing(50))
    children = {name: psutil.Process(settled.pid(name)) for name in ("envoy", "serving-a", "serving-b")}
    supervisor = psutil.Process(supervisor_proxy(settled.stack.socket).supervisor.getPID())
    with settled.traffic() as traffic:
        traffic.wait_for(30)
        supervisor.kill()
        supervisor.wait(10)
        # Its pipes are closed now: whoever writes to his log must not end of that.
        assert {exchange.version for exchange in traffic.wait_for(200)} == {"1", "2"}
        began = time.monotonic()
        target.route(Routing())
        moved_s = time.monotonic() - began
        assert target.observe(Slot.CANARY) is not None
        with pytest.raises(TryLater, match="perch up"):
            target.deploy(Slot.STAGING, settled.second)
        time.sleep(0.25)
        assert {exchange.version for exchange in traffic.wait_for(50)} == {"1"}
    assert traffic.failed == []
    assert moved_s < 5
    assert all(child.is_running() for child in children.values())
    assert settled.stack.status() == {}

    before = target.state()
    with settled.traffic() as traffic:
        began = time.monotonic()
        # As `perch up` does it: ends what was left, so that nothing of it keeps a port or a slot.
        settled.stack.down()
        assert not any(child.is_running() for child in children.values())
        settled.stack.supervise([], Ports(mlflow=0, airflow=0, serving=ports.serving))
        settled.stack.open_to_clients(print)
        settled.target.wait_ready(Slot.STABLE, _UP_LIMIT_S)
        settled.target.wait_ready(Slot.CANARY, _UP_LIMIT_S)
        # Envoy looks at the health of its services once a second.
        wait_until(lambda: all(exchange.status == 200 for exchange in traffic.wait_for(10)))
        up_again = time.monotonic()
        traffic.wait_for(30)
    assert [exchange for exchange in traffic.failed if exchange.sent_at > up_again] == []
    after = settled.target.state()
    assert (after.slots, after.routing, after.ready) == (before.slots, Routing(), before.ready)
    assert {process for process in PROCESSES if process in settled.stack.status()} == {"serving-a", "serving-b"}
    outage_s = max(exchange.ended_at for exchange in traffic.failed) - min(e.sent_at for e in traffic.failed)
    print(f"supervisor killed: moved in {1000 * moved_s:.0f} ms; `up` after it: {outage_s:.1f} s without a service")
    assert outage_s < up_again - began + 1
