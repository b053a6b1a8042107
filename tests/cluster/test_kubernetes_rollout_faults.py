"""Whole rollouts while something that they need is killed: how they end, and that clients noticed nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pipelines.errors import TryLater
from pipelines.registry.ledger import Ledger
from pipelines.release.kubernetes_pods import ready_since
from pipelines.release.local_plan import PRODUCTION_PROCESSES
from pipelines.release.rollout_state import RolloutState
from pipelines.release.steps import PROMOTED, ROLLED_BACK, SHADOW, Step
from pipelines.release.targets import Routing, Slot
from tests.cluster.installed import killed_store
from tests.cluster.kubernetes_rig import KubernetesRig
from tests.cluster.outages import PROBED_AGAIN_S, drained_node, keep_one_pod, killed
from tests.integration.conftest import postgresql_server  # noqa: F401 - a fixture
from tests.integration.postgresql_server import killed_postgresql, make_database
from tests.integration.release_target_behaviour import wait_until
from tests.integration.test_rollout import CANARY_30, PARAMS, Scene, open_scene

pytestmark = [pytest.mark.cluster, pytest.mark.services]

# Whoever calls the engine is patient: an outage is shorter than the time after which a release counts as abandoned.
PATIENT = PARAMS.model_copy(update={"abandoned_after_s": 60, "max_step_s": 120})
DOWN_S = 10.0


@pytest.fixture
def on_postgresql(settled: KubernetesRig, postgresql_server: Path) -> KubernetesRig:  # noqa: F811 - the fixture
    """With rollouts and ledger in an empty database on a real PostgreSQL."""
    url = make_database(postgresql_server, f"perch_{uuid4().hex[:8]}")
    return replace(settled, settings=settled.settings.model_copy(update={"database_url": url}))


def kill(part: str, rig: KubernetesRig, postgresql: Path) -> AbstractContextManager[None]:
    if part == "PostgreSQL":
        return killed_postgresql(postgresql)
    if part == "object store":
        return killed_store(rig.settings.s3_endpoint_url)
    return killed(rig.cluster, part)


@contextmanager
def moving(scene: Scene) -> Iterator[None]:
    """Somebody calls the engine until the rollout has ended, and again where it says "try later", as Airflow does."""

    def move() -> None:
        engine, deadline = scene.engine("airflow"), time.monotonic() + 300
        while time.monotonic() < deadline:
            with suppress(TryLater):
                if engine.advance(scene.rollout.rollout_id).is_finished:
                    return
            time.sleep(0.3)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def require_legal_end(scene: Scene) -> RolloutState:
    """Route, slots, aliases and ledger say the same as the rollout, which is over."""
    state = scene.engine("auditor").advance(scene.rollout.rollout_id)
    assert state.is_finished, state.step
    actual, rig = scene.rig.target.state(), scene.rig
    ledger = Ledger(rig.settings.ledger_url)
    last, broken = ledger.entries()[-1], ledger.verify()
    ledger.close()
    assert (broken, actual.routing) == ([], Routing())
    if state.step == PROMOTED:
        assert actual.slots == {Slot.STABLE: rig.second, Slot.CANARY: rig.first}  # what was stable stays warm
        assert scene.aliases.aliases == {"champion": "2", "previous": "1"}
    else:
        assert state.step == ROLLED_BACK
        assert actual.slots == {Slot.STABLE: rig.first}
        assert scene.aliases.aliases.get("champion", "1") == "1"
    assert last.event == state.step.name
    return state


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("PostgreSQL", SHADOW),
        ("PostgreSQL", CANARY_30),
        ("object store", SHADOW),
        ("object store", CANARY_30),
        ("kube-apiserver", CANARY_30),
        ("containerd", SHADOW),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_rollout__something_that_it_needs_killed__goes_on_afterwards_and_no_request_fails(
    on_postgresql: KubernetesRig,
    postgresql_server: Path,  # noqa: F811 - the fixture
    part: str,
    step: Step,
) -> None:
    rig = on_postgresql
    with open_scene(rig, rig.second, PATIENT) as scene, rig.traffic() as traffic:
        state = scene.run_to(step)
        assert state.step == step, state.reason
        with moving(scene), kill(part, rig, postgresql_server):
            time.sleep(DOWN_S)
            answered = traffic.wait_for(30)
        final = require_legal_end(scene)
        traffic.wait_for(30)
    assert {exchange.status for exchange in answered} == {200}
    assert traffic.failed == []
    assert final.step == PROMOTED, final.reason
    print(f"{part} killed in {step.name}: {final.step.name} after {final.entered_at - state.entered_at:.0f} s")


def test_rollout__kubelet_killed__ends_in_a_legal_state_and_fails_requests_only_while_no_pod_is_ready(
    settled: KubernetesRig,
) -> None:
    with open_scene(settled, settled.second, PATIENT) as scene, settled.traffic() as traffic:
        state = scene.run_to(CANARY_30)
        assert state.step == CANARY_30, state.reason
        with moving(scene):
            with killed(settled.cluster, "kubelet"):
                time.sleep(DOWN_S)
                assert traffic.failed == []
            again_at, restarted = time.monotonic(), time.time()
        final = require_legal_end(scene)
        wait_until(lambda: all((ready_since(pod) or 0) > restarted - 1 for pod in serving(settled)), 60)
        time.sleep(3)  # for the gateway to find them healthy
        moment = time.monotonic()
        traffic.wait_for(30)
    assert not [exchange for exchange in traffic.failed if exchange.sent_at > moment]
    # It calls each pod of the one node not ready until its probes have asked again; see test_kubernetes_faults.py.
    assert all(again_at < exchange.ended_at < again_at + PROBED_AGAIN_S for exchange in traffic.failed)
    print(f"kubelet killed in canary@30: {final.step.name} ({final.reason}), {len(traffic.failed)} requests failed")


def serving(rig: KubernetesRig) -> list[dict[str, Any]]:
    return [pod for process in PRODUCTION_PROCESSES for pod in rig.pods(process)]


def test_rollout__canary_put_out_by_a_drained_node__is_taken_back_and_no_request_fails(settled: KubernetesRig) -> None:
    with open_scene(settled, settled.second, PATIENT) as scene, settled.traffic() as traffic:
        state = scene.run_to(CANARY_30)
        assert state.step == CANARY_30, state.reason
        budgets = keep_one_pod(settled.cluster, settled.settings.kubernetes_namespace, Slot.STABLE)
        try:
            with drained_node(settled.cluster, 15), moving(scene):
                pass
        finally:
            settled.cluster.kubectl("delete", *budgets, f"--namespace={settled.settings.kubernetes_namespace}")
        final = require_legal_end(scene)
        traffic.wait_for(30)
    assert final.step == ROLLED_BACK
    assert traffic.failed == []
    print(f"node drained under a canary: {final.reason}")
