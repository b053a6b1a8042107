"""Distribution-free bounds on a quantile, e.g. the p95 of latency, from a Prometheus histogram.

Nothing is assumed of the distribution: "p95 is at most x" says that at least 95 % of all requests take at most x, and
how many of the observed ones do is a count.  The bounds hold at every look at once (`pipelines.core.share_bounds`).

Source: S. R. Howard and A. Ramdas, Sequential estimation of quantiles, Bernoulli 28 (2022) 1704-1728.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipelines.core.share_bounds import log_evidence_above, log_evidence_below
from pipelines.core.statistics import Interval


@dataclass(frozen=True)
class Histogram:
    """A cumulative histogram, as Prometheus has it.

    Attributes:
        boundaries: upper edges of the buckets, ascending, the last one infinite; the unit of what was measured.
        counts: how many observations were at most each edge; may be fractions, as `increase()` gives them.

    Raises:
        ValueError: the edges do not ascend to infinity, or a count is negative, not finite or below the one before.
    """

    boundaries: tuple[float, ...]
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.boundaries or len(self.boundaries) != len(self.counts):
            raise ValueError(f"{len(self.boundaries)} boundaries and {len(self.counts)} counts")
        if self.boundaries[-1] != math.inf or not all(low < high for low, high in pairwise(self.boundaries)):
            raise ValueError("the boundaries do not ascend to infinity")
        if not all(math.isfinite(count) for count in self.counts) or self.counts[0] < 0:
            raise ValueError("a count is negative or no number")
        if not all(low <= high for low, high in pairwise(self.counts)):
            raise ValueError("the cumulative counts do not ascend")

    @classmethod
    def of(cls, buckets: Mapping[float, float]) -> Histogram:
        """From `{upper edge: cumulative count}`, in any order."""
        edges = sorted(buckets)
        return cls(tuple(edges), tuple(buckets[edge] for edge in edges))

    @property
    def total(self) -> float:
        """Number of observations."""
        return self.counts[-1]

    def surely_above(self, limit: float) -> float:
        """Observations known to be above the limit: those beyond the first edge that is not below it."""
        edge = next(place for place, boundary in enumerate(self.boundaries) if boundary >= limit)
        return self.total - self.counts[edge]

    def possibly_above(self, limit: float) -> float:
        """Observations not known to be at most the limit; as many as `surely_above` where the limit is an edge."""
        known = [count for boundary, count in zip(self.boundaries, self.counts, strict=True) if boundary <= limit]
        return self.total - (known[-1] if known else 0.0)


def quantile_of_histogram(histogram: Histogram, quantile: float, alpha: float) -> Interval | None:
    """A quantile between the edges that it provably lies between; `None` without observations.

    Args:
        histogram: the observations.
        quantile: e.g. 0.95.
        alpha: largest probability, for each edge, ever to be on the wrong side.

    Returns:
        `low` is the last edge that the quantile is shown to be above (0 if none), `high` the first that it is shown to
        be at most (infinite if none).  `value` is interpolated within its bucket, as by `histogram_quantile`; in the
        last bucket it is the last finite edge.  Only `low` and `high` are fit to decide on.
    """
    total = histogram.total
    if total == 0:
        return None
    needed = -math.log(alpha)
    edges = list(zip(histogram.boundaries[:-1], histogram.counts[:-1], strict=True))
    low = max((edge for edge, count in edges if log_evidence_below(count, total, quantile) >= needed), default=0.0)
    high = min(
        (edge for edge, count in edges if log_evidence_above(count, total, quantile) >= needed), default=math.inf
    )
    value = _interpolated(edges, total, quantile)
    return Interval(value, min(low, value), max(high, value))


def _interpolated(edges: Sequence[tuple[float, float]], total: float, quantile: float) -> float:
    rank = quantile * total
    below, fewer = 0.0, 0.0
    for edge, count in edges:
        if count >= rank and count > fewer:
            return below + (edge - below) * (rank - fewer) / (count - fewer)
        below, fewer = edge, count
    return below
