"""What came after a window's best moment, tested by itself: a long good time is no credit that a fault may spend.

Over a whole window a fault that begins late is diluted by the good time before.  So the last requests are tested alone
as well, as many of them as speak most against the canary: those after the moment when the likelihood ratio of a clearly
bad share to the allowed one was lowest.

Sources: E. S. Page, Biometrika 41 (1954) 100-115, for the moment, where his CUSUM begins anew; J. Shin, A. Ramdas and
A. Rinaldo, New England Journal of Statistics in Data Science 2 (2024) 229-260, for evidence that begins anew at any
moment, about shares that are not known beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.core.canary_observations import Counts
from pipelines.core.share_bounds import log_evidence_above

_CLEARLY_BAD = 2.0  # times the allowed share
_ROUNDING = 1e-6  # of sums of parts, which come in another order each time


@dataclass(frozen=True)
class LateStretch:
    """The requests since a window's best moment.

    Attributes:
        counts: bad and all requests among them.
        log_evidence: in nats, that more of them are bad than allowed; not below 0, and 0 at the best moment.
        best: the counts at the best moment, to be handed to the next look.
    """

    counts: Counts
    log_evidence: float
    best: Counts


def late_stretch(counts: Counts, best: Counts, allowed: float) -> LateStretch:
    """Find the best moment anew, and weigh what came after it.

    Args:
        counts: bad and all requests since the window began; bad ones may be parts, each from 0 to 1.
        best: what the last look at the same window gave back; `Counts()` at the first one.
        allowed: share of bad ones, between 0 and 1.
    """
    bad, total = counts.bad - best.bad, counts.total - best.total
    if not -_ROUNDING <= bad <= total + _ROUNDING:  # the window began anew
        best, bad, total = Counts(), counts.bad, counts.total
    bad = min(max(bad, 0.0), total)
    worse = clearly_bad_share(allowed)
    ratio = bad * math.log(worse / allowed) + (total - bad) * math.log((1 - worse) / (1 - allowed))
    if ratio <= 0:
        return LateStretch(Counts(), 0.0, counts)
    return LateStretch(Counts(bad, total), max(0.0, log_evidence_above(bad, total, allowed)), best)


def clearly_bad_share(allowed: float) -> float:
    """The share whose likelihood ratio to the allowed one says where the best moment was."""
    return min((1 + allowed) / 2, _CLEARLY_BAD * allowed)


def late_boundary(max_requests: int, alpha: float) -> float:
    """Evidence, in nats, that a stretch must give to condemn; 13.6 for 20,000 requests and 2.5 %.

    It is exceeded within `max_requests` with probability at most alpha while no more are bad than allowed, wherever the
    stretch begins: the evidence is below the sum of those from every beginning, whose mean after n requests is at most
    n (the Shiryaev-Roberts sum; M. Pollak, Annals of Statistics 13 (1985) 206-227), and Doob's inequality bounds its
    maximum.  On average 1/alpha times `max_requests` pass until a false alarm, at least.  The same boundary holds for
    several streams together, such as one for each label, that share `max_requests` among them.
    """
    return math.log(max_requests / alpha)
