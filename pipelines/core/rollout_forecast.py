"""How many requests and minutes a rollout's gates will need, said before it begins; and how far off that was.

The forecast is for a healthy canary at the present traffic.  Minutes alone promote nothing: where no requests come, the
forecast says how many it takes, and no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from pipelines.core.canary_judgement import Phase
from pipelines.core.canary_observations import CanaryLimits
from pipelines.core.mirror_gates import AGREEMENT, SCORES
from pipelines.core.sequential_test import Course, ErrorRateTest
from pipelines.core.service_gates import ERRORS, LATENCY
from pipelines.core.share_bounds import trials_to_show_below

_LIKELY = NormalDist().inv_cdf(0.9)


@dataclass(frozen=True)
class HealthyCanary:
    """What the forecast takes a healthy canary to be; the stable slot's own numbers are the best guess.

    Attributes:
        error_rate: share of requests that fail; None for what the limits call acceptable.
        slow_share: share of requests slower than the limit on latency.
        agreement: share of mirrored requests with the champion's label.
        score_difference: mean total variation between both models' probabilities.
    """

    error_rate: float | None = None
    slow_share: float = 0.01
    agreement: float = 0.97
    score_difference: float = 0.05


@dataclass(frozen=True)
class GateForecast:
    """What one gate needs.

    Attributes:
        name: of the gate.
        requests: of the canary, on average; None where such a canary is never promoted.
        likely_requests: that suffice in nine of ten cases; None likewise.
    """

    name: str
    requests: int | None
    likely_requests: int | None


@dataclass(frozen=True)
class StepForecast:
    """What one step needs.

    Attributes:
        step: its name.
        gates: that it waits for.
        requests: of the canary, on average, by the slowest gate; None where a gate never promotes.
        likely_requests: that suffice in nine of ten cases; None likewise.
        minutes: on average, not below the shortest time a step lasts; None without traffic, or without `requests`.
        likely_minutes: that suffice in nine of ten cases; None likewise.
        sentence: all this for a person.
        probes_per_s: requests per second that the prober adds to the present traffic, as far as they count.
    """

    step: str
    gates: tuple[GateForecast, ...]
    requests: int | None
    likely_requests: int | None
    minutes: float | None
    likely_minutes: float | None
    sentence: str
    probes_per_s: float = 0.0


@dataclass(frozen=True)
class StepPlan:
    """A step as the forecast needs to know it.

    Attributes:
        name: e.g. `canary@10`.
        phase: its kind.
        share: of all requests that reach the canary, 0 to 1; 1 where all are mirrored.
    """

    name: str
    phase: Phase
    share: float


def forecast_step(
    plan: StepPlan,
    limits: CanaryLimits,
    *,
    requests_per_s: float,
    min_step_s: float = 0.0,
    max_probes_per_s: float = 0.0,
    healthy: HealthyCanary | None = None,
) -> StepForecast:
    """Say what a step will need.

    Args:
        plan: the step.
        limits: of its gates.
        requests_per_s: all requests per second at present; 0 or NaN when there are none.
        min_step_s: seconds that the step lasts at least.
        max_probes_per_s: requests per second that a prober may add.
        healthy: what a healthy canary is taken to be.
    """
    healthy = healthy or HealthyCanary()
    gates = _shadow_gates(limits, healthy) if plan.phase == "shadow" else _canary_gates(limits, healthy)
    requests = _slowest([gate.requests for gate in gates])
    likely = _slowest([gate.likely_requests for gate in gates])
    present = max(requests_per_s, 0.0) if math.isfinite(requests_per_s) else 0.0
    probes = probes_per_s(
        likely, plan.share, requests_per_s=present, within_s=min_step_s, max_probes_per_s=max_probes_per_s
    )
    rate = (present + probes) * plan.share
    minutes, likely_minutes = (_minutes(count, rate, min_step_s) for count in (requests, likely))
    sentence = _sentence(plan.name, gates, requests, likely, minutes, likely_minutes, probes)
    return StepForecast(plan.name, gates, requests, likely, minutes, likely_minutes, sentence, probes)


def probes_per_s(
    likely_requests: int | None, share: float, *, requests_per_s: float, within_s: float, max_probes_per_s: float
) -> float:
    """Requests per second that a prober adds, so that a step has its evidence by when it may end at the earliest.

    Args:
        likely_requests: of the canary, that suffice in nine of ten cases; None where none suffice.
        share: of all requests that reach the canary, 0 to 1.
        requests_per_s: what clients send, to all slots.
        within_s: seconds that the step lasts at least; 0: as quickly as allowed.
        max_probes_per_s: the most that is allowed.
    """
    if likely_requests is None:
        return 0.0
    needed = likely_requests / (share * within_s) if within_s > 0 else math.inf
    return min(max(needed - requests_per_s, 0.0), max_probes_per_s)


def forecast_rollout(
    plans: Sequence[StepPlan],
    limits: CanaryLimits,
    *,
    requests_per_s: float,
    min_step_s: float = 0.0,
    max_probes_per_s: float = 0.0,
    healthy: HealthyCanary | None = None,
) -> tuple[StepForecast, ...]:
    """Say what each step of a rollout will need; arguments as for `forecast_step`."""
    return tuple(
        forecast_step(
            plan,
            limits,
            requests_per_s=requests_per_s,
            min_step_s=min_step_s,
            max_probes_per_s=max_probes_per_s,
            healthy=healthy,
        )
        for plan in plans
    )


def deviation(forecast: StepForecast, requests: float, minutes: float) -> str:
    """How far a forecast was off, for a person.

    Args:
        forecast: of the step, as it was made.
        requests: of the canary, until the verdict.
        minutes: until the verdict.
    """
    if forecast.requests is None:
        return f"{forecast.step}: {requests:,.0f} requests, {minutes:.1f} min; no promotion had been expected"
    if forecast.minutes is None:
        # More requests come within the least time of a step than its gates need: a ratio would be that of the traffic.
        return (
            f"{forecast.step}: {requests:,.0f} requests, {minutes:.1f} min; no minutes were forecast, for nothing was "
            "asked when the release began"
        )
    by_requests = _off(requests, forecast.requests, "requests", "{:,.0f}")
    return f"{forecast.step}: {by_requests}; {_off(minutes, forecast.minutes, 'min', '{:.1f}')}"


def _off(actual: float, expected: float, unit: str, form: str) -> str:
    ratio = f" ({actual / expected - 1:+.0%})" if expected > 0 else ""
    return f"{form.format(actual)} {unit}, forecast {form.format(expected)}{ratio}"


def _canary_gates(limits: CanaryLimits, healthy: HealthyCanary) -> tuple[GateForecast, ...]:
    test = limits.error_rate_test
    rate = test.acceptable if healthy.error_rate is None else healthy.error_rate
    course = _course(test, rate)
    # A canary at such a rate that is more often rolled back than promoted is not one to forecast a promotion for.
    promotable = course.promoted >= 0.5
    errors = GateForecast(
        ERRORS,
        math.ceil(course.expected_requests) if promotable else None,
        course.likely_requests if promotable else None,
    )
    return errors, _to_show_below(LATENCY, 1 - limits.quantile, limits.beta, healthy.slow_share)


def _shadow_gates(limits: CanaryLimits, healthy: HealthyCanary) -> tuple[GateForecast, ...]:
    gates = [_to_show_below(AGREEMENT, 1 - limits.min_agreement, limits.beta, 1 - healthy.agreement)]
    if limits.max_score_difference is not None:
        gates.append(_to_show_below(SCORES, limits.max_score_difference, limits.beta, healthy.score_difference))
    return tuple(gates)


def _to_show_below(name: str, limit: float, beta: float, share: float) -> GateForecast:
    return GateForecast(
        name, trials_to_show_below(limit, beta, share), trials_to_show_below(limit, beta, share, spread=_LIKELY)
    )


@lru_cache(maxsize=32)
def _course(test: ErrorRateTest, error_rate: float) -> Course:
    """A tenth of a second, and the same for each step."""
    return test.course(error_rate)


def _slowest(requests: Sequence[int | None]) -> int | None:
    known = [count for count in requests if count is not None]
    return max(known) if len(known) == len(requests) else None


def _minutes(requests: int | None, per_s: float, min_step_s: float) -> float | None:
    return None if requests is None or per_s <= 0 else max(requests / per_s, min_step_s) / 60


def _sentence(
    name: str,
    gates: Sequence[GateForecast],
    requests: int | None,
    likely: int | None,
    minutes: float | None,
    likely_minutes: float | None,
    probes: float,
) -> str:
    hopeless = [gate.name for gate in gates if gate.requests is None]
    if requests is None or likely is None:
        return f"{name}: no promotion to be expected by {', '.join(hopeless)}: not even today's numbers would pass"
    each = ", ".join(f"{gate.name} {gate.requests:,}" for gate in gates)
    text = f"{name}: about {requests:,} requests to the canary, at most {likely:,} in nine of ten cases ({each})"
    if minutes is None or likely_minutes is None:
        return f"{text}; there is no traffic now, and without it nothing is promoted"
    traffic = f"present traffic and {probes:.2g} probes/s" if probes else "present traffic"
    return f"{text}; {minutes:,.1f} min at {traffic}, at most {likely_minutes:,.1f} in nine of ten cases"
