"""The gates on what a canary answers: mirrored requests, compared with the champion's answers to the same ones.

They see what latency and errors cannot: a model with swapped labels is as fast and as polite as before.  Agreement and
scores have to be proven; single labels and the shift between them are many questions, and block beyond doubt only.

Agreement, labels and scores are held over all of the window and over its last requests alone (`late_change`), each with
half of alpha.  Long before these condemn, they hold up the promotion.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipelines.core.agreement import LabelPairs, label_shift, total_and_agreed, worst_label
from pipelines.core.canary_observations import CanaryLimits, Counts, MirrorWindow, measured
from pipelines.core.gate_judgement import GateJudgement, percent, progress, verdict_of, whole
from pipelines.core.late_change import LateStretch, late_boundary, late_stretch
from pipelines.core.sequential_test import NEED_MORE_DATA
from pipelines.core.share_bounds import log_evidence_above, log_evidence_below, share_interval, trials_to_show_below

AGREEMENT, LABELS, LABEL_SHIFT, SCORES = "agreement", "labels", "label shift", "scores"
_REQUESTS = "mirrored requests"


def judge_mirror(
    mirror: MirrorWindow | None, limits: CanaryLimits, turning_points: Mapping[str, Counts]
) -> tuple[list[GateJudgement], dict[str, Counts]]:
    """All gates on mirrored requests, and their new turning points.

    With nothing mirrored, or counts that cannot be, each gate says so, and the turning points stay as they are.
    """
    names = [AGREEMENT, LABELS, LABEL_SHIFT, *([SCORES] if limits.max_score_difference is not None else [])]
    turned = _Turning(turning_points, names)
    reason = _REQUESTS
    if mirror is not None and mirror.pairs is not None:
        try:
            total_and_agreed(mirror.pairs)
        except (ValueError, TypeError) as error:
            reason = f"{_REQUESTS} ({error})"
        else:
            return _judge_pairs(mirror, mirror.pairs, limits, turned), turned.points
    return [_nothing(name, reason) for name in names], turned.points


class _Turning:
    """The turning points of the last look at these gates, each replaced by the new one as it is found."""

    def __init__(self, known: Mapping[str, Counts], gates: Sequence[str]) -> None:
        self.points = {name: point for name, point in known.items() if name.partition(":")[0] in gates}

    def since(self, name: str, counts: Counts, allowed: float) -> LateStretch:
        late = late_stretch(counts, self.points.get(name, Counts()), allowed)
        self.points[name] = late.best
        return late


def _judge_pairs(
    mirror: MirrorWindow, pairs: LabelPairs, limits: CanaryLimits, turned: _Turning
) -> list[GateJudgement]:
    gates = [_judge_agreement(pairs, limits, turned), _judge_labels(mirror, pairs, limits, turned)]
    gates.append(_judge_shift(pairs, limits))
    if limits.max_score_difference is not None:
        gates.append(_judge_scores(mirror, pairs, limits, limits.max_score_difference, turned))
    return gates


def _judge_agreement(pairs: LabelPairs, limits: CanaryLimits, turned: _Turning) -> GateJudgement:
    total, agreed = total_and_agreed(pairs)
    limit = limits.min_agreement
    interval = share_interval(agreed, total, limits.alpha)
    if interval is None:
        return _nothing(AGREEMENT, _REQUESTS)
    late = turned.since(AGREEMENT, Counts(total - agreed, total), 1 - limit)
    held_up = _is_held_up(late, limits)
    to_promote = 0.0 if held_up else progress(log_evidence_above(agreed, total, limit), -math.log(limits.beta))
    to_roll_back = _to_roll_back(log_evidence_below(agreed, total, limit), late, limits)
    verdict = verdict_of(to_promote, to_roll_back, missing=False)
    left = 0.0 if verdict != NEED_MORE_DATA else None
    if verdict == NEED_MORE_DATA and not held_up:
        left = _left(1 - interval.value, 1 - limit, total, limits.beta)
    exhausted = verdict == NEED_MORE_DATA and total >= limits.max_requests
    lately = f"the same in {late.counts.total - late.counts.bad:,.0f} of the last {late.counts.total:,.0f} alone"
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
        + (f"; {lately}" if held_up else "")
        + ("; no verdict after all requests that a step may take: a person decides" if exhausted else ""),
    )


def _judge_labels(mirror: MirrorWindow, pairs: LabelPairs, limits: CanaryLimits, turned: _Turning) -> GateJudgement:
    worst = worst_label(pairs, mirror.labels, limits.min_label_agreement, limits.alpha)
    if worst is None:
        return _nothing(LABELS, _REQUESTS)
    label, late, labels = _worst_late_label(mirror, pairs, limits, turned)
    held_up = _is_held_up(late, limits, questions=labels)
    to_roll_back = _to_roll_back(worst.log_evidence, late, limits)
    to_promote = float(to_roll_back < 1 and not held_up)
    lately = (
        f"; {label}: {percent(1 - late.counts.bad / late.counts.total)} of its last {late.counts.total:,.0f} alone"
        if held_up
        else ""
    )
    return GateJudgement(
        name=LABELS,
        verdict=verdict_of(to_promote, to_roll_back, missing=False),
        value=worst.agreement.value,
        low=worst.agreement.low,
        high=worst.agreement.high,
        limit=limits.min_label_agreement,
        to_promote=to_promote,
        to_roll_back=to_roll_back,
        sentence=f"worst label {worst.label}: {percent(worst.agreement.value)} of {worst.requests:,.0f} "
        f"with the champion's answer, no label clearly below {percent(limits.min_label_agreement)}{lately}",
    )


def _worst_late_label(
    mirror: MirrorWindow, pairs: LabelPairs, limits: CanaryLimits, turned: _Turning
) -> tuple[str, LateStretch, int]:
    """The label whose last requests speak most against it, these, and how many labels there are."""
    seen: defaultdict[str, float] = defaultdict(float)
    for (old, _), count in pairs.items():
        seen[old] += count
    allowed = 1 - limits.min_label_agreement
    found = [
        (label, turned.since(f"{LABELS}:{label}", Counts(requests - pairs.get((label, label), 0.0), requests), allowed))
        for label, requests in seen.items()
    ]
    label, late = max(found, key=lambda one: one[1].log_evidence)
    return label, late, len({*mirror.labels, *seen})


def _judge_shift(pairs: LabelPairs, limits: CanaryLimits) -> GateJudgement:
    shift = label_shift(pairs, limits.alpha)
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


def _judge_scores(
    mirror: MirrorWindow, pairs: LabelPairs, limits: CanaryLimits, limit: float, turned: _Turning
) -> GateJudgement:
    total, _ = total_and_agreed(pairs)
    difference = measured(mirror.score_difference)
    if difference is None or difference > total * (1 + 1e-9):
        return _nothing(SCORES, "both models' probabilities")
    difference = min(difference, total)  # a sum of floats
    interval = share_interval(difference, total, limits.alpha)
    if interval is None:
        return _nothing(SCORES, _REQUESTS)
    late = turned.since(SCORES, Counts(difference, total), limit)
    held_up = _is_held_up(late, limits)
    to_promote = 0.0 if held_up else progress(log_evidence_below(difference, total, limit), -math.log(limits.beta))
    to_roll_back = _to_roll_back(log_evidence_above(difference, total, limit), late, limits)
    verdict = verdict_of(to_promote, to_roll_back, missing=False)
    left = 0.0 if verdict != NEED_MORE_DATA else None
    if verdict == NEED_MORE_DATA and not held_up:
        left = _left(interval.value, limit, total, limits.beta)
    lately = f"{late.counts.bad / late.counts.total:.3f} in the last {late.counts.total:,.0f} alone" if held_up else ""
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
        f"{interval.high:.3f}] on average (0 same, 1 opposite), at most {limit:g}" + (f"; {lately}" if lately else ""),
    )


def _to_roll_back(over_all: float, late: LateStretch, limits: CanaryLimits) -> float:
    """Progress to a roll-back by all requests, or by the last ones alone; either may err with half of alpha."""
    alpha = limits.alpha / 2
    return max(
        progress(over_all, -math.log(alpha)),
        progress(late.log_evidence, late_boundary(limits.max_requests, alpha)),
    )


def _is_held_up(late: LateStretch, limits: CanaryLimits, questions: int = 1) -> bool:
    """Whether the last requests speak against a promotion: so much evidence as promotion itself takes."""
    return late.log_evidence >= math.log(questions / limits.beta)


def _left(share: float, limit: float, total: float, beta: float) -> float | None:
    needed = trials_to_show_below(limit, beta, share) if share < limit else None
    return None if needed is None else max(1.0, needed - total)


def _nothing(name: str, reason: str) -> GateJudgement:
    return GateJudgement(name=name, verdict=NEED_MORE_DATA, missing=(reason,), sentence=f"no verdict without: {reason}")
