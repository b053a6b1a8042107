"""Takes a release back: traffic first, then the record of it.  Engine, watchdog, command line and DAG all come here.

The order is the reverse of a step forward.  A step forward is written down before it takes effect; a rollback takes
effect before it is written down, for nothing may hold it up: not a locked database, not MLflow, not another engine
with a lease.  What is left undone by a kill is seen by the next look of the watchdog or the engine (`trouble`), because
traffic then is divided otherwise than the rollout says, and is finished by the same function.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pipelines.core.rollout_rows import RolloutRow, StaleRolloutError
from pipelines.errors import Refusal, TryLater
from pipelines.release.rollout_state import Passage, RolloutState, from_document
from pipelines.release.steps import ROLLED_BACK, Phase
from pipelines.release.targets import ReleaseRef, Routing, Slot, TargetState
from pipelines.release.world import World

_TRIES = 20  # others write a row at most a few times a second


@dataclass(frozen=True)
class RollbackOutcome:
    """What a rollback did.

    Attributes:
        text: one line for a person, with seconds.
        traffic_s: seconds until the traffic had moved; None where there was nothing to move.
        is_recorded: whether state, ledger, slots and aliases follow already; the watchdog makes up for it otherwise.
    """

    text: str
    traffic_s: float | None
    is_recorded: bool


def roll_back(
    world: World,
    model: str,
    *,
    reason: str,
    by: str,
    version: str | None = None,
    judged: RolloutState | None = None,
) -> RollbackOutcome:
    """Give all traffic back to the champion, or after a promotion to the one before it, then record that.

    Args:
        world: what to act upon.
        model: name of the registered model.
        reason: for the ledger and whoever reads it.
        by: who asks, e.g. `watchdog`.
        version: take this one back; None takes what is under way, else what was promoted last.
        judged: the rollout as the caller saw it, with what its gates said; only while it is the one to take back.

    Raises:
        Refusal: there is nothing that the traffic could go back to, or nothing of this name was ever released.
        TryLater: the target does not answer, so the traffic has not moved.
    """
    began = time.monotonic()
    try:
        row = _find(world, model, version)
    except TryLater:
        return _without_the_database(world, model, began)
    if judged is not None and (row is None or row.rollout_id != judged.rollout_id):
        return _nothing(f"{model}: {judged.rollout_id} is over")
    if row is None:
        raise _never_released(world, model)
    state = from_document(row.document)
    if state.step == ROLLED_BACK and state.settled:
        return _nothing(
            f"{model} v{state.release.version} was rolled back already: {state.reason}\n"
            f"  nothing was done, and the reason given now ({reason}) is not recorded; to take back the champion as "
            f"well, name it: `perch rollback {model} --version N`"
        )
    moved = move_traffic_back(world, state)
    traffic_s = time.monotonic() - began
    goal = f"v{state.champion.version} answers all requests" if state.champion else "it gets no requests"
    how = f"traffic moved in {traffic_s:.2f} s" if moved else "it had no traffic"
    text = f"{model} v{state.release.version} rolled back at {state.step.name}: {goal}, {how} ({reason})"
    try:
        record_rollback(
            world, row.rollout_id, reason=reason, by=by, traffic_s=traffic_s if moved else None, judged=judged
        )
    except TryLater as error:
        return RollbackOutcome(f"{text}\n  not recorded yet: {error}", traffic_s, is_recorded=False)
    return RollbackOutcome(text, traffic_s, is_recorded=True)


def move_traffic_back(world: World, state: RolloutState) -> bool:
    """Give all traffic to what a release would replace, or has replaced.

    Returns:
        Whether any traffic had to move.

    Raises:
        Refusal: there is no such release, or it cannot be started.
        TryLater: the target does not answer.
    """
    if state.step.is_watched and state.settled and state.champion is not None:
        world.target.route(Routing())  # asks nobody how they are first: a canary that hangs would hold it up
        return True
    actual = world.target.state()
    if actual.slots.get(Slot.STABLE) == state.release and state.champion != state.release:
        return _go_back_to_previous(world, state, actual)
    if Slot.STABLE in actual.slots and actual.routing != Routing():
        world.target.route(Routing())
        return True
    return False


def record_rollback(
    world: World,
    rollout_id: str,
    *,
    reason: str,
    by: str,
    traffic_s: float | None = None,
    judged: RolloutState | None = None,
) -> None:
    """Write down that a rollout was rolled back, over whatever step it is in, and finish what follows from it.

    Raises:
        TryLater: the database or MLflow does not answer; the traffic has moved all the same.
    """
    for _ in range(_TRIES):
        row = world.rollouts.read(rollout_id)
        if row is None:
            return
        state = from_document(row.document)
        if state.step != ROLLED_BACK:
            # The look that decided is not written down yet; one that found no metrics says less than the one before.
            if judged is not None and judged.step == state.step and judged.reading and judged.reading.gates:
                state = replace(state, reading=judged.reading)
            state = _rolled_back(world, state, reason=reason, by=by, traffic_s=traffic_s)
            try:
                # Open again where it had been promoted, until everything is back where it was.
                row = world.rollouts.save(row, state.to_document(), is_open=True, force=True)
            except StaleRolloutError:
                continue
        with suppress(StaleRolloutError):  # somebody else finishes it, or has
            finish_rollback(world, row)
        return
    raise TryLater(f"{rollout_id}: is written by somebody else all the time\n  what to do: try again")


def finish_rollback(world: World, row: RolloutRow) -> RolloutState:
    """Do what a recorded rollback still lacks: traffic, ledger, slots, aliases.  Each is safe to repeat.

    Raises:
        StaleRolloutError: somebody else finished it meanwhile.
        TryLater: something does not answer.
    """
    state = from_document(row.document)
    if state.settled:
        return state
    evidence = dict(state.step_evidence)
    move_traffic_back(world, state)
    world.ledger.append(
        "rolled_back",
        model=state.release.model,
        version=state.release.version,
        evidence=evidence,
        key=f"rolled_back:{state.rollout_id}",
    )
    if "champion" in evidence:
        world.aliases.move(
            state.release.model, {"champion": evidence["champion"], "previous": evidence.get("previous")}
        )
    actual = world.target.state()
    if actual.slots.get(Slot.CANARY) == state.release and actual.routing == Routing():
        world.target.remove(Slot.CANARY)
    settled = replace(state, settled=True)
    world.rollouts.save(row, settled.to_document(), is_open=False)
    return settled


def may_pass(state: RolloutState, actual: TargetState) -> bool:
    """Whether trouble deserves a second look before anything is done.

    Somebody has taken traffic away, and is about to write down why; or the canary did not say in time that it is well.
    """
    given, routing = state.step.routing, actual.routing
    taken_away = routing.canary_percent < given.canary_percent or (given.mirror and not routing.mirror)
    return taken_away or (routing == given and Slot.CANARY not in actual.ready)


def trouble(state: RolloutState, actual: TargetState) -> str:
    """Why a settled step cannot go on, from what the target itself says; empty where nothing speaks against it.

    Less traffic than the step gives was taken away by somebody who had a reason: the watchdog, a rollback that was
    killed before it could write, a person.  It is never given back.
    """
    if not state.step.is_watched:
        return ""
    if actual.routing != state.step.routing:
        return (
            f"traffic was divided otherwise by somebody else ({_describe(actual.routing)}, "
            f"{state.step.name} gives {_describe(state.step.routing)})"
        )
    if actual.slots.get(Slot.CANARY) != state.release:
        return "the canary's slot holds another release"
    if state.champion is not None and actual.slots.get(Slot.STABLE) != state.champion:
        return "the stable slot holds another release than when this one began"
    if Slot.CANARY not in actual.ready:
        return "crashes: the canary takes no requests any more"
    return ""


def is_interrupted_rollback(state: RolloutState, actual: TargetState) -> bool:
    """Whether traffic of a promoted release has begun to go back to the one before, and nobody has written it down."""
    if state.step.phase is not Phase.PROMOTED or not state.settled or state.champion is None:
        return False
    stable, canary = actual.slots.get(Slot.STABLE), actual.slots.get(Slot.CANARY)
    begun = stable == state.release and canary == state.champion and actual.routing.canary_percent > 0
    return begun or stable == state.champion


def _find(world: World, model: str, version: str | None) -> RolloutRow | None:
    """The rollout to take back: of the version, else the last one."""
    rows = world.glance.list_rollouts(model)
    if version is None:
        return next((row for row in reversed(rows) if row.is_open), rows[-1] if rows else None)
    own = [row for row in rows if from_document(row.document).release.version == version]
    if not own:
        raise Refusal(f"{model} v{version}", "was never released", way_out="`perch releases` lists what was")
    busy = next((row for row in rows if row.is_open and row.rollout_id != own[-1].rollout_id), None)
    if busy is not None:
        raise Refusal(
            f"{model} v{version}",
            f"cannot be taken back while {busy.rollout_id} is under way",
            way_out=f"take that back first: `perch rollback {model}`",
        )
    later = [
        from_document(row.document)
        for row in rows
        if row.sequence > own[-1].sequence and from_document(row.document).step.phase is Phase.PROMOTED
    ]
    if later:
        raise Refusal(
            f"{model} v{version}",
            f"v{later[-1].release.version} has replaced it since",
            way_out=f"take that back: `perch rollback {model} --version {later[-1].release.version}`",
        )
    return own[-1]


def _never_released(world: World, model: str) -> Refusal:
    known = sorted({row.model for row in world.glance.list_rollouts()})
    return Refusal(
        f"the model {model}",
        "was never released, so there is nothing to take back",
        limit=f"one of {', '.join(known)}" if known else "no model was released yet",
        way_out="name one of them" if known else "`perch releases begin` releases one",
    )


def _without_the_database(world: World, model: str, began: float) -> RollbackOutcome:
    """What can be done by the target alone: a canary that has traffic loses it."""
    actual = world.target.state()
    if actual.routing == Routing() or Slot.STABLE not in actual.slots:
        raise TryLater(
            f"{model}: no canary has traffic, and the database does not say what was promoted last\n"
            "  what to do: see that the database is up (`perch status`), then try again"
        )
    world.target.route(Routing())
    traffic_s = time.monotonic() - began
    stable = actual.slots[Slot.STABLE]
    return RollbackOutcome(
        f"{stable.model}: v{stable.version} answers all requests, traffic moved in {traffic_s:.2f} s\n"
        "  not recorded yet: the database does not answer; the watchdog makes up for it",
        traffic_s,
        is_recorded=False,
    )


def _go_back_to_previous(world: World, state: RolloutState, actual: TargetState) -> bool:
    """From a promoted release to the one before it, which is warm in the canary's slot unless it was replaced."""
    previous = state.champion
    if previous is None:
        raise Refusal(
            f"{state.release.model} v{state.release.version}",
            "is the first release; there is none before it to go back to",
            way_out="release another version; or, to answer nothing at all, `perch down`",
        )
    if actual.slots.get(Slot.CANARY) != previous:
        _make_room(world, actual)
        world.target.deploy(Slot.CANARY, previous)
    if Slot.CANARY not in actual.ready or actual.slots.get(Slot.CANARY) != previous:
        world.target.wait_ready(Slot.CANARY, state.plan.params.ready_timeout_s)
    world.target.route(Routing(canary_percent=100))
    world.target.promote()
    return True


def _make_room(world: World, actual: TargetState) -> None:
    if actual.routing != Routing():
        world.target.route(Routing())


def _rolled_back(world: World, state: RolloutState, *, reason: str, by: str, traffic_s: float | None) -> RolloutState:
    """The state with the rollback decided, and its row of the ledger fixed."""
    now = world.clock()
    evidence: dict[str, Any] = {
        "rollout": state.rollout_id,
        "run_id": state.run_id,
        "release_sha256": state.release.digest,
        "from_step": state.step.name,
        "weight_percent": 0,
        "reason": reason,
        "by": by,
        **_readings(state),
    }
    if traffic_s is not None:
        evidence["traffic_moved_s"] = round(traffic_s, 3)
    if state.step.phase is Phase.PROMOTED:
        # The slot of the one before it is given up by going back to it, so that nothing is kept warm behind it.
        evidence |= {"champion": _version(state.champion), "previous": None}
    requests, probes = (state.reading.requests, state.reading.probes) if state.reading else (0, 0)
    return replace(
        state,
        step=ROLLED_BACK,
        settled=False,
        step_evidence=evidence,
        entered_at=now,
        reason=reason,
        passages=(*state.passages, Passage(ROLLED_BACK.name, now, reason, requests, probes)),
    )


def _readings(state: RolloutState) -> Mapping[str, Any]:
    """What the gates of the step that ends here said last."""
    if state.reading is None:
        return {}
    return {
        "requests": state.reading.requests,
        "stable_requests": state.reading.stable_requests,
        **state.reading.probe_evidence,
        "gates": {gate.name: f"{gate.verdict}: {gate.text}" for gate in state.reading.gates},
    }


def _describe(routing: Routing) -> str:
    return f"{routing.canary_percent} %" + (" and copies" if routing.mirror else "")


def _version(release: ReleaseRef | None) -> str | None:
    return release.version if release else None


def _nothing(text: str) -> RollbackOutcome:
    return RollbackOutcome(text, None, is_recorded=True)
