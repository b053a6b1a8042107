"""The engine over a real database and a simulated target: kills, two at once, approvals, clocks."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.core import patience
from pipelines.core.rollout_rows import StaleRolloutError
from pipelines.errors import Refusal, TryLater
from pipelines.release.approvals import Response
from pipelines.release.engine import ReleaseRequest
from pipelines.release.rollback import roll_back
from pipelines.release.rollout_state import from_document
from pipelines.release.steps import PENDING, PROMOTED, ROLLED_BACK, Phase, Plan, Step
from pipelines.release.targets import Routing, Slot, SlotCounters
from pipelines.release.watchdog import Watchdog
from tests.unit.release.simulated_release import MODEL, QUICK, Fuse, Killed, Simulation, release


@pytest.fixture
def folders() -> Iterator[Callable[[], Path]]:
    """Fresh folders in memory, where there is such a place: hundreds of databases wait for no disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:

        def fresh() -> Path:
            return Path(tempfile.mkdtemp(dir=name))

        yield fresh


@pytest.fixture
def world(folders: Callable[[], Path]) -> Simulation:
    return Simulation(folders())


def advance_to(world: Simulation, rollout_id: str, step: Step) -> None:
    engine = world.engine()
    for _ in range(80):
        if world.state(rollout_id).step == step:
            return
        world.tick()
        engine.advance(rollout_id)
    raise AssertionError(world.state(rollout_id).step)


BRISK = QUICK.model_copy(update={"min_step_s": 1.0})
CANARY_10, CANARY_50 = Step(Phase.CANARY, 10), Step(Phase.CANARY, 50)


def test_advance__good_release__goes_through_every_step_with_a_row_for_each(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    state = world.run(rollout.rollout_id)
    assert [passage.step for passage in state.passages] == [
        "pending", "shadow", "canary@10", "canary@50", "canary@100", "promoted",
    ]  # fmt: skip
    assert world.events() == ["promoted v1", "approved v2", *["traffic v2"] * 4, "promoted v2"]
    world.check_promoted(2, previous=1)
    assert world.target.state().slots[Slot.CANARY] == release(1), "the one before is kept warm"
    assert world.target.failed == 0


def test_advance__one_call__takes_one_step_at_most(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    engine = world.engine()
    before = len(world.state(rollout.rollout_id).passages)
    for _ in range(40):
        world.tick(10, 1000)
        engine.advance(rollout.rollout_id)
        after = len(world.state(rollout.rollout_id).passages)
        assert after <= before + 1
        before = after


def test_advance__first_release_of_all__skips_the_canary_and_the_ledger_says_so(folders: Callable[[], Path]) -> None:
    world = Simulation(folders(), empty=True)
    rollout = world.begin(1)
    world.answer(version=1)
    state = world.run(rollout.rollout_id)
    assert state.step == PROMOTED
    world.check_promoted(1, previous=None)
    traffic = next(record for record in world.ledger.entries() if record.event == "traffic")
    assert '"skipped":["shadow","canary@10","canary@50","canary@100"]' in traffic.evidence
    assert "no champion" in traffic.evidence


def first_of_another_model(world: Simulation) -> ReleaseRequest:
    other = replace(release(2), model="xray-classification")
    world.evidence[other] = world.evidence[release(2)]
    return ReleaseRequest(other, None, "scheduler", world.evidence[other], "run-2")


def test_begin__first_release_where_another_model_serves__is_refused_before_anybody_is_asked(world: Simulation) -> None:
    request = first_of_another_model(world)
    with pytest.raises(Refusal, match=rf"holds {MODEL} v1.*\n.*export PERCH_HOME=\$HOME/perch-xray-classification"):
        world.engine().begin(request, Plan(QUICK))
    assert world.rollouts.list_rollouts("xray-classification") == []


def test_begin__first_release_begun_before_the_slots_answered__is_refused_when_they_do(world: Simulation) -> None:
    request = first_of_another_model(world)
    world.target.is_away = True
    rollout = world.engine().begin(request, Plan(QUICK))
    assert world.engine().begin(request, Plan(QUICK)) == rollout
    world.target.is_away = False
    with pytest.raises(Refusal, match=f"holds {MODEL} v1"):
        world.engine().begin(request, Plan(QUICK))


def test_begin__first_release_where_the_ledger_lost_its_champion__says_to_restore_it(world: Simulation) -> None:
    request = ReleaseRequest(release(2), None, "scheduler", world.evidence[release(2)], "run-2")
    with pytest.raises(Refusal, match="restore it"):
        world.engine().begin(request, Plan(QUICK))


def test_advance__first_release_where_another_model_came_first__takes_nothing_from_it(world: Simulation) -> None:
    world.target.is_away = True
    rollout = world.engine().begin(first_of_another_model(world), Plan(QUICK))
    world.target.is_away = False
    world.answer()
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.reason.startswith(f"the stable slot holds {MODEL} v1, and the ledger has no champion of xray-")
    assert world.target.state().slots == {Slot.STABLE: release(1)}
    assert world.target.failed == 0


def test_advance__erroneous_release__is_stopped_in_the_shadow_and_no_client_saw_it(world: Simulation) -> None:
    world.target.behave(2, error_rate=0.1)
    rollout = world.begin()
    world.answer()
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.passages[-2].step == "shadow"
    world.check_back_on(1)
    assert Slot.CANARY not in world.target.state().slots
    assert world.target.failed == 0


@pytest.mark.parametrize("fault", [{"error_rate": 0.1}, {"crashes": True}, {"is_silent": True}])
def test_advance__release_that_turns_bad_at_10_percent__is_rolled_back(
    world: Simulation, fault: dict[str, float]
) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    world.target.behave(2, **fault)
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.passages[-2].step == "canary@10"
    world.check_back_on(1)
    assert world.events()[-1] == "rolled_back v2"


def test_advance__canary_gives_no_metrics__is_rolled_back_long_before_the_step_ends(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    world.target.behave(2, is_silent=True)
    state = world.run(rollout.rollout_id, ticks=7)
    assert state.reason.startswith("the canary gave no metrics for")


def test_advance__release_that_does_not_start__gets_no_traffic(world: Simulation) -> None:
    world.target.behave(2, starts=False)
    rollout = world.begin()
    world.answer()
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert "ended while starting" in state.reason
    world.check_back_on(1)
    assert [routing for _, routing in world.target.history if routing != Routing()] == []


@pytest.mark.parametrize("is_first", [False, True])
def test_advance__canary_gone_between_its_readiness_and_its_traffic__is_waited_for_again(
    folders: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    world = Simulation(folders(), empty=is_first)
    rollout, engine, name = world.begin(), world.engine(), "promote" if is_first else "route"
    world.answer()
    call = getattr(world.target, name)
    gone = [Refusal("the slot canary", "is not ready", limit="a service that takes requests")] * 2

    def refuse(*arguments: object) -> None:
        if gone:
            raise gone.pop()
        call(*arguments)

    monkeypatch.setattr(world.target, name, refuse)
    for _ in range(2):
        world.tick()
        with pytest.raises(TryLater, match=r"not yet: .*is not ready"):
            engine.advance(rollout.rollout_id)
        assert not world.state(rollout.rollout_id).settled
    world.run(rollout.rollout_id, engine)
    world.check_promoted(2, None if is_first else 1)


def test_advance__canary_that_is_never_there_for_its_traffic__is_rolled_back_when_it_had_its_time(
    world: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, engine = world.begin(), world.engine()
    world.answer()
    route = world.target.route

    def refuse(routing: Routing) -> None:
        if routing != Routing():
            raise Refusal("the slot canary", "is not ready")
        route(routing)

    monkeypatch.setattr(world.target, "route", refuse)
    began, state = world.clock(), world.state(rollout.rollout_id)
    while not state.is_finished:
        world.tick(5)
        with suppress(TryLater):
            state = engine.advance(rollout.rollout_id)
    assert state.reason.startswith("it cannot take its traffic: the slot canary")
    assert world.clock() - began == pytest.approx(QUICK.ready_timeout_s, abs=11)
    world.check_back_on(1)


def test_advance__no_traffic_at_all__never_promotes(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    engine = world.engine()
    for _ in range(100):
        world.tick(requests=0)
        engine.advance(rollout.rollout_id)
    state = world.state(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.reason.startswith("still too little data after 60 s")
    world.check_back_on(1)


# Kills


def count_writes(folder: Path, *, fails: bool) -> list[str]:
    world, fuse = Simulation(folder, params=BRISK), Fuse()
    play(world, fuse, fails=fails)
    return fuse.names


def play(world: Simulation, fuse: Fuse, *, fails: bool) -> str:
    """A release with a kill on its way; a new engine goes on when the lease of the killed one is over."""
    rollout = world.begin()
    world.answer()
    engine = world.engine(fuse)
    for _ in range(90):
        if fails and world.state(rollout.rollout_id).step == CANARY_50:
            world.target.behave(2, error_rate=0.1)
        world.tick()
        try:
            if engine.advance(rollout.rollout_id).is_finished:
                break
        except Killed:
            world.tick(6)
            engine = world.engine()
    return rollout.rollout_id


@pytest.mark.parametrize("fails", [False, True], ids=["good", "bad-at-50"])
def test_advance__killed_at_each_write_and_called_again__ends_as_without_the_kill(
    folders: Callable[[], Path], fails: bool
) -> None:
    """Killed before a write; after it is before the next."""
    writes = count_writes(folders(), fails=fails)
    assert len(writes) >= 20
    for at in range(1, len(writes) + 1):
        world = Simulation(folders(), params=BRISK)
        rollout_id = play(world, Fuse(at), fails=fails)
        state = world.state(rollout_id)
        where = f"killed at write {at}, {writes[at - 1]}: {state.reason}"
        assert state.is_finished, where
        assert state.step == (ROLLED_BACK if fails else PROMOTED), where
        if fails:
            world.check_back_on(1)
        else:
            world.check_promoted(2, previous=1)
        events = world.events()
        steps = events.count("traffic v2")
        assert steps == (3 if fails else 4), where
        assert events.count("promoted v2") == (0 if fails else 1), where
        assert events.count("rolled_back v2") == (1 if fails else 0), where


def test_watchdog__engine_killed_at_each_write_and_never_back__gives_the_traffic_back(
    folders: Callable[[], Path],
) -> None:
    writes = count_writes(folders(), fails=False)
    for at in range(1, len(writes) + 1):
        world = Simulation(folders(), params=BRISK)
        rollout = world.begin()
        world.answer()
        engine, watchdog = world.engine(Fuse(at)), Watchdog(world.world(), lambda *_: None, world.clock)
        is_dead = False
        for _ in range(40):
            world.tick()
            if not is_dead:
                try:
                    engine.advance(rollout.rollout_id)
                except Killed:
                    is_dead = True
            watchdog.check()
        where = f"killed at write {at}, {writes[at - 1]}"
        actual = world.target.state()
        assert is_dead
        assert actual.routing == Routing(), where
        state = world.state(rollout.rollout_id)
        if state.step == ROLLED_BACK:
            world.check_back_on(1)
        elif state.step == PROMOTED:  # killed when nothing but records was left to write; the next engine writes them
            world.engine().advance(rollout.rollout_id)
            world.check_promoted(2, previous=1)
        else:
            assert state.step in (PENDING, Step(Phase.SHADOW)), where
            assert actual.slots[Slot.STABLE] == release(1)


@pytest.mark.parametrize("promoted", [False, True], ids=["canary", "promoted"])
def test_roll_back__killed_at_each_write__is_finished_by_the_watchdog(
    folders: Callable[[], Path], promoted: bool
) -> None:
    for at in range(1, 30):
        world = Simulation(folders(), params=BRISK)
        rollout = world.begin()
        world.answer()
        advance_to(world, rollout.rollout_id, PROMOTED if promoted else CANARY_10)
        fuse = Fuse(at)
        try:
            roll_back(world.world(fuse), MODEL, reason="by hand", by="on-call")
        except Killed:
            watchdog = Watchdog(world.world(), lambda *_: None, world.clock)
            for _ in range(8):
                world.tick()
                watchdog.check()
        else:
            assert at > 5
            break
        state = world.state(rollout.rollout_id)
        where = f"killed at write {at}, {fuse.names[-1]}"
        if at == 1:  # nothing had begun
            assert state.step == (PROMOTED if promoted else CANARY_10)
            continue
        assert state.is_finished, where
        assert state.step == ROLLED_BACK, where
        world.check_back_on(1)


# Two at once


def test_advance__another_engine_holds_the_lease__waits(world: Simulation) -> None:
    rollout = world.begin()
    world.rollouts.take_lease(rollout.rollout_id, "somebody", lease_s=5, now=world.clock())
    with pytest.raises(TryLater, match="somebody moves this release"):
        world.engine().advance(rollout.rollout_id)
    world.tick(5.1)
    assert world.engine().advance(rollout.rollout_id).step == PENDING


def test_take_lease__clock_was_set_back__is_not_held_for_ever(world: Simulation) -> None:
    rollout = world.begin()
    world.rollouts.take_lease(rollout.rollout_id, "somebody", lease_s=5, now=world.clock() + 3600)
    assert world.rollouts.take_lease(rollout.rollout_id, "me", lease_s=5, now=world.clock()).lease_owner == "me"


def test_save__lease_was_taken_over__is_refused(world: Simulation) -> None:
    rollout = world.begin()
    mine = world.rollouts.take_lease(rollout.rollout_id, "me", lease_s=5, now=world.clock())
    world.rollouts.take_lease(rollout.rollout_id, "you", lease_s=5, now=world.clock() + 6)
    with pytest.raises(StaleRolloutError):
        world.rollouts.save(mine, mine.document, is_open=True)


def test_begin__another_release_is_under_way__is_refused_and_the_same_one_is_found(world: Simulation) -> None:
    rollout = world.begin(2)
    assert world.begin(2) == rollout
    with pytest.raises(Refusal, match="is under way already"):
        world.begin(3)


def test_begin__the_champion__is_refused(world: Simulation) -> None:
    with pytest.raises(Refusal, match="is the champion already"):
        world.begin(1)


def test_advance__engine_slept_through_a_rollback__takes_back_what_it_routed(world: Simulation) -> None:
    """The watchdog rolled back while the engine stood between its intent and its route."""
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, Step(Phase.SHADOW))
    world_of_engine = world.world()
    engine = world.engine()
    engine._world = replace(world_of_engine, ledger=Interrupting(world))
    for _ in range(6):
        world.tick()
        state = engine.advance(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    world.check_back_on(1)


class Interrupting:
    """A ledger whose writer is overtaken by a rollback while it writes of traffic."""

    def __init__(self, world: Simulation) -> None:
        self._world = world

    def append(self, event: str, **fields: object) -> object:
        record = self._world.ledger.append(event, **fields)  # type: ignore[arg-type]
        if event == "traffic":
            world = self._world.world()
            world = replace(world, target=Keeping(world.target))  # the slot is still there when the engine routes
            roll_back(world, MODEL, reason="watchdog", by="watchdog")
        return record


class Keeping:
    def __init__(self, target: object) -> None:
        self._target = target

    def remove(self, slot: Slot) -> None:
        pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._target, name)


def test_advance__engine_hangs_in_the_promotion_until_a_rollback__records_no_promotion(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, Step(Phase.CANARY, 100))
    engine = world.engine()
    engine._world = replace(world.world(), target=Hanging(world))
    for _ in range(6):
        world.tick()
        state = engine.advance(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert "promoted v2" not in world.events()
    world.check_back_on(1)


class Hanging:
    """A target that promotes only when a rollback has come and gone, and its canary with it."""

    def __init__(self, world: Simulation) -> None:
        self._world = world

    def promote(self) -> None:
        roll_back(self._world.world(), MODEL, reason="watchdog", by="watchdog")
        self._world.target.promote()

    def __getattr__(self, name: str) -> object:
        return getattr(self._world.target, name)


def test_advance__traffic_was_taken_away_by_somebody__is_not_given_back(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    world.target.route(Routing())
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert "divided otherwise" in state.reason
    assert world.target.history[-1][1] == Routing()


# Approval


def test_advance__nobody_answers__waits_then_rejects_at_the_deadline(world: Simulation) -> None:
    rollout = world.begin()
    assert world.run(rollout.rollout_id, ticks=5).step == PENDING
    world.tick(72 * 3600)
    state = world.engine().advance(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.reason.startswith("nobody approved by")
    world.check_back_on(1)


def test_advance__rejected__names_who_and_why(world: Simulation) -> None:
    rollout = world.begin()
    world.tick()
    world.answer(approves=False, comment="the errors on 8 are worse")
    state = world.run(rollout.rollout_id)
    assert (state.step, state.reason) == (ROLLED_BACK, "rejected by approver: the errors on 8 are worse")


def test_advance__approved_by_who_asked__waits_and_says_who_could(world: Simulation) -> None:
    rollout = world.begin()
    world.answer("scheduler")
    state = world.run(rollout.rollout_id, ticks=3)
    assert state.step == PENDING
    assert "asked for the release and may not approve it as well; anybody but scheduler may" in state.waiting_for


def test_advance__evidence_changed_before_and_after_the_approval__releases_nothing(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    world.evidence[release(2)] = "f" * 64
    state = world.run(rollout.rollout_id, ticks=3)
    assert state.step == PENDING
    assert "approved evidence 222222222222, but it is ffffffffffff now" in state.waiting_for
    world.answer("second")
    advance_to(world, rollout.rollout_id, CANARY_10)
    world.evidence[release(2)] = "e" * 64
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.reason == "the evidence changed after it was approved (eeeeeeeeeeee now)"


def test_weigh__an_answer_not_yet_given__says_whether_it_would_count_and_changes_nothing(world: Simulation) -> None:
    rollout = world.begin()
    evidence = world.evidence[release(2)]
    moment = datetime.fromtimestamp(world.clock() + 1, UTC)
    world.clock.now += 2
    engine = world.engine()
    denied = engine.weigh(rollout.rollout_id, Response("scheduler", moment, True, evidence))
    assert (denied.outcome, [denial.rule for denial in denied.denials]) == ("waiting", ["requester"])
    assert engine.weigh(rollout.rollout_id, Response("approver", moment, True, evidence)).outcome == "approved"
    assert world.state(rollout.rollout_id) == rollout


def test_advance__limits_changed_after_the_approval__releases_nothing_more(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    row = world.rollouts.read(rollout.rollout_id)
    assert row is not None
    lenient = from_document(row.document)
    plan = Plan(lenient.plan.params.model_copy(update={"max_error_rate": 0.9}))
    world.rollouts.save(row, replace(lenient, plan=plan).to_document(), is_open=True, force=True)
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert state.reason.startswith("the evidence changed after it was approved")


# Clocks


def test_advance__clock_jumps_ahead_within_a_step__ends_no_step_early(folders: Callable[[], Path]) -> None:
    world = Simulation(folders(), params=QUICK.model_copy(update={"min_step_s": 50.0, "abandoned_after_s": 20.0}))
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, Step(Phase.SHADOW))
    world.target.serve(1000)
    engine = world.engine()
    for _ in range(3):
        world.tick()
        engine.advance(rollout.rollout_id)
    world.clock.now += 15  # within what a sign of life may take, and no more counts at once
    assert engine.advance(rollout.rollout_id).step == Step(Phase.SHADOW)


def test_advance__clock_is_set_back__goes_on(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    world.clock.now -= 3600
    state = world.run(rollout.rollout_id)
    assert state.step == PROMOTED
    world.check_promoted(2, previous=1)


def test_advance__clock_jumps_an_hour_ahead__traffic_ends_on_the_champion(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    world.clock.now += 3600
    state = world.run(rollout.rollout_id)
    assert state.step == ROLLED_BACK
    assert "nobody moved the release for 360" in state.reason
    world.check_back_on(1)


# What the rollback does


def test_roll_back__promoted_release__goes_back_to_the_warm_one(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    world.run(rollout.rollout_id)
    outcome = roll_back(world.world(), MODEL, reason="wrong on 8", by="on-call")
    assert outcome.is_recorded
    assert outcome.text.startswith("digits-classification v2 rolled back at promoted: v1 answers all requests")
    world.check_back_on(1)
    again = roll_back(world.world(), MODEL, reason="nervous", by="on-call")
    assert again.traffic_s is None
    assert "was rolled back already: wrong on 8" in again.text
    assert "the reason given now (nervous) is not recorded" in again.text
    world.check_back_on(1)


def test_roll_back__previous_is_no_longer_warm__starts_it_first(world: Simulation) -> None:
    first = world.begin(2)
    world.answer()
    world.run(first.rollout_id)
    world.target.behave(3, error_rate=0.5)
    second = world.begin(3)
    world.answer(version=3)
    assert world.run(second.rollout_id).step == ROLLED_BACK
    assert Slot.CANARY not in world.target.state().slots
    outcome = roll_back(world.world(), MODEL, reason="wrong on 8", by="on-call", version="2")
    assert outcome.is_recorded
    world.check_back_on(1)


def test_roll_back__model_that_was_never_released__names_those_that_were(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    with pytest.raises(Refusal, match=f"was never released.*limit: one of {MODEL}"):
        roll_back(world.world(), "xray-clasification", reason="x", by="on-call")
    assert world.target.state().routing.canary_percent == 10


def test_roll_back__first_release__is_refused_with_the_way_out(folders: Callable[[], Path]) -> None:
    world = Simulation(folders(), empty=True)
    rollout = world.begin(1)
    world.answer(version=1)
    world.run(rollout.rollout_id)
    with pytest.raises(Refusal, match="there is none before it"):
        roll_back(world.world(), MODEL, reason="x", by="on-call")
    world.check_promoted(1, previous=None)


def test_roll_back__database_locked__moves_the_traffic_and_the_watchdog_records_it(
    world: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    monkeypatch.setattr("pipelines.registry.rollout_table.SQLITE_WAIT_S", 0.1)
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    from pipelines.registry.rollout_table import RolloutTable

    world.rollouts = RolloutTable(world.url)
    lock = sqlite3.connect(world.url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    outcome = roll_back(world.world(), MODEL, reason="wrong on 8", by="on-call")
    assert world.target.state().routing == Routing()
    assert not outcome.is_recorded
    assert world.state(rollout.rollout_id).step == CANARY_10
    lock.execute("ROLLBACK")
    watchdog = Watchdog(world.world(), lambda *_: None, world.clock)
    for _ in range(6):
        world.tick()
        watchdog.check()
    assert world.state(rollout.rollout_id).is_finished
    world.check_back_on(1)


def test_roll_back__mlflow_is_away_after_a_promotion__moves_the_traffic_first(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    world.run(rollout.rollout_id)
    world.aliases.is_away = True
    outcome = roll_back(world.world(), MODEL, reason="wrong on 8", by="on-call")
    assert world.target.state().slots[Slot.STABLE] == release(1)
    assert not outcome.is_recorded
    world.aliases.is_away = False
    Watchdog(world.world(), lambda *_: None, world.clock).check()
    assert world.state(rollout.rollout_id).is_finished
    world.check_back_on(1)


def test_advance__mlflow_is_away_at_the_promotion__is_finished_later(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, Step(Phase.CANARY, 100))
    world.aliases.is_away = True
    engine = world.engine()
    with pytest.raises(TryLater, match="MLflow"):
        world.run(rollout.rollout_id, engine)
    assert world.target.state().slots[Slot.STABLE] == release(2)
    Watchdog(world.world(), lambda *_: None, world.clock).check()
    world.aliases.is_away = False
    assert world.run(rollout.rollout_id).step == PROMOTED
    world.check_promoted(2, previous=1)


def test_advance__canary_cannot_be_asked_when_a_step_begins__counts_nothing_of_the_steps_before(
    world: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, Step(Phase.SHADOW))
    observe, asked = world.target.observe, []

    def observe_but_once(slot: Slot) -> SlotCounters | None:
        asked.append(slot)
        return None if asked.count(Slot.CANARY) == 2 else observe(slot)  # after the look, for the step's beginning

    monkeypatch.setattr(world.target, "observe", observe_but_once)
    engine = world.engine()
    while world.state(rollout.rollout_id).step != CANARY_10:
        world.tick()
        asked.clear()
        engine.advance(rollout.rollout_id)
    assert asked.count(Slot.CANARY) == 3
    counted, state = observe(Slot.CANARY), world.state(rollout.rollout_id)
    assert counted is not None
    assert counted.requests > 0
    assert state.baseline.canary == counted


def test_document__of_a_state__comes_back_equal(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    advance_to(world, rollout.rollout_id, CANARY_10)
    state = world.state(rollout.rollout_id)
    assert state.baseline.canary is not None
    assert from_document(state.to_document()) == state
