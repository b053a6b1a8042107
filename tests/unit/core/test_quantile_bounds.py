import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.quantile_bounds import Histogram, quantile_of_histogram, quantile_of_samples

EDGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, math.inf)
samples = st.lists(st.floats(0.001, 5), min_size=1, max_size=400)


def _histogram(values: list[float]) -> Histogram:
    return Histogram(EDGES, tuple(float(sum(value <= edge for value in values)) for edge in EDGES))


@given(samples)
def test_quantile_of_histogram__its_edges__hold_those_of_the_samples(values: list[float]) -> None:
    """Buckets know less than samples, and so must claim less."""
    exact, coarse = quantile_of_samples(values, 0.95, 0.05), quantile_of_histogram(_histogram(values), 0.95, 0.05)
    assert exact is not None
    assert coarse is not None
    assert coarse.low <= exact.low <= exact.value <= exact.high
    assert exact.high <= coarse.high or exact.high == math.inf
    assert coarse.low <= coarse.value <= coarse.high


def test_quantile_of_samples__p95__takes_88_samples_to_be_bounded() -> None:
    few, enough = quantile_of_samples([0.1] * 87, 0.95, 0.05), quantile_of_samples([0.1] * 88, 0.95, 0.05)
    assert few is not None
    assert enough is not None
    assert (few.high, enough.high) == (math.inf, 0.1)


def test_quantile_of_samples__looked_at_again_and_again__is_wrong_as_rarely_as_promised() -> None:
    truth, wrong = -math.log(0.05), 0
    for stream in np.random.default_rng(11).exponential(1, (200, 300)):
        bounds = [quantile_of_samples(stream[:n].tolist(), 0.95, 0.05) for n in range(10, 301, 15)]
        wrong += any(bound is not None and not bound.low <= truth <= bound.high for bound in bounds)
    assert wrong / 200 <= 0.1  # 5 % for each of two bounds


def test_quantile_of_histogram__value__is_interpolated_as_by_prometheus() -> None:
    bound = quantile_of_histogram(Histogram((0.1, 0.5, math.inf), (50.0, 100.0, 100.0)), 0.95, 0.05)
    assert bound is not None
    assert bound.value == pytest.approx(0.1 + 0.4 * 45 / 50)


def test_quantile__nothing_observed__says_nothing() -> None:
    assert quantile_of_samples([], 0.95, 0.05) is None
    assert quantile_of_histogram(Histogram((math.inf,), (0.0,)), 0.95, 0.05) is None


def test_histogram__a_limit_between_two_edges__is_counted_both_ways() -> None:
    histogram = Histogram((0.35, 0.5, math.inf), (80.0, 90.0, 100.0))
    assert (histogram.surely_above(0.4), histogram.possibly_above(0.4)) == (10, 20)
    assert (histogram.surely_above(0.5), histogram.possibly_above(0.5)) == (10, 10)
    assert (histogram.surely_above(0.1), histogram.possibly_above(0.1)) == (20, 100)


def test_quantile_of_samples__a_nan__is_refused() -> None:
    with pytest.raises(ValueError, match="no number"):
        quantile_of_samples([0.1, math.nan], 0.95, 0.05)


@pytest.mark.parametrize(
    "buckets",
    [{}, {0.5: 1.0}, {0.5: 2.0, math.inf: 1.0}, {0.5: math.nan, math.inf: 1.0}, {0.5: -1.0, math.inf: 1.0}],
    ids=str,
)
def test_histogram__buckets_that_cannot_be__are_refused(buckets: dict[float, float]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Histogram.of(buckets)
