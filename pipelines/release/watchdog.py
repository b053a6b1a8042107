"""Takes a canary's traffic away when its gates are breached or nobody moves it any more; needs no scheduler.

It gives traffic to nobody and renews nothing: a release goes forward by the engine alone.  What it looks for, every
second:

- a gate of the step says roll back, or the canary has given no metrics for too long;
- nobody has renewed the rollout's lease for `abandoned_after_s`, by the watchdog's own clock;
- traffic is divided otherwise than the rollout says: a rollback that was killed half-way, an engine that woke up after
  its lease was gone, a hand on the routes;
- a recorded rollback that nobody finished.

Without the database it goes on with what it read last, and once that is as old as `abandoned_after_s`, takes the
traffic away all the same.  The share of the step that follows is not too much meanwhile: the engine wrote that step
down before it moved traffic, and the database may have gone before anybody here could read it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from pipelines.core.rollout_rows import RolloutRow, StaleRolloutError
from pipelines.errors import PerchError, TryLater
from pipelines.release import rollback
from pipelines.release.engine import ROLL_BACK, look
from pipelines.release.rollout_state import RolloutState, StepReading, from_document
from pipelines.release.steps import PROMOTED, ROLLED_BACK
from pipelines.release.targets import Routing, Slot, TargetState
from pipelines.release.world import World

BY = "watchdog"
INTERVAL_S = 1.0
_GRACE_S = 3.0  # for whoever took traffic away to write down why
_UNREADY_S = 1.0  # a canary that is only busy answers the second time
_log = logging.getLogger(__name__)


@dataclass
class _Pulse:
    """When a rollout last showed a sign of life, by the monotonic clock of this process."""

    renewals: int
    at: float


class Watchdog:
    """Looks at every rollout again and again.

    Args:
        world: what it acts upon.
        alert: sends a title and a text to people.
        monotonic: seconds that never jump.
    """

    def __init__(
        self, world: World, alert: Callable[[str, str], object], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._world, self._alert, self._monotonic = world, alert, monotonic
        self._rows: list[RolloutRow] = []
        self._read_at = monotonic()
        self._pulses: dict[str, _Pulse] = {}
        self._blind_since: dict[str, float] = {}
        self._trouble_since: dict[str, float] = {}
        self._readings: dict[tuple[str, str], StepReading] = {}
        self._unrecorded: dict[str, str] = {}  # why traffic was taken away, until the database takes it
        self._said: set[str] = set()  # in the look before
        self._saying: set[str] = set()  # in this one

    def run(self, stop: threading.Event, interval_s: float = INTERVAL_S) -> None:
        """Look once per interval until told to stop; no failure of a look ends it."""
        while not stop.wait(interval_s):
            try:
                self.check()
            except Exception as failure:  # noqa: BLE001 - a watchdog that dies of a defect protects nobody
                self._tell(failure)

    def check(self) -> list[str]:
        """Look once.

        Returns:
            What was done, one line each.

        Raises:
            TryLater: the target does not answer.
            Exception: whatever else the look at one release failed with, after the looks at the others; where several
                failed, what the first did, and the others are told.
        """
        now = self._monotonic()
        self._said, self._saying = self._saying, set()
        try:
            self._rows = self._world.glance.list_current()
            self._read_at = now
        except TryLater as error:
            self._tell(error)
        done: list[str] = []
        failures: list[Exception] = []
        for row in self._rows:
            try:
                state = from_document(row.document)
                text = self._check_open(row, state) if row.is_open else self._check_closed(row, state)
            except Exception as failure:  # noqa: BLE001 - of one model, which must not keep the others from a look
                failure.add_note(f"in the look at {row.rollout_id}")
                failures.append(failure)
                continue
            if text:
                _log.warning(text)
                done.append(text)
        if failures:
            for other in failures[1:]:
                self._tell(other)
            raise failures[0]
        return done

    def _check_open(self, row: RolloutRow, state: RolloutState) -> str:
        if state.step == ROLLED_BACK:
            with suppress(StaleRolloutError):
                rollback.finish_rollback(self._world, row)
                return f"{row.rollout_id}: finished a rollback"
            return ""
        known = self._unrecorded.get(row.rollout_id, "")
        why = known or self._find_reason(row, state)
        if not why or not self._is_still(row, state):
            return ""
        judged = replace(state, reading=self._readings.get((row.rollout_id, state.step.name), state.reading))
        try:
            outcome = rollback.roll_back(self._world, row.model, reason=why, by=BY, judged=judged)
        except TryLater:
            if known:  # the traffic has moved; that it cannot be written down yet must not end the look at others
                return ""
            raise
        if outcome.is_recorded:
            self._unrecorded.pop(row.rollout_id, None)
        else:
            self._unrecorded[row.rollout_id] = why
        if known:  # people know already
            return outcome.text if outcome.is_recorded else ""
        self._alert(f"{row.model} v{state.release.version} rolled back", outcome.text)
        return outcome.text

    def _find_reason(self, row: RolloutRow, state: RolloutState) -> str:
        """Why a rollout has to be taken back now; empty where it may go on."""
        if state.is_first:
            return ""  # nowhere to take traffic to
        seen = None
        if state.settled and state.step.is_watched:
            # Before the target says who is ready: a canary whose event loop is blocked keeps that question waiting.
            key = (row.rollout_id, state.step.name)
            seen, reading = look(self._world, replace(state, reading=self._readings.get(key, state.reading)))
            self._readings[key] = reading
            if reading.verdict == ROLL_BACK:
                return reading.reason
        actual = self._world.target.state()
        if actual.routing == Routing() and not state.step.is_watched:
            return ""  # nothing to take away
        limit_s = state.plan.params.abandoned_after_s
        silence_s = self._silence_s(row)
        if silence_s > limit_s:
            return f"nobody moved the release for {silence_s:.0f} s (limit: {limit_s:g} s)"
        state = self._perhaps_later(state, actual)
        given, has = 100 if state.step == PROMOTED else state.step.percent, actual.routing.canary_percent
        if has > given:
            return f"the canary has {has} % of the traffic, {state.step.name} gives {given} %"
        if seen is None:
            return ""
        if why := self._lasting_trouble(row, state, actual):
            return why
        return self._blindness(row, seen)

    def _perhaps_later(self, state: RolloutState, actual: TargetState) -> RolloutState:
        """The rollout a step further, where traffic is divided as that step gives and the database does not answer."""
        if not (state.settled and state.step.is_watched) or actual.routing == state.step.routing:
            return state
        following = state.plan.after(state.step, is_first=state.is_first)
        if not following.is_watched or actual.routing != following.routing:
            return state
        try:
            self._world.glance.list_current()
        except TryLater:
            return replace(state, step=following)
        return state  # whether it is still there, the caller asks

    def _lasting_trouble(self, row: RolloutRow, state: RolloutState, actual: TargetState) -> str:
        why = rollback.trouble(state, actual)
        if why and rollback.may_pass(state, actual):
            since = self._trouble_since.setdefault(row.rollout_id, self._monotonic())
            grace_s = _GRACE_S if actual.routing != state.step.routing else _UNREADY_S
            return why if self._monotonic() - since >= grace_s else ""
        self._trouble_since.pop(row.rollout_id, None)
        return why

    def _blindness(self, row: RolloutRow, state: RolloutState) -> str:
        if state.reading and state.reading.gates:
            self._blind_since.pop(row.rollout_id, None)
            return ""
        limit_s = state.plan.params.max_blind_s
        since = self._blind_since.setdefault(row.rollout_id, self._monotonic())
        blind_s = self._monotonic() - since
        return f"the canary gave no metrics for {blind_s:.0f} s (limit: {limit_s:g} s)" if blind_s > limit_s else ""

    def _check_closed(self, row: RolloutRow, state: RolloutState) -> str:
        """What is over must leave no traffic to a canary, and what was taken back must be written down."""
        if any(other.is_open and other.model == row.model for other in self._rows):
            return ""
        actual = self._world.target.state()
        stable, canary = actual.slots.get(Slot.STABLE), actual.slots.get(Slot.CANARY)
        interrupted = rollback.is_interrupted_rollback(state, actual)
        has_traffic = actual.routing != Routing() and stable is not None and canary and canary.model == row.model
        if not interrupted and not has_traffic:
            self._trouble_since.pop(row.rollout_id, None)
            return ""
        since = self._trouble_since.setdefault(row.rollout_id, self._monotonic())
        if self._monotonic() - since < _GRACE_S or not self._is_still(row, state):
            return ""
        self._trouble_since.pop(row.rollout_id)
        if interrupted:
            reason = "a rollback that was interrupted"
            text = rollback.roll_back(self._world, row.model, reason=reason, by=BY, judged=state).text
        else:
            self._world.target.route(Routing())
            text = f"{row.model}: a canary had traffic, though {row.rollout_id} is {state.step.name}; taken away"
        self._alert(f"{row.model}: traffic taken away", text)
        return text

    def _silence_s(self, row: RolloutRow) -> float:
        """Seconds since a sign of the engine: by the wall clock at the first sight of it, by this process's after."""
        pulse = self._pulses.get(row.rollout_id)
        if pulse is None or pulse.renewals != row.renewals:
            age_s = 0.0 if pulse else max(0.0, self._world.clock() - row.renewed_at)
            pulse = self._pulses[row.rollout_id] = _Pulse(row.renewals, self._read_at - age_s)
        return self._monotonic() - pulse.at

    def _is_still(self, row: RolloutRow, state: RolloutState) -> bool:
        """Whether the rollout is still where it was when the target was asked; a step in between explains much."""
        try:
            now = next(known for known in self._world.glance.list_current() if known.rollout_id == row.rollout_id)
        except (TryLater, StopIteration):
            return True  # nobody can have written
        known = from_document(now.document)
        return (known.step, known.settled, now.is_open) == (state.step, state.settled, row.is_open)

    def _tell(self, failure: Exception) -> None:
        """Log a failure when it begins, not every second; a defect with where it is."""
        if isinstance(failure, PerchError):
            text, defect = str(failure), None
        else:
            text, defect = repr(failure), failure
        if text not in self._said | self._saying:
            _log.error("%s", text, exc_info=defect)
        self._saying.add(text)
