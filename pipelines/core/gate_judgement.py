"""What one gate says of a canary."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from pipelines.core.sequential_test import NEED_MORE_DATA, PROMOTE, ROLL_BACK, Verdict


class GateJudgement(BaseModel):
    """One question to the canary, with the numbers that answer it.

    Attributes:
        name: of the gate.
        verdict: its own; `Judgement` says what follows from all of them.
        required: whether promotion waits for this gate's "promote"; where not, it can only roll back.
        value: what was measured; None without data.
        low: bound below the true value, at every look at once; None without one.
        high: bound above it.
        limit: what the value is held against.
        to_promote: how far the evidence for promotion has come, 0 to 1.
        to_roll_back: how far the evidence for a roll-back has come, 0 to 1.
        requests_left: how many more requests it needs if it goes on like this; None where it cannot tell.
        exhausted: whether the allowed requests passed without a verdict.
        shared_trouble: whether it would be rolled back if the stable slot were not as bad in the same window.
        missing: what could not be measured; while anything is, nothing is promoted.
        sentence: all this for a person.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    verdict: Verdict
    required: bool = True
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    to_promote: float = 0.0
    to_roll_back: float = 0.0
    requests_left: int | None = None
    exhausted: bool = False
    shared_trouble: bool = False
    missing: tuple[str, ...] = ()
    sentence: str


def verdict_of(to_promote: float, to_roll_back: float, missing: bool) -> Verdict:
    """A roll-back needs its evidence alone; a promotion also that nothing is missing."""
    if to_roll_back >= 1:
        return ROLL_BACK
    return PROMOTE if to_promote >= 1 and not missing else NEED_MORE_DATA


def progress(evidence: float, needed: float) -> float:
    """How far evidence has come to what is needed, 0 to 1; both in nats."""
    return min(1.0, max(0.0, evidence / needed))


def whole(requests: float | None) -> int | None:
    """A number of requests, rounded up."""
    return None if requests is None or not math.isfinite(requests) else math.ceil(requests)


def percent(share: float) -> str:
    """For a person, e.g. `0.25 %`."""
    return f"{100 * share:.3g} %"
