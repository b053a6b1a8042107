"""The release engine: moves a rollout by at most one step per call, and ends the same wherever it was killed.

A step forward is four writes, each of which may be the last one before a kill:

1. the intent: the row says which step is entered, on which evidence, `settled` false;
2. the ledger's row, keyed by rollout and step, with the evidence of the intent;
3. the effect: a slot, a share of the traffic, aliases;
4. `settled` true.

The next call finds the intent and does 2 to 4 again; each finds by itself whether it was done.  Traffic that somebody
took away in between is not given back (`rollback.trouble`), and an intent that nobody came back to for
`abandoned_after_s` is rolled back instead of finished.

One engine at a time holds the rollout's lease.  One that slept through its lease is refused at its next write; what it
did to the traffic between, the watchdog takes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipelines.core.rollout_rows import RolloutRow, StaleRolloutError
from pipelines.errors import Refusal, TryLater
from pipelines.release import rollback
from pipelines.release.approvals import ApprovalRequest, Response
from pipelines.release.policy import Decision, decide
from pipelines.release.rollout_state import Passage, RolloutState, StepReading, from_document
from pipelines.release.steps import PENDING, ROLLED_BACK, Phase, Plan, Step
from pipelines.release.targets import ReleaseRef, Slot
from pipelines.release.windows import Window, observe_baseline, observe_window, zero_of
from pipelines.release.world import World

PROMOTE, ROLL_BACK, NEED_MORE_DATA = "promote", "roll back", "need more data"
_GRACE_S = 2.0
_SLICE = 3  # a wait is cut so that the lease is renewed three times before it ends


@dataclass(frozen=True)
class ReleaseRequest:
    """What is asked of the engine.

    Attributes:
        release: what is to be released.
        champion: what it would replace; None where nothing was ever released.
        requested_by: who asked.
        evidence_sha256: of what the approvers are shown.
        run_id: of the run that trained it.
        forecast: what its gates are expected to need.
    """

    release: ReleaseRef
    champion: ReleaseRef | None
    requested_by: str
    evidence_sha256: str
    run_id: str = ""
    forecast: Mapping[str, Any] | None = None


class ReleaseEngine:
    """Moves rollouts.

    Args:
        world: what it acts upon.
        owner: its name in the lease, unlike that of any other engine.
    """

    def __init__(self, world: World, owner: str) -> None:
        self._world = world
        self._owner = owner

    def begin(self, request: ReleaseRequest, plan: Plan) -> RolloutState:
        """Begin a rollout; the one of the same release that is under way is returned as it is.

        Raises:
            Refusal: another release of the model is under way, this one serves already, or another model is live here.
            TryLater: the database did not answer.
        """
        world, release = self._world, request.release
        rows = world.rollouts.list_rollouts(release.model)
        for row in rows:
            state = from_document(row.document)
            if row.is_open and state.release == release:
                if state.step == PENDING and state.is_first:  # it may have begun while nothing ran
                    self._refuse_another_model(release)
                return state
        if request.champion == release:
            raise Refusal(
                f"{release.model} v{release.version}", "is the champion already", way_out="`perch releases` lists them"
            )
        if request.champion is None:
            self._refuse_another_model(release)
        now = world.clock()
        rollout_id = f"{release.model}:{release.version}:{release.digest[:12]}:{len(rows) + 1}"
        state = RolloutState(
            rollout_id=rollout_id,
            release=release,
            champion=request.champion,
            plan=plan,
            requested_by=request.requested_by,
            requested_at=now,
            evidence_sha256=request.evidence_sha256,
            run_id=request.run_id,
            entered_at=now,
            seen_at=now,
            passages=(Passage(PENDING.name, now),),
            forecast=request.forecast or {},
        )
        return from_document(world.rollouts.create(rollout_id, release.model, state.to_document(), now=now).document)

    def _refuse_another_model(self, release: ReleaseRef) -> None:
        """Before anybody is asked: a first release would end in a rollback after the approval (`_enter`).

        A target that does not answer refuses nothing; `_enter` looks again.
        """
        with suppress(TryLater):
            serving = self._world.target.state().slots.get(Slot.STABLE)
            if serving is None or serving == release:
                return
            own_home = (
                f"`export PERCH_HOME=$HOME/perch-{release.model}`, in each terminal of this model, then `perch run`, "
                "`perch up` (it takes free ports) and release there; on a cluster, another namespace"
            )
            raise Refusal(
                f"the first release of {release.model} v{release.version}",
                f"has no slot here: the stable one holds {serving.model} v{serving.version}",
                limit="one home serves one model",
                way_out=(
                    own_home
                    if serving.model != release.model
                    else "the ledger has no champion of this model, so it is not the one of these slots: restore it"
                ),
            )

    def advance(self, rollout_id: str) -> RolloutState:
        """Look at a rollout and take one step if it is due; a call that finds nothing to do changes nothing.

        Raises:
            Refusal: there is no such rollout.
            TryLater: another engine is at it, or something does not answer; nothing is lost.
        """
        world = self._world
        row = self._required(rollout_id)
        if not row.is_open:
            return from_document(row.document)
        plan = from_document(row.document).plan
        silence_s = world.clock() - row.renewed_at
        row = world.rollouts.take_lease(rollout_id, self._owner, lease_s=plan.params.lease_s, now=world.clock())
        try:
            return self._advance(row, silence_s)
        except StaleRolloutError:
            # A rollback, or an engine that took over, came between.  What this one did to the traffic must not stay.
            now = self._required(rollout_id)
            if from_document(now.document).step == ROLLED_BACK:
                rollback.move_traffic_back(world, from_document(now.document))
            return from_document(self._required(rollout_id).document)
        finally:
            with suppress(TryLater):
                world.rollouts.release_lease(rollout_id, row.token)

    def _required(self, rollout_id: str) -> RolloutRow:
        row = self._world.rollouts.read(rollout_id)
        if row is None:
            raise Refusal(f"the release {rollout_id}", "is not there", way_out="`perch releases` lists them")
        return row

    def _advance(self, row: RolloutRow, silence_s: float) -> RolloutState:
        state = from_document(row.document)
        if not row.is_open:
            return state
        if state.step == ROLLED_BACK:
            return rollback.finish_rollback(self._world, row)
        limit_s = state.plan.params.abandoned_after_s
        if silence_s > limit_s and self._has_traffic(state):
            return self._roll_back(state, f"nobody moved the release for {silence_s:.0f} s (limit: {limit_s:g} s)")
        if not state.settled:
            return self._enter(row, state)
        if state.step == PENDING:
            return self._consider_approval(row, state)
        return self._watch(row, state)

    def _has_traffic(self, state: RolloutState) -> bool:
        routing = self._world.target.state().routing
        return state.step != PENDING and (routing.canary_percent > 0 or routing.mirror)

    # Approval.

    def _consider_approval(self, row: RolloutRow, state: RolloutState) -> RolloutState:
        world = self._world
        request = self.approval_request(state, state.evidence_sha256)
        responses = world.approvals.responses(request)
        if responses:  # only an answer is worth reading all the evidence again
            request = self.approval_request(state)
        decision = decide(world.policy, request, responses, _moment(world.clock()))
        if decision.outcome == "rejected":
            return self._roll_back(state, decision.reason, by="approval")
        if decision.outcome == "approved":
            return self._step_forward(row, replace(state, approvals=decision.approvals, needs_answer=False), {})
        waiting_for = "\n".join([decision.reason, *(denial.reason for denial in decision.denials)])
        needs_answer = len(decision.approvals) < world.policy.rule_for(state.release.model).min_approvals
        if (waiting_for, needs_answer) != (state.waiting_for, state.needs_answer):
            waiting = replace(state, waiting_for=waiting_for, needs_answer=needs_answer)
            world.rollouts.save(row, waiting.to_document(), is_open=True)
            return waiting
        return state

    def weigh(self, rollout_id: str, *more: Response) -> Decision:
        """What the recorded answers to a rollout's request amount to, with the evidence as it is now; changes nothing.

        Args:
            rollout_id: names the rollout.
            more: answers that are not recorded yet, to learn whether they would count.

        Raises:
            Refusal: there is no such rollout.
            TryLater: the place of the answers, MLflow or the database does not answer.
        """
        world, state = self._world, from_document(self._required(rollout_id).document)
        request = self.approval_request(state)
        return decide(world.policy, request, (*world.approvals.responses(request), *more), _moment(world.clock()))

    def approval_request(self, state: RolloutState, evidence_sha256: str = "") -> ApprovalRequest:
        """What is asked of approvers: with the evidence as it is now, so that an answer to another one is void.

        Args:
            state: of the rollout.
            evidence_sha256: instead of reading it now.
        """
        return ApprovalRequest(
            rollout_id=state.rollout_id,
            model=state.release.model,
            version=state.release.version,
            evidence_sha256=evidence_sha256 or self._world.evidence(state.release, state.plan),
            requested_by=state.requested_by,
            requested_at=_moment(state.requested_at),
        )

    # Watching.

    def _watch(self, row: RolloutRow, state: RolloutState) -> RolloutState:
        world = self._world
        # The gates first: a canary whose event loop is blocked keeps the question who is ready waiting.
        looked, reading = look(world, state)
        if reading.verdict == ROLL_BACK:
            return self._roll_back(looked, reading.reason)
        actual = world.target.state()
        if (why := rollback.trouble(state, actual)) and rollback.may_pass(state, actual):
            world.pause(_GRACE_S)
            if self._required(state.rollout_id).revision != row.revision:
                raise StaleRolloutError(f"{state.rollout_id}: somebody else moved this release meanwhile")
            why = rollback.trouble(state, world.target.state())
        if why:
            return self._roll_back(looked, why)
        state = looked
        params = state.plan.params
        if state.blind_s > params.max_blind_s:
            why = f"the canary gave no metrics for {state.blind_s:.0f} s (limit: {params.max_blind_s:g} s)"
            return self._roll_back(state, why)
        if reading.verdict == PROMOTE and state.elapsed_s >= params.min_step_s:
            frozen = world.policy.frozen(state.release.model, _moment(world.clock()))
            if not frozen:
                return self._step_forward(row, state, _because(reading))
            state = replace(state, waiting_for=frozen)
        elif state.elapsed_s >= params.max_step_s:
            lacking = [gate.text for gate in reading.gates if gate.verdict != PROMOTE] or [reading.reason]
            why = f"still too little data after {state.elapsed_s:.0f} s: {'; '.join(lacking)}"
            return self._roll_back(state, why)
        world.rollouts.save(row, state.to_document(), is_open=True)
        return state

    # Steps.

    def _step_forward(self, row: RolloutRow, state: RolloutState, because: Mapping[str, Any]) -> RolloutState:
        """Write down the intent of the next step, then enter it."""
        world = self._world
        evidence_sha256 = world.evidence(state.release, state.plan)
        if any(answer.evidence_sha256 != evidence_sha256 for answer in state.approvals):
            return self._roll_back(state, f"the evidence changed after it was approved ({evidence_sha256[:12]} now)")
        step = state.plan.after(state.step, is_first=state.is_first)
        now = world.clock()
        runs = world.target.state().slots.get(Slot.CANARY) == state.release
        requests, probes = (state.reading.requests, state.reading.probes) if state.reading else (0, 0)
        intent = replace(
            state,
            step=step,
            settled=False,
            step_evidence=_step_evidence(state, step, because),
            entered_at=now,
            elapsed_s=0.0,
            blind_s=0.0,
            seen_at=now,
            baseline=observe_baseline(world.target, canary_runs=runs),
            reading=None,
            waiting_for="",
            passages=(*state.passages, Passage(step.name, now, str(because.get("reason", "")), requests, probes)),
        )
        row = world.rollouts.save(row, intent.to_document(), is_open=True)
        return self._enter(row, intent)

    def _enter(self, row: RolloutRow, state: RolloutState) -> RolloutState:
        """Do what the intent says: ledger, effect, aliases; then settle."""
        world, course = self._world, state.plan.course(is_first=state.is_first)
        if state.step == course[1]:
            self._record_approvals(state)
        serving = world.target.state().slots.get(Slot.STABLE)
        is_promoted = serving == state.release
        if state.is_first and serving is not None and not is_promoted:
            # It would take all of that one's traffic at once, for there is no champion to compare it with.
            return self._roll_back(
                state,
                f"the stable slot holds {serving.model} v{serving.version}, and the ledger has no champion of "
                f"{state.release.model}; release another model from a home of its own, or restore the ledger",
            )
        if not is_promoted:
            try:
                self._ensure_canary(row, state)
            except Refusal as refusal:
                return self._roll_back(state, f"it does not start: {refusal}")
            except TryLater as error:
                if world.clock() - state.entered_at > state.plan.params.ready_timeout_s:
                    return self._roll_back(state, f"it did not become ready: {error}")
                raise
        self._require_own(row)
        try:
            if state.step.phase is Phase.PROMOTED:
                self._promote(row, state, is_promoted=is_promoted)
            else:
                self._append("traffic", state, state.step_evidence)
                world.target.route(state.step.routing)
        except Refusal as refusal:
            # It was ready a moment ago: a pod that was ended is made again, and the next call waits for it first.
            if world.clock() - state.entered_at > state.plan.params.ready_timeout_s:
                return self._roll_back(state, f"it cannot take its traffic: {refusal}")
            raise TryLater(f"{state.rollout_id}: {state.step.name} not yet: {refusal}") from refusal
        baseline, now = state.baseline, world.clock()
        if state.step.is_watched and baseline.canary is None and (seen := world.target.observe(Slot.CANARY)):
            # It is made for the first step; in a later one, what it has counted is of the steps before.
            baseline = replace(baseline, canary=zero_of(seen) if state.step == course[1] else seen)
        settled = replace(state, settled=True, baseline=baseline, entered_at=now, seen_at=now)
        world.rollouts.save(row, settled.to_document(), is_open=not settled.step.is_last)
        return settled

    def _require_own(self, row: RolloutRow) -> None:
        """Before the ledger, which has no lease: what waited for a slot may have been rolled back meanwhile.

        Raises:
            StaleRolloutError: somebody else wrote the row, or holds its lease.
        """
        now = self._required(row.rollout_id)
        if (now.revision, now.token) != (row.revision, row.token):
            raise StaleRolloutError(f"{row.rollout_id}: somebody else moved this release meanwhile")

    def _promote(self, row: RolloutRow, state: RolloutState, *, is_promoted: bool) -> None:
        """Route, then ledger, then aliases."""
        world, release = self._world, state.release
        if state.is_first:
            skipped = [step.name for step in state.plan.course(is_first=False)[1:-1]]
            reason = "the first release: there is no champion to compare it with"
            evidence = {**state.step_evidence, "skipped": skipped, "reason": reason}
            self._append("traffic", state, evidence)
        if not is_promoted:
            world.target.promote()
            self._require_own(row)
        self._append("promoted", state, state.step_evidence)
        previous = state.champion.version if state.champion else None
        world.aliases.move(release.model, {"champion": release.version, "previous": previous})

    def _ensure_canary(self, row: RolloutRow, state: RolloutState) -> None:
        """Have the release run in the canary's slot, and keep the lease while it starts.

        Raises:
            Refusal: it ended instead of becoming ready.
            TryLater: it was not ready in time, or the target does not answer.
        """
        world, params = self._world, state.plan.params
        if world.target.state().slots.get(Slot.CANARY) != state.release:
            world.target.deploy(Slot.CANARY, state.release)
        for left in range(math.ceil(params.ready_timeout_s / params.lease_s * _SLICE), 0, -1):
            try:
                world.target.wait_ready(Slot.CANARY, params.lease_s / _SLICE)
            except TryLater:
                if left == 1:
                    raise
                taken = world.rollouts.take_lease(
                    state.rollout_id, self._owner, lease_s=params.lease_s, now=world.clock()
                )
                if (taken.revision, taken.token) != (row.revision, row.token):
                    raise StaleRolloutError(f"{state.rollout_id}: somebody else moved this release meanwhile") from None
            else:
                return

    def _record_approvals(self, state: RolloutState) -> None:
        for answer in state.approvals:
            evidence = {
                "rollout": state.rollout_id,
                "run_id": state.run_id,
                "by": answer.responder,
                "comment": answer.comment,
                "answered_at": answer.responded_at.astimezone(UTC).isoformat(timespec="seconds"),
                "evidence_sha256": answer.evidence_sha256,
                "source": answer.source,
                "requested_by": state.requested_by,
            }
            self._append("approved", state, evidence, suffix=answer.responder)

    def _append(self, event: str, state: RolloutState, evidence: Mapping[str, Any], suffix: str = "") -> None:
        key = f"{event}:{state.rollout_id}:{suffix or state.step.name}"
        self._world.ledger.append(
            event, model=state.release.model, version=state.release.version, evidence=dict(evidence), key=key
        )

    def _roll_back(self, state: RolloutState, reason: str, by: str = "engine") -> RolloutState:
        """The same rollback as everybody's; what it cannot finish, the next call does."""
        rollback.roll_back(self._world, state.release.model, reason=reason, by=by, judged=state)
        return from_document(self._required(state.rollout_id).document)


def look(world: World, state: RolloutState) -> tuple[RolloutState, StepReading]:
    """Ask both slots and the gates; a canary that cannot be asked needs more data, whatever the gates would say.

    Time is added up from look to look, and none of them counts for more than `abandoned_after_s`: a clock that jumps
    ahead ends no step early, one that jumps back does not stop it.

    Returns:
        The state with what was seen, and what the gates say.
    """
    window, baseline = observe_window(world.target, state.baseline)
    now = world.clock()
    passed_s = min(max(now - state.seen_at, 0.0), state.plan.params.abandoned_after_s)
    reading = _read_gates(world, state, window)
    blind_s = state.blind_s + passed_s if window.canary is None else 0.0
    elapsed_s = state.elapsed_s + passed_s
    seen = replace(state, seen_at=now, elapsed_s=elapsed_s, blind_s=blind_s, baseline=baseline, reading=reading)
    return seen, reading


def _read_gates(world: World, state: RolloutState, window: Window) -> StepReading:
    if window.canary is None:
        return StepReading(NEED_MORE_DATA, (), "the canary gives no metrics", memory=_memory(state))
    return world.judge(state, window)


def _memory(state: RolloutState) -> Mapping[str, Any]:
    return state.reading.memory if state.reading else {}


def _because(reading: StepReading) -> dict[str, Any]:
    return {
        "requests": reading.requests,
        "stable_requests": reading.stable_requests,
        **reading.probe_evidence,
        "reason": reading.reason,
        "gates": {gate.name: f"{gate.verdict}: {gate.text}" for gate in reading.gates},
    }


def _step_evidence(state: RolloutState, step: Step, because: Mapping[str, Any]) -> dict[str, Any]:
    """What the row of a step holds: the step, and what let it happen."""
    champion = state.champion.version if state.champion else None
    evidence: dict[str, Any] = {
        "rollout": state.rollout_id,
        "run_id": state.run_id,
        "release_sha256": state.release.digest,
        "step": step.name,
        "weight_percent": 100 if step.phase is Phase.PROMOTED else step.percent,
        "after_step": state.step.name,
        "watched_s": round(state.elapsed_s, 1),
        **because,
    }
    if step.phase is Phase.PROMOTED:
        evidence |= {"champion": state.release.version, "previous": champion}
    return evidence


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
