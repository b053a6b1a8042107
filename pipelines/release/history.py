"""Rollouts as text: what became of each, and where one stands now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pydantic import TypeAdapter

from pipelines.core.rollout_forecast import StepForecast, deviation
from pipelines.release.rollout_state import Passage, RolloutState
from pipelines.release.steps import PENDING, PROMOTED, ROLLED_BACK


@dataclass(frozen=True)
class Entry:
    """A rollout in the list of all.

    Attributes:
        began: UTC.
        version: in the registry.
        outcome: promoted, rolled back, or the step it is in.
        lasted_s: from its beginning to its last step.
        approved: by whom, with which words.
        course: each step that it left, with the canary's requests in it.
        reason: of a rollback, as one in quotation marks, or what is waited for.
        forecast: how far it was off in all steps that the gates let pass; empty where none was made.
    """

    began: datetime
    version: str
    outcome: str
    lasted_s: float
    approved: str
    course: str
    reason: str
    forecast: str = ""


def summarise(state: RolloutState) -> Entry:
    """A rollout in a few words."""
    return Entry(
        began=datetime.fromtimestamp(state.requested_at, UTC),
        version=f"v{state.release.version}",
        outcome=describe_step(state.step.name),
        lasted_s=state.passages[-1].at - state.passages[0].at if state.passages else 0.0,
        approved=", ".join(
            answer.responder + (f": “{answer.comment}”" if answer.comment else "") for answer in state.approvals
        ),
        course=_describe_course(state.passages),
        reason=quote_reason(state.reason) if state.reason else state.waiting_for,
        forecast=_describe_deviation_in_all(state) if state.is_finished else "",
    )


def as_result(state: RolloutState) -> dict[str, Any]:
    """What a scheduler needs to know of a rollout, as a JSON tree."""
    entry = summarise(state)
    return {
        "rollout_id": state.rollout_id,
        "model": state.release.model,
        "version": state.release.version,
        "step": state.step.name,
        "is_finished": state.is_finished,
        "was_released": any(passage.step not in (PENDING.name, ROLLED_BACK.name) for passage in state.passages),
        "waiting_for": state.waiting_for,
        "needs_answer": state.step == PENDING and state.needs_answer,
        "reason": state.reason,
        "evidence_sha256": state.evidence_sha256,
        "requested_by": state.requested_by,
        "pause_s": state.plan.params.pause_s,
        "summary": "\n".join(
            line
            for line in (
                f"{state.release.model} {entry.version}: {entry.outcome} after {entry.lasted_s / 60:.1f} min",
                f"approved by {entry.approved}" if entry.approved else "",
                f"{entry.course} requests" if entry.course else "",
                entry.reason,
                *describe_deviations(state),
            )
            if line
        ),
    }


def describe_deviations(state: RolloutState) -> list[str]:
    """How far the forecast of each step was off that the gates let pass, one line each; none where none was made.

    A step's time begins with its intent, so that the shadow's holds the seconds in which the canary starts.
    """
    return [deviation(*passed) for passed in _passed_steps(state)]


def _describe_deviation_in_all(state: RolloutState) -> str:
    """The steps' forecasts added up, against what the steps took together."""
    passed = _passed_steps(state)
    if not passed:
        return ""
    steps, requests, minutes = zip(*passed, strict=True)
    expected = replace(
        steps[0],
        step="in all",
        requests=_add([step.requests for step in steps]),
        minutes=_add([step.minutes for step in steps]),
    )
    return deviation(expected, sum(requests), sum(minutes))


def _passed_steps(state: RolloutState) -> list[tuple[StepForecast, int, float]]:
    """Forecast, the canary's requests and minutes of each step that the gates let pass."""
    expected = {step.step: step for step in _FORECASTS.validate_python(state.forecast.get("steps", []))}
    return [
        (expected[left.step], following.requests, (following.at - left.at) / 60)
        for left, following in pairwise(state.passages)
        if left.step in expected and following.step != ROLLED_BACK.name
    ]


def _add(values: Sequence[Any]) -> Any:
    """Their sum; None where one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def quote_reason(reason: str) -> str:
    """A rollback's reason, marked as one: a word such as `back` beside `rolled back` reads as part of it."""
    return f"reason: “{reason}”"


def describe_step(name: str) -> str:
    """A step's name for a person: `canary@10` is `10 %`."""
    if name.startswith("canary@"):
        return f"{name.removeprefix('canary@')} %"
    return {ROLLED_BACK.name: "rolled back", PENDING.name: "waits for approval"}.get(name, name)


def _describe_course(passages: Sequence[Passage]) -> str:
    """`shadow 400 · 10 % 412`: a step's requests stand in the passage to the next."""
    parts = []
    for step, following in pairwise(passages):
        if step.step not in (PENDING.name, PROMOTED.name):
            probes = f" ({following.probes:,} probes)" if following.probes else ""
            parts.append(f"{describe_step(step.step)} {following.requests:,}{probes}")
    return " · ".join(parts)


_FORECASTS = TypeAdapter(list[StepForecast])
