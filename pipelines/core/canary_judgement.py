"""The judgement of a canary: what its gates say together of a window.  Pure: counts in, verdicts with numbers out.

Any gate's "roll back" rolls back.  "Promote" takes every required gate's, with nothing missing anywhere: no data, a
number that is none, or a source of metrics that is down never promotes.  All else is "need more data".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipelines.core.canary_observations import CanaryLimits, CanaryWindow, Counts
from pipelines.core.gate_judgement import GateJudgement
from pipelines.core.mirror_gates import judge_mirror
from pipelines.core.sequential_test import NEED_MORE_DATA, PROMOTE, ROLL_BACK, Verdict
from pipelines.core.service_gates import ERRORS, LATENCY, judge_crashes, judge_errors, judge_latency

Phase = Literal["shadow", "canary"]
_WATCHED_IN_SHADOW = {ERRORS, LATENCY}


class Judgement(BaseModel):
    """What follows from all gates, with everything that it was decided on.

    Attributes:
        verdict: promote, roll back, or need more data.
        gates: each gate's judgement.
        missing: what could not be measured, without repeats.
        exhausted: whether a gate has used up its requests without a verdict: waiting on will hardly help.
        shared_trouble: whether both slots are in the same trouble; begin a new window when it is over.
        turning_points: to be handed to the next judgement of the same window, in `CanaryWindow.turning_points`.
        sentence: the reason of the verdict, for a person.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    verdict: Verdict
    gates: tuple[GateJudgement, ...]
    missing: tuple[str, ...]
    exhausted: bool
    shared_trouble: bool
    turning_points: Mapping[str, Counts]
    sentence: str

    def gate(self, name: str) -> GateJudgement:
        """One gate's judgement.

        Raises:
            KeyError: that gate was not judged.
        """
        return {gate.name: gate for gate in self.gates}[name]


def judge(window: CanaryWindow, limits: CanaryLimits, *, phase: Phase) -> Judgement:
    """Judge what a step has seen so far.

    Args:
        window: all counts since the step began; looking often costs nothing, the bounds hold at every look at once.
        limits: what is asked.
        phase: `canary` asks for errors, latency and crashes.  `shadow` asks for crashes and for agreement on mirrored
            requests, and watches errors and latency: they can roll back, but nobody waits for their proof before a
            client is involved.  Mirrored requests that are there in a canary step are watched likewise.
    """
    errors, errors_turned = judge_errors(window, limits)
    latency, latency_turned = judge_latency(window, limits)
    gates, turned = [errors, latency, judge_crashes(window, limits)], {ERRORS: errors_turned, LATENCY: latency_turned}
    if phase == "shadow" or window.mirror is not None:
        mirrored, mirror_turned = judge_mirror(window.mirror, limits, window.turning_points)
        turned |= mirror_turned
        if phase == "shadow":
            gates = [_watched(gate) if gate.name in _WATCHED_IN_SHADOW else gate for gate in gates] + mirrored
        else:
            gates += [_watched(gate) for gate in mirrored]
    missing = tuple(dict.fromkeys(what for gate in gates for what in gate.missing))
    verdict = _overall(gates, bool(missing))
    return Judgement(
        verdict=verdict,
        gates=tuple(gates),
        missing=missing,
        exhausted=verdict == NEED_MORE_DATA and any(gate.exhausted and gate.required for gate in gates),
        shared_trouble=verdict == NEED_MORE_DATA and any(gate.shared_trouble for gate in gates),
        turning_points=turned,
        sentence=_reason(verdict, gates, missing),
    )


def _watched(gate: GateJudgement) -> GateJudgement:
    return gate.model_copy(update={"required": False})


def _overall(gates: list[GateJudgement], anything_missing: bool) -> Verdict:
    if any(gate.verdict == ROLL_BACK for gate in gates):
        return ROLL_BACK
    if anything_missing or any(gate.shared_trouble for gate in gates):
        return NEED_MORE_DATA
    return PROMOTE if all(gate.verdict == PROMOTE for gate in gates if gate.required) else NEED_MORE_DATA


def _reason(verdict: Verdict, gates: list[GateJudgement], missing: tuple[str, ...]) -> str:
    if verdict == PROMOTE:
        return "promote: " + ", ".join(gate.name for gate in gates if gate.required) + " as required"
    if verdict == ROLL_BACK:
        return "roll back: " + "; ".join(f"{gate.name}: {gate.sentence}" for gate in gates if gate.verdict == ROLL_BACK)
    if missing:
        return "need more data: " + ", ".join(missing)
    waiting = [gate for gate in gates if gate.shared_trouble or (gate.required and gate.verdict == NEED_MORE_DATA)]
    return "need more data: " + "; ".join(f"{gate.name}: {gate.sentence}" for gate in waiting)
