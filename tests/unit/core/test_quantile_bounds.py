import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.quantile_bounds import Histogram, quantile_of_histogram

EDGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, math.inf)
samples = st.lists(st.floats(0.001, 5), min_size=1, max_size=400)


def _histogram(values: Sequence[float], edges: Sequence[float] = EDGES) -> Histogram:
    return Histogram(tuple(edges), tuple(np.searchsorted(np.sort(values), edges, side="right").astype(float)))


@given(samples)
def test_quantile_of_histogram__its_edges__hold_the_quantile_of_the_samples(values: list[float]) -> None:
    quantile = sorted(values)[math.ceil(0.95 * len(values)) - 1]
    bound = quantile_of_histogram(_histogram(values), 0.95, 0.05)
    assert bound is not None
    assert bound.low <= quantile <= bound.high
    assert bound.low <= bound.value <= bound.high


def test_quantile_of_histogram__p95__takes_88_observations_to_be_bounded() -> None:
    few, enough = (quantile_of_histogram(_histogram([0.1] * count), 0.95, 0.05) for count in (87, 88))
    assert few is not None
    assert enough is not None
    assert (few.high, enough.high) == (math.inf, 0.1)


def test_quantile_of_histogram__looked_at_again_and_again__is_wrong_as_rarely_as_promised() -> None:
    truth, wrong = -math.log(0.05), 0
    edges = [*np.linspace(0.5, 8, 31), math.inf]
    for stream in np.random.default_rng(11).exponential(1, (200, 300)):
        bounds = [quantile_of_histogram(_histogram(stream[:n], edges), 0.95, 0.05) for n in range(10, 301, 15)]
        wrong += any(bound is not None and not bound.low <= truth <= bound.high for bound in bounds)
    assert wrong / 200 <= 0.1  # 5 % for each of two bounds


def test_quantile_of_histogram__value__is_interpolated_as_by_prometheus() -> None:
    bound = quantile_of_histogram(Histogram((0.1, 0.5, math.inf), (50.0, 100.0, 100.0)), 0.95, 0.05)
    assert bound is not None
    assert bound.value == pytest.approx(0.1 + 0.4 * 45 / 50)


def test_quantile__nothing_observed__says_nothing() -> None:
    assert quantile_of_histogram(Histogram((math.inf,), (0.0,)), 0.95, 0.05) is None


def test_histogram__a_limit_between_two_edges__is_counted_both_ways() -> None:
    histogram = Histogram((0.35, 0.5, math.inf), (80.0, 90.0, 100.0))
    assert (histogram.surely_above(0.4), histogram.possibly_above(0.4)) == (10, 20)
    assert (histogram.surely_above(0.5), histogram.possibly_above(0.5)) == (10, 10)
    assert (histogram.surely_above(0.1), histogram.possibly_above(0.1)) == (20, 100)


@pytest.mark.parametrize(
    "buckets",
    [{}, {0.5: 1.0}, {0.5: 2.0, math.inf: 1.0}, {0.5: math.nan, math.inf: 1.0}, {0.5: -1.0, math.inf: 1.0}],
    ids=str,
)
def test_histogram__buckets_that_cannot_be__are_refused(buckets: dict[float, float]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Histogram.of(buckets)
