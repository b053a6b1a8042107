"""Bounds on a share that hold at every moment at once, so that one may look every few seconds and stop at any time.

An ordinary 95 % bound is right for one look.  Looked at again and again, some look will be wrong: of healthy streams
judged after every request by Clopper and Pearson's bounds, far more than 5 % are condemned in the end.  Here the
evidence against "the share is q" is a likelihood ratio averaged over the alternatives, which stays below 1/alpha at all
times together with probability at least 1 - alpha when the share is q.  A bound collects the q not yet refuted.

The alternatives are uniform over the shares on the other side of q, which makes the evidence one-sided, and the
average has a closed form.

Sources: H. Robbins, Annals of Mathematical Statistics 41 (1970) 1397-1409, for the mixture; T. L. Lai, Annals of
Statistics 4 (1976) 265-280, for binomial confidence sequences; S. R. Howard, A. Ramdas, J. McAuliffe and J. Sekhon,
Annals of Statistics 49 (2021) 1055-1080, for numbers between 0 and 1 that are not only 0 or 1: the ratio of such a
number is at most the one of a coin with the same mean, by convexity.
"""

from __future__ import annotations

import math

from pipelines.core.statistics import Interval

_BISECTIONS = 50


def log_evidence_above(total: float, trials: float, share: float) -> float:
    """Evidence, in nats, that the true share is above `share`; e.g. `log(20)` refutes "at most `share`" at 5 %.

    Args:
        total: sum of `trials` numbers from 0 to 1, e.g. the count of failures.
        trials: how many numbers.
        share: the share in question, between 0 and 1, both excluded.

    Returns:
        log of the average, over theta uniform on (share, 1), of the likelihood ratio of theta to `share`; 0 without
        trials.  Far below 0, where it decides nothing, it is rough, or `-inf`.
    """
    return _log_mixture(total, trials, share)


def log_evidence_below(total: float, trials: float, share: float) -> float:
    """Evidence, in nats, that the true share is below `share`; arguments as for `log_evidence_above`."""
    return _log_mixture(trials - total, trials, 1 - share)


def _log_mixture(total: float, trials: float, share: float) -> float:
    from scipy.special import betaincc, betaln  # a quarter of a second that `perch --help` need not wait

    if not (math.isfinite(trials) and 0 <= total <= trials):
        raise ValueError(f"a total of {total} in {trials} trials")
    if not 0 < share < 1:
        raise ValueError(f"share {share} is not between 0 and 1")
    rest = trials - total
    beyond = float(betaincc(total + 1, rest + 1, share))  # posterior probability of shares above the one in question
    if beyond == 0.0:
        return -math.inf
    likelihood = total * math.log(share) + rest * math.log1p(-share)
    return float(betaln(total + 1, rest + 1)) + math.log(beyond) - math.log1p(-share) - likelihood


def upper_bound(total: float, trials: float, alpha: float) -> float:
    """The largest share not refuted; below the true one, ever, with probability at most `alpha`.  1 without trials."""
    if trials == 0 or total >= trials:
        return 1.0
    limit = -math.log(alpha)
    inner, outer = total / trials, 1.0
    for _ in range(_BISECTIONS):
        middle = (inner + outer) / 2
        if middle >= 1.0 or (middle > 0.0 and log_evidence_below(total, trials, middle) >= limit):
            outer = middle
        else:
            inner = middle
    return outer


def lower_bound(total: float, trials: float, alpha: float) -> float:
    """The smallest share not refuted; above the true one, ever, with probability at most `alpha`.  0 without trials."""
    return 1.0 - upper_bound(trials - total, trials, alpha)


def share_interval(total: float, trials: float, alpha: float) -> Interval | None:
    """The observed share between its lower and its upper bound, each wrong with probability at most `alpha`."""
    if trials == 0:
        return None
    value = total / trials
    low, high = lower_bound(total, trials, alpha), upper_bound(total, trials, alpha)
    return Interval(value, min(low, value), max(high, value))


def trials_to_show_below(limit: float, alpha: float, share: float = 0.0, *, spread: float = 0.0) -> int | None:
    """The trials after which a share is shown to be below a limit, if it is observed as expected.

    Args:
        limit: to be stayed below.
        alpha: largest probability of the claim when it is wrong.
        share: the true share; 0 gives the shortest proof there is.
        spread: standard deviations by which the observed count may lie above the expected one, e.g. 1.28 for a number
            of trials that suffices in nine of ten cases.

    Returns:
        The number of trials, or `None` when the share is not below the limit by what 10^9 trials can show.
    """
    needed = -math.log(alpha)

    def shown(trials: float) -> bool:
        total = trials * share + spread * math.sqrt(trials * share * (1 - share))
        return total < trials and log_evidence_below(total, trials, limit) >= needed

    high = 1
    while not shown(high):
        high *= 2
        if high > 1e9:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high
