"""Engines, kills, watchdog, faults and people in any order: what must hold after each of them, and at the end."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipelines.core.champions import champions_by_ledger
from pipelines.errors import TryLater
from pipelines.release.rollback import roll_back
from pipelines.release.steps import PENDING, PROMOTED, ROLLED_BACK
from pipelines.release.targets import Routing, Slot
from pipelines.release.watchdog import Watchdog
from tests.unit.release.simulated_release import MODEL, QUICK, Clock, Fuse, Killed, Simulation, release

MEMORY = Path("/dev/shm")


class Rollouts(RuleBasedStateMachine):
    """v1 serves; v2 is released amid all that can happen."""

    @initialize(looks=st.sampled_from([0, 4, 9]))
    def begin(self, looks: int) -> None:
        """At the approval, in the canary, or promoted: much must happen there, and chance seldom comes so far."""
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.world = Simulation(Path(self.folder.name), params=QUICK.model_copy(update={"min_step_s": 1.0}))
        self.monotonic = Clock(0.0)
        self.watchdog = Watchdog(self.world.world(), lambda *_: None, self.monotonic)
        self.rollout = self.world.begin()
        self.engine = self.world.engine()
        self.approved = looks > 0
        if self.approved:
            self.world.answer()
        for _ in range(looks):
            self.time_passes(1.0, 600)
            self.engine.advance(self.rollout.rollout_id)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]), requests=st.sampled_from([0, 60, 600]))
    def time_passes(self, seconds: float, requests: int) -> None:
        self.world.tick(seconds, requests)
        self.monotonic.now += seconds

    @rule(seconds=st.sampled_from([-3600.0, 10.0, 86_400.0]))
    def wall_clock_jumps(self, seconds: float) -> None:
        if self.world.state(self.rollout.rollout_id).step != PENDING:  # a deadline is kept by the wall clock
            self.world.clock.now += seconds

    @precondition(lambda self: not self.approved)
    @rule()
    def somebody_approves(self) -> None:
        self.world.answer()
        self.approved = True

    @rule(times=st.integers(1, 5))
    def engine_looks(self, times: int) -> None:
        for _ in range(times):
            self.time_passes(1.0, 600)
            with suppress(TryLater):
                self.engine.advance(self.rollout.rollout_id)

    @rule(at=st.integers(1, 6))
    def engine_is_killed(self, at: int) -> None:
        engine = self.world.engine(Fuse(at))
        with suppress(Killed, TryLater):
            for _ in range(3):
                self.time_passes(1.0, 600)
                engine.advance(self.rollout.rollout_id)
        self.engine = self.world.engine()

    @rule()
    def another_engine_looks(self) -> None:
        with suppress(TryLater):
            self.world.engine().advance(self.rollout.rollout_id)

    @rule()
    def watchdog_looks(self) -> None:
        self.watchdog.check()

    @rule()
    def watchdog_is_restarted(self) -> None:
        self.watchdog = Watchdog(self.world.world(), lambda *_: None, self.monotonic)

    @rule(error_rate=st.sampled_from([0.0, 0.3]), is_silent=st.booleans())
    def canary_changes(self, error_rate: float, is_silent: bool) -> None:
        self.world.target.behave(2, error_rate=error_rate, is_silent=is_silent)

    @rule(is_away=st.booleans())
    def mlflow_comes_or_goes(self, is_away: bool) -> None:
        self.world.aliases.is_away = is_away

    @rule(at=st.integers(0, 7))
    def somebody_rolls_back(self, at: int) -> None:
        with suppress(Killed):
            roll_back(self.world.world(Fuse(at)), MODEL, reason="by hand", by="on-call")

    @invariant()
    def nothing_is_released_without_an_approval(self) -> None:
        if not self.approved:
            assert self.world.target.state().routing == Routing()
            assert self.world.target.state().slots[Slot.STABLE] == release(1)

    @invariant()
    def the_ledger_is_whole_and_each_event_is_in_it_once(self) -> None:
        events = [event for event in self.world.events() if event != "traffic v2"]
        assert len(events) == len(set(events))
        assert self.world.ledger.verify() == []

    @invariant()
    def clients_are_always_answered_by_somebody(self) -> None:
        state = self.world.target.state()
        assert Slot.STABLE in state.slots
        assert state.routing == Routing() or Slot.CANARY in state.slots

    def teardown(self) -> None:
        """Left to a watchdog and an engine with everything in order, it ends, and all agree how."""
        if not hasattr(self, "world"):
            return
        self.world.aliases.is_away = False
        for _ in range(40):
            self.time_passes(1.0, 600)
            self.watchdog.check()
            with suppress(TryLater):
                self.engine.advance(self.rollout.rollout_id)
        state = self.world.state(self.rollout.rollout_id)
        if not self.approved and not state.is_finished:
            assert state.step == PENDING
        else:
            assert state.is_finished, (state.step, state.settled)
            if state.step == PROMOTED:
                self.world.check_promoted(2, previous=1)
            else:
                assert state.step == ROLLED_BACK
                self.world.check_back_on(1)
                assert champions_by_ledger(self.world.ledger.entries(), MODEL).champion == "1"
        self.folder.cleanup()


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
