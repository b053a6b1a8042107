"""The gates on how a canary answers: errors, latency, crashes.

Errors and latency have one form.  A request is bad (failed, or slower than the limit) or not; a test on the canary's
own bad requests says whether there are too many; and where the stable slot has traffic in the same window, the canary
is rolled back only when it is also shown to be worse than that (`pipelines.core.slot_comparison`).  With both as bad,
the verdict is "need more data": nobody is blamed and nobody promoted.
"""

from __future__ import annotations

import math

from pipelines.core.canary_observations import (
    CanaryLimits,
    CanaryWindow,
    Counts,
    Measured,
    SlotWindow,
    measured,
)
from pipelines.core.gate_judgement import GateJudgement, percent, progress, verdict_of, whole
from pipelines.core.quantile_bounds import Histogram, quantile_of_histogram
from pipelines.core.sequential_test import NEED_MORE_DATA, ErrorRateTest
from pipelines.core.share_bounds import (
    log_evidence_above,
    log_evidence_below,
    share_interval,
    trials_to_show_below,
)
from pipelines.core.slot_comparison import comparable_share, log_evidence_canary_is_worse

ERRORS, LATENCY, CRASHES = "errors", "latency", "crashes"
_LEAST_HORIZON = 1_000
_LATE_SLOW = 3.0  # times the allowed share of slow requests that is looked for after a healthy time


def judge_errors(window: CanaryWindow, limits: CanaryLimits) -> tuple[GateJudgement, Counts]:
    """The gate on the error rate, and its new turning point."""
    test = limits.error_rate_test
    missing: list[str] = []
    bad, total = _errors_of(window.canary, "canary", limits, missing)
    stable = _stable_expected(window, missing)
    stable_bad, stable_total = _errors_of(window.stable, "stable", limits, missing) if stable else (None, None)
    turning = window.turning_points.get(ERRORS, Counts())
    if bad is None or total is None:
        return _nothing(ERRORS, missing, limits.max_error_rate), turning
    counts = Counts(bad, total, stable_bad, stable_total)
    ratio = test.log_likelihood_ratio(total, bad)
    own = ratio / test.roll_back_at
    to_roll_back, shared, turning = _roll_back_evidence(own, test, counts, turning, window)
    to_promote = 0.0 if shared or to_roll_back >= 1 else progress(ratio, test.promote_at)
    verdict = verdict_of(to_promote, to_roll_back, bool(missing))
    shared &= verdict == NEED_MORE_DATA
    interval = share_interval(bad, total, limits.alpha)
    left = None if shared else 0.0
    rate = (bad + test.acceptable) / (total + 1)  # begins at the acceptable rate, and soon is the observed one
    if verdict == NEED_MORE_DATA and not shared:
        left = test.requests_left(total, bad, rate)
    exhausted = verdict == NEED_MORE_DATA and total >= test.max_requests
    text = f"{_share(bad, total)} failed, limit {percent(limits.max_error_rate)}"
    return GateJudgement(
        name=ERRORS,
        verdict=verdict,
        value=interval.value if interval else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        limit=limits.max_error_rate,
        to_promote=to_promote,
        to_roll_back=to_roll_back,
        requests_left=whole(left),
        exhausted=exhausted,
        shared_trouble=shared,
        missing=tuple(missing),
        sentence=_sentence(text, counts, "failed", shared, exhausted, missing),
    ), turning


def judge_latency(window: CanaryWindow, limits: CanaryLimits) -> tuple[GateJudgement, Counts]:
    """The gate on the quantile of latency, and its new turning point.

    Where the limit is no edge of the histogram, the requests in its bucket count as slow against a promotion, and as
    fast against a roll-back.
    """
    slow_share = 1 - limits.quantile
    missing: list[str] = []
    histogram = _histogram_of(window.canary, "canary", limits, missing)
    stable = None
    if _stable_expected(window, missing):
        stable = _histogram_of(window.stable, "stable", limits, missing)
    turning = window.turning_points.get(LATENCY, Counts())
    if histogram is None:
        return _nothing(LATENCY, missing, limits.max_latency_s), turning
    total = histogram.total
    counts = Counts(
        histogram.surely_above(limits.max_latency_s),
        total,
        stable.surely_above(limits.max_latency_s) if stable else None,
        stable.total if stable else None,
    )
    perhaps_slow = histogram.possibly_above(limits.max_latency_s)
    own = log_evidence_above(counts.bad, total, slow_share) / -math.log(limits.alpha)
    late_test = ErrorRateTest(
        slow_share,
        min((1 + slow_share) / 2, _LATE_SLOW * slow_share),
        limits.alpha,
        limits.beta,
        max(limits.max_requests, _LEAST_HORIZON),
    )
    to_roll_back, shared, turning = _roll_back_evidence(own, late_test, counts, turning, window)
    to_promote = 0.0
    if not shared and to_roll_back < 1:
        to_promote = progress(log_evidence_below(perhaps_slow, total, slow_share), -math.log(limits.beta))
    verdict = verdict_of(to_promote, to_roll_back, bool(missing))
    shared &= verdict == NEED_MORE_DATA
    bounds = quantile_of_histogram(histogram, limits.quantile, limits.alpha)
    exhausted = verdict == NEED_MORE_DATA and total >= limits.max_requests
    left = None if verdict == NEED_MORE_DATA else 0.0
    if total == 0 or (left is None and perhaps_slow < total * slow_share):
        needed = trials_to_show_below(slow_share, limits.beta, perhaps_slow / total if total else 0.0)
        left = None if needed is None else max(1.0, needed - total)
    shown = f"p{100 * limits.quantile:g} {_duration(bounds.value)}" if bounds else "no answers"
    text = (
        f"{shown}, {_share(counts.bad, total)} slower than the limit of {_duration(limits.max_latency_s)}, "
        f"allowed {percent(slow_share)}"
    )
    return GateJudgement(
        name=LATENCY,
        verdict=verdict,
        value=bounds.value if bounds else None,
        low=bounds.low if bounds else None,
        high=bounds.high if bounds and math.isfinite(bounds.high) else None,
        limit=limits.max_latency_s,
        to_promote=to_promote,
        to_roll_back=to_roll_back,
        requests_left=whole(left),
        exhausted=exhausted,
        shared_trouble=shared,
        missing=tuple(missing),
        sentence=_sentence(text, counts, "slower", shared, exhausted, missing),
    ), turning


def judge_crashes(window: CanaryWindow, limits: CanaryLimits) -> GateJudgement:
    """The gate on processes that ended unasked: one too many is enough, whatever the stable slot does."""
    missing: list[str] = []
    crashes = None
    if _is_there(window.canary, "canary", limits, missing):
        crashes = _measured(window.canary.crashes if window.canary else None, "canary: crashes", missing)
    if crashes is None:
        return _nothing(CRASHES, missing, limits.max_crashes)
    breached = crashes > limits.max_crashes
    text = f"{crashes:,.0f} processes ended unasked, allowed {limits.max_crashes}"
    return GateJudgement(
        name=CRASHES,
        verdict=verdict_of(float(not breached), float(breached), bool(missing)),
        value=crashes,
        limit=limits.max_crashes,
        to_promote=float(not breached),
        to_roll_back=float(breached),
        missing=tuple(missing),
        sentence=_sentence(text, None, "", False, False, missing),
    )


def _roll_back_evidence(
    own: float, test: ErrorRateTest, counts: Counts, turning: Counts, window: CanaryWindow
) -> tuple[float, bool, Counts]:
    """How far a roll-back has come: by the whole window, or by what came after its best moment.

    Args:
        own: progress by the canary's own numbers in the whole window.
        test: what the best moment is the best one of.
        counts: of both slots.
        turning: the best moment so far.
        window: for the canary's share.

    Returns:
        Progress from 0 to 1, whether only the stable slot's equal trouble stands against a roll-back, the best moment.
    """
    weight = measured(window.canary_share) or 0.0
    whole_window, shared = _blamed(own, counts, weight, -math.log(test.alpha))
    since = counts.since(turning)
    if since is None:  # the window began anew
        turning, since = Counts(), counts
    rise = test.log_likelihood_ratio(since.total, since.bad)
    if rise <= 0:
        return whole_window, shared, counts
    late, late_shared = _blamed(rise / test.late_roll_back_at, since, weight, test.late_roll_back_at)
    return max(whole_window, late), shared or late_shared, turning


def _blamed(own: float, counts: Counts, weight: float, needed: float) -> tuple[float, bool]:
    """Progress to a roll-back by the canary's own numbers and by being worse than the stable slot, the lesser one.

    Args:
        own: progress by the canary's own numbers.
        counts: of both slots.
        weight: the canary's share of the requests.
        needed: evidence that the canary is worse, in nats.

    Returns:
        Progress from 0 to 1, and whether only the stable slot's equal trouble stands against a roll-back.
    """
    own = min(1.0, max(0.0, own))
    if counts.stable_bad is None or counts.stable_total is None:
        return own, False
    share = comparable_share(counts.total, counts.stable_total, weight)
    if share is None:
        return own, False
    worse = progress(log_evidence_canary_is_worse(counts.bad, counts.stable_bad, share), needed)
    return min(own, worse), own >= 1 and worse < 1


def _stable_expected(window: CanaryWindow, missing: list[str]) -> bool:
    """Whether there is a stable slot to compare with; what is missing is noted."""
    share = measured(window.canary_share)
    if share is None or share > 1:
        missing.append("the canary's share of the requests")
        return window.stable is not None
    return share < 1


def _is_there(slot: SlotWindow | None, name: str, limits: CanaryLimits, missing: list[str]) -> bool:
    if slot is None:
        missing.append(f"{name}: gives no metrics")
        return False
    if slot.age_s is None or not abs(slot.age_s) <= limits.max_age_s:  # NaN is not within, a clock set back is not
        age = "of unknown age" if slot.age_s is None or math.isnan(slot.age_s) else f"{slot.age_s:,.0f} s old"
        missing.append(f"{name}: metrics {age}, allowed {limits.max_age_s:g} s")
    return True


def _measured(value: Measured, name: str, missing: list[str]) -> float | None:
    number = measured(value)
    if number is None:
        missing.append(name)
    return number


def _errors_of(
    slot: SlotWindow | None, name: str, limits: CanaryLimits, missing: list[str]
) -> tuple[float | None, float | None]:
    """Failed and all requests; both None unless both are known."""
    if not _is_there(slot, name, limits, missing) or slot is None:
        return None, None
    errors = _measured(slot.errors, f"{name}: errors", missing)
    requests = _measured(slot.requests, f"{name}: requests", missing)
    if errors is None or requests is None:
        return None, None
    if errors > requests:  # read a moment apart: the errors are real all the same
        missing.append(f"{name}: more errors than requests")
    return errors, max(errors, requests)


def _histogram_of(slot: SlotWindow | None, name: str, limits: CanaryLimits, missing: list[str]) -> Histogram | None:
    if not _is_there(slot, name, limits, missing) or slot is None:
        return None
    if slot.latency_buckets is None:
        missing.append(f"{name}: latency")
        return None
    try:
        return Histogram.of(slot.latency_buckets)
    except (ValueError, TypeError) as error:
        missing.append(f"{name}: latency ({error})")
        return None


def _nothing(name: str, missing: list[str], limit: float) -> GateJudgement:
    return GateJudgement(
        name=name,
        verdict=NEED_MORE_DATA,
        limit=limit,
        missing=tuple(missing),
        sentence="no verdict without: " + "; ".join(missing),
    )


def _sentence(text: str, counts: Counts | None, bad: str, shared: bool, exhausted: bool, missing: list[str]) -> str:
    parts = [text]
    if counts and counts.stable_bad is not None and counts.stable_total is not None:
        parts.append(f"stable {_share(counts.stable_bad, counts.stable_total)} {bad} in the same window")
    if shared:
        parts.append("both slots are as bad, so that the cause lies outside: nobody is blamed and nobody promoted")
    if exhausted:
        parts.append("no verdict after all requests that a step may take: a person decides")
    if missing:
        parts.append("no promotion without: " + ", ".join(missing))
    return "; ".join(parts)


def _share(part: float, total: float) -> str:
    return f"{part:,.0f} of {total:,.0f}" + (f" ({percent(part / total)})" if total else "")


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
