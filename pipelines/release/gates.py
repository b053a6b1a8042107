"""The gates of a step: what slots and copies of requests have shown, handed to the judgement in `core`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from pipelines.core.canary_judgement import Judgement, judge
from pipelines.core.canary_observations import CanaryLimits, CanaryWindow, Counts, MirrorWindow, SlotWindow
from pipelines.core.rollout_forecast import StepForecast, StepPlan, forecast_rollout, forecast_step
from pipelines.params import ModelReleaseParams
from pipelines.release.rollout_state import GateReading, RolloutState, StepReading
from pipelines.release.steps import Phase, Plan, Step
from pipelines.release.targets import SlotCounters
from pipelines.release.windows import Window

MirrorSource = Callable[[RolloutState], MirrorWindow | None]
_TURNING_POINTS = TypeAdapter(dict[str, Counts])
_MIRROR_KEPT_S = 3.0  # reading kept predictions costs some 0.1 s


class Gates:
    """A `Judge` over the real judgement.

    Args:
        mirror: what both models answered to the copies of the step; None, or a source that returns None, has nothing.
        clock: seconds since the epoch.
    """

    def __init__(self, mirror: MirrorSource | None = None, clock: Callable[[], float] = time.time) -> None:
        self._mirror, self._clock = mirror, clock
        self._mirrored: tuple[str, float, MirrorWindow | None] = ("", -math.inf, None)

    def __call__(self, state: RolloutState, window: Window) -> StepReading:
        """What the gates say of a window."""
        is_shadow = state.step.phase is Phase.SHADOW
        counts_probes = state.plan.params.count_probes
        if counts_probes:
            window = Window(_with_probes(window.canary), _with_probes(window.stable))
        judgement = judge(
            CanaryWindow(
                canary=self._slot(window.canary),
                stable=self._slot(window.stable),
                canary_share=0.5 if is_shadow else state.step.percent / 100,
                mirror=self._look_at_copies(state) if is_shadow else None,
                turning_points=_recall(state),
            ),
            limits_of(state.plan.params),
            phase="shadow" if is_shadow else "canary",
        )
        return _read(judgement, window, counts_probes=counts_probes)

    def _slot(self, counters: SlotCounters | None) -> SlotWindow | None:
        if counters is None:
            return None
        return SlotWindow(
            requests=counters.requests,
            errors=counters.errors,
            latency_buckets=counters.latency_buckets,
            crashes=counters.crashes,
            age_s=max(0.0, self._clock() - counters.taken_at),
        )

    def _look_at_copies(self, state: RolloutState) -> MirrorWindow | None:
        if self._mirror is None:
            return None
        key, at, found = self._mirrored
        now = time.monotonic()
        if key != state.rollout_id or now - at > _MIRROR_KEPT_S:
            found = self._mirror(state)
            self._mirrored = (state.rollout_id, now, found)
        return found


def _with_probes(counters: SlotCounters | None) -> SlotCounters | None:
    return counters.with_probes() if counters else None


def limits_of(params: ModelReleaseParams) -> CanaryLimits:
    """The limits of the judgement that a section `model_release` asks for."""
    return CanaryLimits(
        max_error_rate=params.max_error_rate,
        acceptable_share=params.acceptable_share,
        unacceptable_share=params.unacceptable_share,
        max_latency_s=params.max_p95_ms / 1000,
        max_crashes=params.max_crashes,
        min_agreement=params.min_agreement,
        min_label_agreement=params.min_label_agreement,
        max_label_shift=params.max_label_shift,
        max_score_difference=params.max_score_difference,
        alpha=params.wrong_rollback,
        beta=params.wrong_promotion,
        max_requests=params.max_requests,
    )


def forecast(plan: Plan, *, requests_per_s: float, is_first: bool) -> tuple[StepForecast, ...]:
    """What each step that is watched will need at a rate of requests."""
    watched = [step for step in plan.course(is_first=is_first) if step.is_watched]
    return forecast_rollout(
        [_plan_of(step) for step in watched],
        limits_of(plan.params),
        requests_per_s=requests_per_s,
        min_step_s=plan.params.min_step_s,
        max_probes_per_s=plan.params.probe_requests_per_s if plan.params.count_probes else 0.0,
    )


def likely_requests(plan: Plan, step: Step) -> int | None:
    """Canary requests that suffice for a step in nine of ten cases; None where none would."""
    return forecast_step(_plan_of(step), limits_of(plan.params), requests_per_s=0.0).likely_requests


def _plan_of(step: Step) -> StepPlan:
    is_shadow = step.phase is Phase.SHADOW
    return StepPlan(step.name, "shadow" if is_shadow else "canary", 1.0 if is_shadow else step.percent / 100)


def _recall(state: RolloutState) -> dict[str, Counts]:
    remembered: Any = state.reading.memory.get("turning_points", {}) if state.reading else {}
    return _TURNING_POINTS.validate_python(remembered)


def _read(judgement: Judgement, window: Window, *, counts_probes: bool) -> StepReading:
    probes = window.canary.probes.requests if window.canary else 0
    gates = tuple(
        GateReading(
            gate.name,
            gate.verdict,
            gate.sentence,
            remaining_requests=gate.requests_left if gate.required else None,
            evidence=gate.to_roll_back,
        )
        for gate in judgement.gates
    )
    return StepReading(
        verdict=judgement.verdict,
        gates=gates,
        reason=judgement.sentence.removeprefix(f"{judgement.verdict}: "),
        requests=window.canary.requests if window.canary else 0,
        stable_requests=window.stable.requests if window.stable else 0,
        probes=probes if counts_probes else 0,
        uncounted_probes=0 if counts_probes else probes,
        memory={"turning_points": _TURNING_POINTS.dump_python(dict(judgement.turning_points), mode="json")},
    )
