"""Intervals and paired tests that stay right on a few hundred images, in NumPy alone.

Nothing here knows of images or models: counts and arrays go in, an `Interval` or a probability comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_BISECTIONS = 60  # halvings of an interval of length 2: past the resolution of a double


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence limits, `low <= value <= high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Uncertainty:
    """How intervals are made: two-sided confidence, and the resamples of those that have no formula."""

    confidence: float
    samples: int
    seed: int


def normal_quantile(confidence: float) -> float:
    """The half-width, in standard deviations, of a two-sided interval: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(successes: int, trials: int, confidence: float) -> Interval | None:
    """Wilson's score interval of a share; `None` without trials.

    Source: E. B. Wilson, JASA 22 (1927) 209-212; recommended for small samples by Brown, Cai and DasGupta,
    Statistical Science 16 (2001) 101-133.  It never collapses, not even when every trial succeeded.
    """
    if trials == 0:
        return None
    z2 = normal_quantile(confidence) ** 2
    share = successes / trials
    centre = (successes + z2 / 2) / (trials + z2)
    half = math.sqrt(z2 * (share * (1 - share) * trials + z2 / 4)) / (trials + z2)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(share, low, high)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p of "neither is better", from the pairs that only one of two classifiers got right.

    Under the null hypothesis `gained` is binomial with `gained + lost` trials and probability one half; p is twice
    the smaller tail, at most 1, and 1 where no pair differs.  Source: Q. McNemar, Psychometrika 12 (1947) 153-157.
    """
    discordant = gained + lost
    term = tail = 1
    for successes in range(min(gained, lost)):
        term = term * (discordant - successes) // (successes + 1)
        tail += term
    p: float = 2 * tail / 2**discordant
    return min(1.0, p)


def paired_difference_interval(gained: int, lost: int, pairs: int, confidence: float) -> Interval:
    """Tango's score interval of the difference of two shares measured on the same images.

    The difference is `(gained - lost) / pairs`, where `gained` counts the images that only the new model got right
    and `lost` those that only the old one did.  The interval holds every difference that the score test does not
    reject, with the nuisance share estimated under that difference, so it is right with few discordant pairs, and
    with none it is `z2 / (pairs + z2)` to both sides.  Source: T. Tango, Statistics in Medicine 17 (1998) 891-908.

    Raises:
        ValueError: there are no pairs, or fewer pairs than discordant ones.
    """
    if pairs < 1 or gained < 0 or lost < 0 or gained + lost > pairs:
        raise ValueError(f"{gained} gained and {lost} lost of {pairs} pairs")
    z = normal_quantile(confidence)
    estimate = (gained - lost) / pairs

    def limit(outer: float, sign: float) -> float:
        inner = estimate  # the score is 0 here and grows in size towards `outer`
        for _ in range(_BISECTIONS):
            middle = (inner + outer) / 2
            if sign * _tango_score(gained, lost, pairs, middle) < z:
                inner = middle
            else:
                outer = middle
        return (inner + outer) / 2

    return Interval(estimate, limit(-1.0, 1.0), limit(1.0, -1.0))


def _tango_score(gained: int, lost: int, pairs: int, difference: float) -> float:
    """Standardised distance of the observed difference from a supposed one (Tango 1998, equations 4 to 6)."""
    linear = (2 * pairs - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    share_lost = (math.sqrt(max(linear**2 - 8 * pairs * constant, 0.0)) - linear) / (4 * pairs)
    variance = pairs * (2 * share_lost + difference * (1 - difference))
    distance = gained - lost - pairs * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def pairs_to_show_non_inferiority(margin: float, discordance: float, confidence: float, power: float = 0.8) -> int:
    """Images needed so that a model exactly as good as the old one is shown to be so with this power.

    Args:
        margin: the drop that would not matter, above 0.
        discordance: share of images that only one of the two gets right.
        confidence: of the lower limit that is judged (one-sided).
        power: chance that an equally good model passes.

    The normal approximation `(z_confidence + z_power)^2 * discordance / margin^2`, but never fewer than what full
    agreement needs.  Source: Liu, Hsueh, Hsieh and Chen, Statistics in Medicine 21 (2002) 231-245.
    """
    z = NormalDist().inv_cdf(confidence)
    full_agreement = z**2 * (1 / margin - 1)
    normal = (z + NormalDist().inv_cdf(power)) ** 2 * discordance / margin**2
    return math.floor(max(full_agreement, normal)) + 1


def bootstrap_interval(statistic: Callable[[IntArray], float], size: int, how: Uncertainty) -> Interval:
    """Percentile bootstrap of any statistic of `size` images.

    Args:
        statistic: takes the int64 `(size,)` indices of a resample (with repeats) and gives a number.
        size: number of images, at least 1.
        how: confidence, number of resamples, and their seed.

    The limits are widened to hold the estimate itself.  Source: Efron and Tibshirani, An Introduction to the Bootstrap
    (1993), 13.3.
    """
    value = statistic(np.arange(size, dtype=np.int64))
    random = np.random.default_rng(how.seed)
    draws = np.array([statistic(random.integers(0, size, size)) for _ in range(how.samples)])
    return quantile_interval(value, draws, how.confidence)


def quantile_interval(value: float, draws: FloatArray, confidence: float) -> Interval:
    """An estimate between the quantiles of its draws, widened to hold the estimate itself."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))
