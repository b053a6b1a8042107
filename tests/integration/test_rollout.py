"""Rollouts with real parts: services behind Envoy under traffic, gates, kept predictions, database, watchdog."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pytest

from pipelines.params import ModelReleaseParams
from pipelines.predictions.mirrored import compare_answers
from pipelines.predictions.stores import open_store as open_predictions
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from pipelines.release.approvals import Response
from pipelines.release.engine import ReleaseEngine, ReleaseRequest
from pipelines.release.gates import Gates
from pipelines.release.policy import PromotionPolicy
from pipelines.release.rollback import roll_back
from pipelines.release.rollout_state import RolloutState
from pipelines.release.steps import PROMOTED, ROLLED_BACK, Phase, Plan, Step
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.release.watchdog import Watchdog
from pipelines.release.world import World
from tests.integration.release_target_behaviour import TargetRig
from tests.unit.release.simulated_release import RecordedAnswers, SimulatedAliases

pytestmark = pytest.mark.services

EVIDENCE = "5d" * 32
# A few hundred requests must do: the machine of a test has no traffic of a day.
PARAMS = ModelReleaseParams(
    canary_percents=[30, 100],
    min_step_s=1,
    max_step_s=200,
    max_error_rate=0.05,
    min_agreement=0.8,
    abandoned_after_s=30,
    lease_s=3,
)
CANARY_30 = Step(Phase.CANARY, 30)


@dataclass
class Scene:
    rig: TargetRig
    world: World
    aliases: SimulatedAliases
    rollout: RolloutState
    alerts: list[str]

    def engine(self, name: str) -> ReleaseEngine:
        return ReleaseEngine(self.world, name)

    def run_to(self, *steps: Step, limit_s: float = 300) -> RolloutState:
        engine, deadline = self.engine("engine"), time.monotonic() + limit_s
        while True:
            state = engine.advance(self.rollout.rollout_id)
            if state.settled and state.step in (*steps, ROLLED_BACK, PROMOTED):
                return state
            assert time.monotonic() < deadline, state.reading
            time.sleep(0.3)

    def wait_for_rollback(self, limit_s: float) -> float:
        """Seconds until no request goes to the canary."""
        began = time.monotonic()
        while self.rig.target.state().routing != Routing():
            assert time.monotonic() - began < limit_s
            time.sleep(0.02)
        return time.monotonic() - began


@contextmanager
def open_scene(rig: TargetRig, release: ReleaseRef, params: ModelReleaseParams = PARAMS) -> Iterator[Scene]:
    """The first release serves, another has been approved; the watchdog runs."""
    (rig.settings.home / "ledger.db").unlink(missing_ok=True)
    target, settings = rig.target, rig.settings
    target.remove(Slot.CANARY)
    answers, aliases, alerts = RecordedAnswers(), SimulatedAliases(), []

    def compare(state: RolloutState) -> object:
        since = datetime.fromtimestamp(state.entered_at, UTC)
        versions = rig.first.version, release.version
        return compare_answers(open_predictions(settings), state.release.model, *versions, since)

    world = World(
        target=target,
        rollouts=RolloutTable(settings.ledger_url),
        glance=RolloutTable(settings.ledger_url, patient=False),
        ledger=Ledger(settings.ledger_url),
        aliases=aliases,
        approvals=answers,
        policy=PromotionPolicy(),
        evidence=lambda release, plan: EVIDENCE,
        judge=Gates(compare),
    )
    request = ReleaseRequest(release, rig.first, "scheduler", EVIDENCE)
    rollout = ReleaseEngine(world, "beginner").begin(request, Plan(params))
    answers.answers.append(Response("approver", datetime.now(UTC), True, EVIDENCE, "fine"))
    of_watchdog = replace(world, rollouts=world.glance, judge=Gates(compare))
    watchdog, stop = Watchdog(of_watchdog, lambda title, text: alerts.append(text)), threading.Event()
    thread = threading.Thread(target=watchdog.run, args=(stop, 0.5))
    thread.start()
    try:
        yield Scene(rig, world, aliases, rollout, alerts)
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def scene(settled: TargetRig) -> Iterator[Scene]:
    """The second release has been approved."""
    with open_scene(settled, settled.second) as scene:
        yield scene


def test_rollout__good_release_under_traffic__is_promoted_then_taken_back_and_no_request_fails(scene: Scene) -> None:
    with scene.rig.traffic() as traffic:
        state = scene.run_to(PROMOTED)
        assert state.step == PROMOTED, state.reason
        assert scene.rig.target.state().slots[Slot.STABLE] == scene.rig.second
        assert scene.aliases.aliases == {"champion": "2", "previous": "1"}
        outcome = roll_back(scene.world, state.release.model, reason="by hand", by="on-call")
        assert outcome.is_recorded
        assert outcome.traffic_s is not None
        assert outcome.traffic_s < 5
        moved = time.monotonic()
        traffic.wait_for(50)
        time.sleep(0.5)
    assert traffic.failed == []
    assert {exchange.version for exchange in traffic.since(moved + 0.25)} == {"1"}
    events = [record.event for record in Ledger(scene.rig.settings.ledger_url).entries()]
    assert events == ["approved", "traffic", "traffic", "traffic", "promoted", "rolled_back"]


def test_rollout__canary_killed__loses_its_traffic_within_five_seconds(scene: Scene) -> None:
    with scene.rig.traffic() as traffic:
        state = scene.run_to(CANARY_30)
        assert state.step == CANARY_30, state.reason
        scene.rig.kill_service(Slot.CANARY)
        assert scene.wait_for_rollback(10) < 5
        moved = time.monotonic()
        traffic.wait_for(50)
        time.sleep(0.5)
    in_flight = traffic.clients
    assert len(traffic.failed) <= in_flight
    assert {exchange.version for exchange in traffic.since(moved + 0.25)} == {"1"}
    final = scene.run_to(ROLLED_BACK)
    assert final.step == ROLLED_BACK
    assert final.reason.startswith("crashes: ")


def test_rollout__engine_gone_at_30_percent__the_watchdog_gives_the_traffic_back(settled: TargetRig) -> None:
    params = PARAMS.model_copy(update={"abandoned_after_s": 6})
    with open_scene(settled, settled.second, params) as scene:
        with settled.traffic() as traffic:
            state = scene.run_to(CANARY_30)
            assert state.step == CANARY_30, state.reason
            assert scene.wait_for_rollback(26) > 1
        assert traffic.failed == []
        deadline = time.monotonic() + 60
        while not (final := scene.engine("later").advance(scene.rollout.rollout_id)).is_finished:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert final.step == ROLLED_BACK
    assert "nobody moved the release for" in final.reason
