"""How far one sample has moved from another: the population stability index and the Jensen-Shannon distance.

Both are effect sizes: unlike a p-value, they do not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


def population_stability_index(reference: ArrayLike, current: ArrayLike, *, bins: int = 10) -> float:
    """Return the PSI of `current` against `reference`: the sum over bins of (q - p) ln(q / p).

    The bins are the reference's quantiles; a reference with at most `bins` distinct values is compared value by value,
    with one more bin for all others.  Half an image is added to each bin, which keeps an empty one finite.  By custom
    below 0.1 is no shift, above 0.25 a large one (Siddiqi, Credit Risk Scorecards, 2006).  Two samples of one
    distribution, of n and m images, give about (bins - 1) (1/n + 1/m) (Yurdakul and Naranjo, J. Risk Model
    Validation 14(4), 2020).

    Args:
        reference: `(n,)` numbers, without NaN.
        current: `(m,)` numbers, without NaN.
        bins: how many quantiles to compare.

    Returns:
        At least 0; 0 for equal shares.

    Raises:
        ValueError: either sample is empty.
    """
    old, new = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    if old.size == 0 or new.size == 0:
        raise ValueError("the population stability index needs at least one value on both sides")
    values = np.unique(old)
    if values.size <= bins:
        old_bins, new_bins, count = np.searchsorted(values, old), _position(values, new), values.size + 1
    else:
        edges = np.unique(np.quantile(old, np.linspace(0, 1, bins + 1)[1:-1]))
        old_bins, new_bins = np.searchsorted(edges, old, side="right"), np.searchsorted(edges, new, side="right")
        count = edges.size + 1
    p, q = _smoothed_shares(old_bins, count), _smoothed_shares(new_bins, count)
    return float(np.sum((q - p) * np.log(q / p)))


def jensen_shannon_distance(reference: Mapping[Hashable, int], current: Mapping[Hashable, int]) -> float:
    """Return the distance between two tables of counts, e.g. images per class.

    It is the square root of the Jensen-Shannon divergence in bits (Lin, IEEE Trans. Inf. Theory 37(1), 1991), which is
    a metric (Endres and Schindelin, ibid. 49(7), 2003).

    Args:
        reference: category to count; a category that is missing counts 0.
        current: likewise.

    Returns:
        0 for equal shares to 1 for tables without a common category.

    Raises:
        ValueError: either table counts nothing.
    """
    categories = list(dict.fromkeys([*reference, *current]))
    p = np.array([reference.get(category, 0) for category in categories], dtype=np.float64)
    q = np.array([current.get(category, 0) for category in categories], dtype=np.float64)
    if p.sum() <= 0 or q.sum() <= 0:
        raise ValueError("the Jensen-Shannon distance needs at least one count on both sides")
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return float(np.sqrt(min(max(divergence, 0.0), 1.0)))


def _position(values: NDArray[np.float64], sample: NDArray[np.float64]) -> NDArray[np.intp]:
    """Index of each number in sorted `values`, and `len(values)` for those that are not among them."""
    position = np.minimum(np.searchsorted(values, sample), values.size - 1)
    return np.where(values[position] == sample, position, values.size)


def _smoothed_shares(positions: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    counts = np.bincount(positions, minlength=count) + 0.5
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def _relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """In bits; where p is 0 the term is 0."""
    present = p > 0
    return float(np.sum(p[present] * np.log2(p[present] / q[present])))
