"""How a model answers mirrored requests, beside what the champion answered to the same ones.

Four questions, from the coarse one to the fine one: do they predict the same label; is there a label that the new
model has lost, as with two labels swapped; does it predict the labels as often; do its probabilities differ.  All
bounds hold at every look at once (`pipelines.core.share_bounds`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.core.share_bounds import log_evidence_below, lower_bound, share_interval, upper_bound
from pipelines.core.statistics import Interval

LabelPairs = Mapping[tuple[str, str], float]
"""(the champion's label, the new model's label) -> number of requests with these answers."""


@dataclass(frozen=True)
class LabelAgreement:
    """How often the new model confirms the champion where that predicts one label.

    Attributes:
        label: the champion's label.
        requests: how often the champion predicted it.
        agreement: share of them with the same answer, with its bounds.
        log_evidence: evidence, in nats, that the agreement is below the limit; corrected for the number of labels.
    """

    label: str
    requests: float
    agreement: Interval
    log_evidence: float


def total_and_agreed(pairs: LabelPairs) -> tuple[float, float]:
    """Number of requests, and how many of them got the same label twice.

    Raises:
        ValueError: a count is negative or not finite.
    """
    if not all(math.isfinite(count) and count >= 0 for count in pairs.values()):
        raise ValueError("a count of mirrored requests is negative or no number")
    return sum(pairs.values()), sum(count for (old, new), count in pairs.items() if old == new)


def worst_label(pairs: LabelPairs, labels: Sequence[str], limit: float, alpha: float) -> LabelAgreement | None:
    """The label with the strongest evidence that its agreement is below a limit; `None` without requests.

    Each label gets an equal part of alpha (Bonferroni), so that with many labels none is condemned by chance.

    Args:
        pairs: the answers.
        labels: all labels that the models know.
        limit: agreement asked of each label, between 0 and 1.
        alpha: largest probability to find such a label where there is none.
    """
    parts = max(1, len({*labels, *(old for old, _ in pairs)}))
    seen: defaultdict[str, float] = defaultdict(float)
    for (old, _), count in pairs.items():
        seen[old] += count
    found = []
    for label, requests in seen.items():
        agreed = pairs.get((label, label), 0.0)
        interval = share_interval(agreed, requests, alpha / parts)
        if interval is not None:
            evidence = log_evidence_below(agreed, requests, limit) - math.log(parts)
            found.append(LabelAgreement(label, requests, interval, evidence))
    return max(found, key=lambda one: one.log_evidence, default=None)


def label_shift(pairs: LabelPairs, alpha: float) -> Interval | None:
    """Total variation between the labels that both models predict: the share that would have to be relabelled.

    Half the sum over labels of |share with the new model - share with the champion|, from 0 to 1.  The bounds combine
    those of each label's gains and losses (Bonferroni), and the coupling inequality: labels cannot differ more often in
    sum than request by request (D. Levin, Y. Peres and E. Wilmer, Markov Chains and Mixing Times (2009), 4.7).

    Preferred to a population stability index, which has no bound and no unit.

    Args:
        pairs: the answers.
        alpha: largest probability, for each of the two bounds, ever to be wrong.
    """
    total, agreed = total_and_agreed(pairs)
    if total == 0:
        return None
    gains: defaultdict[str, float] = defaultdict(float)
    losses: defaultdict[str, float] = defaultdict(float)
    for (old, new), count in pairs.items():
        if old != new:
            gains[new] += count
            losses[old] += count
    labels = {label for pair in pairs for label in pair}
    part = alpha / (2 * len(labels) + 1)
    value = low = high = 0.0
    for label in labels:
        gained, lost = gains[label], losses[label]
        value += abs(gained - lost) / total / 2
        least = lower_bound(gained, total, part) - upper_bound(lost, total, part)
        most = upper_bound(gained, total, part) - lower_bound(lost, total, part)
        low += max(0.0, least, -most) / 2
        high += max(abs(least), abs(most)) / 2
    high = min(1.0, high, upper_bound(total - agreed, total, part))
    value = min(1.0, value)  # a sum of floats
    return Interval(value, min(low, value), max(high, value))
