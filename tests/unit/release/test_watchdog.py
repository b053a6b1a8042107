"""The watchdog by itself: what it takes away, how soon, and what it leaves alone."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.errors import TryLater
from pipelines.release.audit import Audit
from pipelines.release.engine import ReleaseEngine
from pipelines.release.rollback import roll_back
from pipelines.release.rollout_state import RolloutState
from pipelines.release.steps import PENDING, PROMOTED, ROLLED_BACK, Phase, Step
from pipelines.release.targets import Routing, Slot, TargetState
from pipelines.release.watchdog import Watchdog
from tests.unit.release.simulated_release import MODEL, Clock, Fuse, Killed, Simulation, release

CANARY_10 = Step(Phase.CANARY, 10)


class Scene(Simulation):
    """A release at 10 %, an engine that still moves it when asked, and a watchdog with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.monotonic = Clock(100.0)
        self.alerts: list[str] = []
        self.watchdog = Watchdog(self.world(), lambda title, text: self.alerts.append(text), self.monotonic)
        self.rollout = self.begin()
        self.answer()
        self.mover = self.engine()

    def go_to(self, step: Step) -> None:
        for _ in range(60):
            if self.state(self.rollout.rollout_id).step == step:
                return
            self.pass_time()
            self.mover.advance(self.rollout.rollout_id)
        raise AssertionError

    def pass_time(self, seconds: float = 1.0, requests: int = 600) -> None:
        self.tick(seconds, requests)
        self.monotonic.now += seconds

    @property
    def now(self) -> RolloutState:
        return self.state(self.rollout.rollout_id)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    scene = Scene(tmp_path)
    scene.go_to(CANARY_10)
    return scene


@pytest.mark.parametrize("fault", [{"error_rate": 0.1}, {"crashes": True}])
def test_check__gate_is_breached__weight_is_zero_at_the_next_look(scene: Scene, fault: dict[str, float]) -> None:
    scene.target.behave(2, **fault)
    scene.pass_time()
    assert scene.watchdog.check()
    assert scene.target.history[-1] == (scene.clock(), Routing())
    scene.check_back_on(1)
    assert scene.now.is_finished
    assert len(scene.alerts) == 1


@pytest.mark.parametrize("by", ["watchdog", "engine"])
def test_breach__canary_that_keeps_the_question_who_is_ready_waiting__loses_its_traffic_first(
    scene: Scene, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.target.behave(2, error_rate=0.1)
    scene.pass_time()
    target, asked, ask = scene.target, [], scene.target.state

    def state() -> TargetState:
        asked.append(target.slots.routing)
        return ask()

    monkeypatch.setattr(target, "state", state)
    if by == "watchdog":
        assert scene.watchdog.check()
    else:
        scene.mover.advance(scene.rollout.rollout_id)
    assert set(asked) == {Routing()}, "asked only once the traffic had moved"
    assert scene.now.step == ROLLED_BACK


@pytest.mark.parametrize("by", ["watchdog", "engine"])
def test_breach__found_at_the_first_look__is_in_the_ledger_with_what_that_look_saw(scene: Scene, by: str) -> None:
    scene.target.behave(2, error_rate=0.1)
    scene.pass_time()
    scene.watchdog.check() if by == "watchdog" else scene.mover.advance(scene.rollout.rollout_id)
    evidence = json.loads(scene.ledger.entries(MODEL)[-1].evidence)
    assert (evidence["by"], evidence["requests"], evidence["stable_requests"]) == (by, 60, 540)
    assert evidence["gates"]["errors"].startswith("roll back: ")
    assert scene.now.passages[-1].requests == 60


def test_check__good_release__is_left_alone_to_its_end(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for _ in range(60):
        scene.pass_time()
        scene.watchdog.check()
        if scene.mover.advance(scene.rollout.rollout_id).is_finished:
            break
        scene.watchdog.check()
    assert scene.now.step == PROMOTED
    scene.check_promoted(2, previous=1)
    assert scene.alerts == []


def test_check__release_that_waits_for_an_approval__is_left_alone_for_days(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for _ in range(5):
        scene.pass_time(3600)
        assert scene.watchdog.check() == []
    assert scene.now.step == PENDING


def test_check__wall_clock_jumps_while_the_engine_lives__takes_nothing_away(scene: Scene) -> None:
    scene.watchdog.check()
    scene.clock.now += 86_400
    assert scene.watchdog.check() == []
    assert scene.target.state().routing == Routing(10)


def test_check__nobody_renews_the_lease__traffic_goes_back_when_it_is_too_long(scene: Scene) -> None:
    for _ in range(20):
        scene.pass_time()
        scene.watchdog.check()
    assert scene.now.step == CANARY_10
    for _ in range(2):
        scene.pass_time()
        scene.watchdog.check()
    assert scene.now.step == ROLLED_BACK
    assert scene.now.reason == "nobody moved the release for 21 s (limit: 20 s)"
    scene.check_back_on(1)


def test_check__no_metrics__are_forgiven_for_a_while(scene: Scene) -> None:
    scene.target.behave(2, is_silent=True)
    for _ in range(4):
        scene.pass_time()
        assert scene.watchdog.check() == []
    for _ in range(2):
        scene.pass_time()
        scene.watchdog.check()
    assert scene.now.reason.startswith("the canary gave no metrics for")
    scene.check_back_on(1)


def test_check__canary_is_not_ready_once__is_looked_at_again(scene: Scene) -> None:
    scene.target.behave(2, starts=False)
    assert scene.watchdog.check() == []
    scene.target.behave(2, starts=True)
    scene.pass_time()
    assert scene.watchdog.check() == []
    scene.target.behave(2, starts=False)
    scene.watchdog.check()
    scene.pass_time()
    scene.watchdog.check()
    assert scene.now.reason == "crashes: the canary takes no requests any more"


def test_check__weight_raised_by_hand__is_taken_back_at_once(scene: Scene) -> None:
    scene.target.route(Routing(90))
    assert scene.watchdog.check()
    assert scene.now.reason == "the canary has 90 % of the traffic, canary@10 gives 10 %"
    scene.check_back_on(1)


def test_check__traffic_to_the_previous_after_a_promotion_by_hand__is_completed_as_a_rollback(scene: Scene) -> None:
    scene.go_to(PROMOTED)
    scene.target.route(Routing(50))
    for _ in range(5):
        scene.pass_time()
        scene.watchdog.check()
    assert scene.now.step == ROLLED_BACK
    scene.check_back_on(1)


def test_check__rollback_of_a_promotion_is_under_way__leaves_its_maker_time_to_say_why(scene: Scene) -> None:
    scene.go_to(PROMOTED)
    scene.watchdog.check()
    with pytest.raises(Killed):
        roll_back(scene.world(Fuse(at=2)), MODEL, reason="wrong on 8", by="on-call")  # routed, and no further yet
    assert scene.watchdog.check() == []
    roll_back(scene.world(), MODEL, reason="wrong on 8", by="on-call")
    assert scene.now.reason == "wrong on 8"


def test_check__canary_gets_traffic_after_a_rollback__loses_it(scene: Scene) -> None:
    scene.target.behave(2, error_rate=0.5)
    scene.pass_time()
    scene.watchdog.check()
    scene.target.deploy(Slot.CANARY, release(2))
    scene.target.route(Routing(30))
    for _ in range(5):
        scene.pass_time()
        scene.watchdog.check()
    scene.check_back_on(1)


def test_check__database_is_away__judges_by_what_it_read_last(scene: Scene) -> None:
    scene.watchdog.check()
    away = Away()
    scene.watchdog._world = replace(scene.world(), rollouts=away, glance=away)  # type: ignore[arg-type]
    scene.target.behave(2, error_rate=0.1)
    scene.pass_time()
    scene.watchdog.check()
    assert scene.target.state().routing == Routing()
    assert "not recorded yet" in scene.alerts[0]
    scene.pass_time()
    assert scene.watchdog.check() == []  # it goes on to the next model, and tells nobody twice
    scene.watchdog._world = scene.world()
    for _ in range(5):
        scene.pass_time()
        scene.watchdog.check()
    scene.check_back_on(1)


def test_check__database_is_away_for_long__takes_the_traffic_away(scene: Scene) -> None:
    scene.watchdog.check()
    away = Away()
    scene.watchdog._world = replace(scene.world(), rollouts=away, glance=away)  # type: ignore[arg-type]
    for _ in range(20):
        scene.pass_time()
        scene.watchdog.check()
    assert scene.target.state().routing == Routing(10)
    scene.pass_time()
    scene.watchdog.check()
    assert scene.target.state().routing == Routing()


@pytest.fixture
def unread(scene: Scene) -> Scene:
    """The engine has taken the step to 50 %, and the database went before the watchdog could read it."""
    scene.watchdog.check()
    scene.go_to(Step(Phase.CANARY, 50))
    away = Away()
    scene.watchdog._world = replace(scene.world(), rollouts=away, glance=away)  # type: ignore[arg-type]
    return scene


def test_check__database_went_just_after_a_step__leaves_the_steps_share_until_it_is_back(unread: Scene) -> None:
    for _ in range(5):
        unread.pass_time()
        assert unread.watchdog.check() == []
    unread.watchdog._world = unread.world()
    for _ in range(30):
        unread.pass_time()
        assert unread.watchdog.check() == []
        if unread.mover.advance(unread.rollout.rollout_id).is_finished:
            break
    assert unread.alerts == []
    unread.check_promoted(2, 1)


def test_check__database_went_just_after_a_step_and_stays_away__takes_the_traffic_away(unread: Scene) -> None:
    while unread.target.state().routing == Routing(50):
        unread.pass_time()
        unread.watchdog.check()
    assert unread.monotonic() - unread.watchdog._read_at == pytest.approx(unread.params.abandoned_after_s, abs=1)


@pytest.mark.parametrize("percent", [30, 49, 51, 100])
def test_check__database_is_away_and_the_weight_is_no_steps__is_taken_back_at_once(unread: Scene, percent: int) -> None:
    unread.target.route(Routing(percent))
    unread.watchdog.check()
    assert unread.target.state().routing == Routing()


def test_check__database_went_just_after_a_step_and_the_canary_fails__is_taken_back_at_once(unread: Scene) -> None:
    unread.target.behave(2, error_rate=0.1)
    unread.pass_time()
    unread.watchdog.check()
    assert unread.target.state().routing == Routing()


class Away:
    """A database that does not answer."""

    def __getattr__(self, name: str) -> object:
        raise TryLater("the database does not answer")


def test_check__row_of_another_model_that_nobody_can_read__keeps_nothing_from_being_taken_back(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = scene.world().glance.list_current()
    damaged = replace(rows[0], rollout_id="other-1", model="other", document={"step": "torn"})
    glance = scene.watchdog._world.glance
    monkeypatch.setattr(glance, "list_current", lambda: [damaged, *rows])
    scene.target.behave(2, error_rate=0.1)
    scene.pass_time()
    with pytest.raises(ValueError, match="step"):
        scene.watchdog.check()
    assert scene.target.state().routing == Routing()


def test_run__rows_of_two_models_that_nobody_can_read__tells_of_both_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = scene.world().glance.list_current()[0]
    damaged = [replace(row, rollout_id=name, model=name, document={"step": name}) for name in ("torn", "burnt")]
    monkeypatch.setattr(scene.watchdog._world.glance, "list_current", lambda: damaged)
    scene.watchdog.run(Stop(after=3))  # type: ignore[arg-type]
    assert len(caplog.records) == 2
    assert all(f"in the look at {name}" in caplog.text for name in ("torn", "burnt"))


def test_run__failure_that_comes_again_after_a_good_look__is_told_again(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for is_away in (True, False, True):
        scene.target.is_away = is_away
        scene.watchdog.run(Stop(after=2))  # type: ignore[arg-type]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


class Stop:
    """Ends a watchdog after some looks."""

    def __init__(self, after: int) -> None:
        self.left = after

    def wait(self, _interval_s: float) -> bool:
        self.left -= 1
        return self.left < 0


def test_check__target_is_away__says_so_and_goes_on_later(scene: Scene) -> None:
    scene.target.is_away = True
    with pytest.raises(TryLater, match="target"):
        scene.watchdog.check()
    scene.target.is_away = False
    assert scene.watchdog.check() == []


def test_check__engine_moves_now_and_then__takes_nothing_away(scene: Scene) -> None:
    """Moved by an engine, but not out of its step: 40 s in all, never 20 s without a sign of life."""
    for _ in range(4):
        for _ in range(10):
            scene.pass_time(requests=0)
            assert scene.watchdog.check() == []
        scene.mover.advance(scene.rollout.rollout_id)
    assert scene.now.step == CANARY_10


def test_check__promotion_is_under_way__is_left_alone(scene: Scene) -> None:
    """All traffic on the canary, the next step written down and not yet entered."""
    scene.go_to(Step(Phase.CANARY, 100))
    engine = ReleaseEngine(replace(scene.world(), ledger=Deaf()), "engine")  # type: ignore[arg-type]
    scene.target.promote = Deaf().append  # type: ignore[method-assign]
    scene.pass_time()
    engine.advance(scene.rollout.rollout_id)
    while scene.now.step != PROMOTED:
        scene.pass_time()
        with suppress(TryLater):
            engine.advance(scene.rollout.rollout_id)
    assert (scene.now.step, scene.now.settled) == (PROMOTED, False)
    assert scene.target.state().routing == Routing(100)
    assert scene.watchdog.check() == []


class Deaf:
    """Does not answer."""

    def append(self, *_: object, **__: object) -> object:
        raise TryLater("nobody answers")


def test_check__engine_steps_on_between_two_questions__is_no_trouble(scene: Scene) -> None:
    """The row was read at 10 %, the target was asked at 50 %."""
    scene.watchdog._world = replace(scene.world(), target=Stepping(scene))  # type: ignore[arg-type]
    assert scene.watchdog.check() == []
    assert scene.now.step == Step(Phase.CANARY, 50)
    assert scene.target.state().routing == Routing(50)


class Stepping:
    """A target whose engine takes a step just before it is asked."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def state(self) -> TargetState:
        self._scene.go_to(Step(Phase.CANARY, 50))
        return self._scene.target.state()

    def __getattr__(self, name: str) -> object:
        return getattr(self._scene.target, name)


def test_check__recorded_rollback_with_traffic_left__moves_it_before_it_writes(scene: Scene) -> None:
    """An engine that woke up after its lease had routed once more, when the rollback was recorded and not finished."""
    fuse = Fuse(at=3)  # route, save, and then nothing more
    with pytest.raises(Killed):
        roll_back(scene.world(fuse), MODEL, reason="by hand", by="on-call")
    assert (scene.now.step, scene.now.settled) == (ROLLED_BACK, False)
    scene.target.route(Routing(10))
    scene.watchdog.check()
    assert scene.now.is_finished
    scene.check_back_on(1)


# The audit


def test_audit__contradiction_that_lasts__is_told_once_and_so_is_its_end() -> None:
    found: list[str] = ["alias champion of m points at v3, the ledger's is v2"]
    told: list[str] = []
    audit = Audit(lambda: found, lambda title, text: told.append(title))
    audit.check()
    assert told == [], "a promotion passes through such a moment"
    audit.check()
    audit.check()
    assert told == ["The ledger or an alias was changed by hand"]
    found.clear()
    audit.check()
    assert told[1:] == ["Ledger and aliases agree again"]


def test_audit__moment_of_a_promotion__is_not_told() -> None:
    looks = iter([["a"], [], ["a"], []])
    told: list[str] = []
    audit = Audit(lambda: next(looks), lambda title, text: told.append(title))
    for _ in range(4):
        audit.check()
    assert told == []


def test_audit__notice_that_did_not_leave__is_told_again() -> None:
    told: list[str] = []
    arrives = iter([False, False, True, True])

    def alert(title: str, text: str) -> bool:
        told.append(title)
        return next(arrives)

    audit = Audit(lambda: ["row 4 was changed"], alert, looks=1)
    assert [bool(audit.check()) for _ in range(4)] == [False, False, True, True]
    assert len(told) == 3
