"""The gates on what a canary answers: mirrored requests, compared with the champion's answers to the same ones.

They see what latency and errors cannot: a model with swapped labels is as fast and as polite as before.  Agreement and
scores have to be proven; single labels and the shift between them are many questions, and block beyond doubt only.
"""

from __future__ import annotations

import math

from pipelines.core.agreement import label_shift, total_and_agreed, worst_label
from pipelines.core.canary_observations import CanaryLimits, MirrorWindow, measured
from pipelines.core.gate_judgement import GateJudgement, percent, progress, verdict_of, whole
from pipelines.core.sequential_test import NEED_MORE_DATA
from pipelines.core.share_bounds import log_evidence_above, log_evidence_below, share_interval, trials_to_show_below

AGREEMENT, LABELS, LABEL_SHIFT, SCORES = "agreement", "labels", "label shift", "scores"
_REQUESTS = "mirrored requests"


def judge_mirror(mirror: MirrorWindow | None, limits: CanaryLimits) -> list[GateJudgement]:
    """All gates on mirrored requests; with nothing mirrored, or counts that cannot be, each says so."""
    reason = _REQUESTS
    if mirror is not None and mirror.pairs is not None:
        try:
            total_and_agreed(mirror.pairs)
        except (ValueError, TypeError) as error:
            reason = f"{_REQUESTS} ({error})"
        else:
            return _judge_pairs(mirror, limits)
    names = [AGREEMENT, LABELS, LABEL_SHIFT, *([SCORES] if limits.max_score_difference is not None else [])]
    return [_nothing(name, reason) for name in names]


def _judge_pairs(mirror: MirrorWindow, limits: CanaryLimits) -> list[GateJudgement]:
    gates = [_judge_agreement(mirror, limits), _judge_labels(mirror, limits), _judge_shift(mirror, limits)]
    if limits.max_score_difference is not None:
        gates.append(_judge_scores(mirror, limits, limits.max_score_difference))
    return gates


def _judge_agreement(mirror: MirrorWindow, limits: CanaryLimits) -> GateJudgement:
    total, agreed = total_and_agreed(mirror.pairs or {})
    limit = limits.min_agreement
    to_promote = progress(log_evidence_above(agreed, total, limit), -math.log(limits.beta))
    to_roll_back = progress(log_evidence_below(agreed, total, limit), -math.log(limits.alpha))
    verdict = verdict_of(to_promote, to_roll_back, missing=False)
    interval = share_interval(agreed, total, limits.alpha)
    if interval is None:
        return _nothing(AGREEMENT, _REQUESTS)
    left = 0.0 if verdict != NEED_MORE_DATA else _left(1 - interval.value, 1 - limit, total, limits.beta)
    exhausted = verdict == NEED_MORE_DATA and total >= limits.max_requests
    return GateJudgement(
        name=AGREEMENT,
        verdict=verdict,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        limit=limit,
        to_promote=to_promote,
        to_roll_back=to_roll_back,
        requests_left=whole(left),
        exhausted=exhausted,
        sentence=f"same label as the champion in {agreed:,.0f} of {total:,.0f} mirrored requests, {interval.value:.3f} "
        f"[{interval.low:.3f}, {interval.high:.3f}], at least {limit:g}"
        + ("; no verdict after all requests that a step may take: a person decides" if exhausted else ""),
    )


def _judge_labels(mirror: MirrorWindow, limits: CanaryLimits) -> GateJudgement:
    worst = worst_label(mirror.pairs or {}, mirror.labels, limits.min_label_agreement, limits.alpha)
    if worst is None:
        return _nothing(LABELS, _REQUESTS)
    to_roll_back = progress(worst.log_evidence, -math.log(limits.alpha))
    return GateJudgement(
        name=LABELS,
        verdict=verdict_of(1.0, to_roll_back, missing=False),
        value=worst.agreement.value,
        low=worst.agreement.low,
        high=worst.agreement.high,
        limit=limits.min_label_agreement,
        to_promote=float(to_roll_back < 1),
        to_roll_back=to_roll_back,
        sentence=f"worst label {worst.label}: {percent(worst.agreement.value)} of {worst.requests:,.0f} "
        f"with the champion's answer, no label clearly below {percent(limits.min_label_agreement)}",
    )


def _judge_shift(mirror: MirrorWindow, limits: CanaryLimits) -> GateJudgement:
    shift = label_shift(mirror.pairs or {}, limits.alpha)
    if shift is None:
        return _nothing(LABEL_SHIFT, _REQUESTS)
    breached = shift.low > limits.max_label_shift
    return GateJudgement(
        name=LABEL_SHIFT,
        verdict=verdict_of(1.0, float(breached), missing=False),
        value=shift.value,
        low=shift.low,
        high=shift.high,
        limit=limits.max_label_shift,
        to_promote=float(not breached),
        to_roll_back=min(1.0, shift.low / limits.max_label_shift),
        sentence=f"{percent(shift.value)} [{percent(shift.low)}, {percent(shift.high)}] of predictions "
        f"moved to another label on balance, not clearly above {percent(limits.max_label_shift)}",
    )


def _judge_scores(mirror: MirrorWindow, limits: CanaryLimits, limit: float) -> GateJudgement:
    total, _ = total_and_agreed(mirror.pairs or {})
    difference = measured(mirror.score_difference)
    if difference is None or difference > total * (1 + 1e-9):
        return _nothing(SCORES, "both models' probabilities")
    difference = min(difference, total)  # a sum of floats
    to_promote = progress(log_evidence_below(difference, total, limit), -math.log(limits.beta))
    to_roll_back = progress(log_evidence_above(difference, total, limit), -math.log(limits.alpha))
    verdict = verdict_of(to_promote, to_roll_back, missing=False)
    interval = share_interval(difference, total, limits.alpha)
    if interval is None:
        return _nothing(SCORES, _REQUESTS)
    left = 0.0 if verdict != NEED_MORE_DATA else _left(interval.value, limit, total, limits.beta)
    return GateJudgement(
        name=SCORES,
        verdict=verdict,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        limit=limit,
        to_promote=to_promote,
        to_roll_back=to_roll_back,
        requests_left=whole(left),
        exhausted=verdict == NEED_MORE_DATA and total >= limits.max_requests,
        sentence=f"probabilities differ from the champion's by {interval.value:.3f} [{interval.low:.3f}, "
        f"{interval.high:.3f}] on average (0 same, 1 opposite), at most {limit:g}",
    )


def _left(share: float, limit: float, total: float, beta: float) -> float | None:
    needed = trials_to_show_below(limit, beta, share) if share < limit else None
    return None if needed is None else max(1.0, needed - total)


def _nothing(name: str, reason: str) -> GateJudgement:
    return GateJudgement(name=name, verdict=NEED_MORE_DATA, missing=(reason,), sentence=f"no verdict without: {reason}")
