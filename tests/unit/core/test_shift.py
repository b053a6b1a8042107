"""Shift measures: known values, and what must hold for any sample."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.shift import jensen_shannon_distance, population_stability_index

samples = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200)
tables = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 1000), min_size=1).filter(lambda t: sum(t.values()))


def test_population_stability_index__two_values__matches_the_formula_by_hand() -> None:
    # With half a count more per bin and one empty bin: p = (50.5, 50.5, 0.5) / 101.5, q = (75.5, 25.5, 0.5) / 101.5.
    p, q = np.array([50.5, 50.5, 0.5]) / 101.5, np.array([75.5, 25.5, 0.5]) / 101.5
    expected = float(((q - p) * np.log(q / p)).sum())
    assert population_stability_index([0] * 50 + [1] * 50, [0] * 75 + [1] * 25) == pytest.approx(expected)


def test_population_stability_index__same_distribution__is_about_its_expected_noise() -> None:
    generator = np.random.default_rng(1)
    values = [population_stability_index(generator.normal(size=1000), generator.normal(size=500)) for _ in range(200)]
    assert np.mean(values) == pytest.approx(9 * (1 / 1000 + 1 / 500), rel=0.2)


def test_population_stability_index__shift_by_one_deviation__is_large() -> None:
    generator = np.random.default_rng(1)
    assert population_stability_index(generator.normal(size=1000), generator.normal(1, size=1000)) > 0.25


def test_population_stability_index__constant_reference__sees_another_value() -> None:
    assert population_stability_index([8] * 100, [8] * 100) == 0
    assert population_stability_index([8] * 100, [8] * 50 + [9] * 50) > 0.25
    assert population_stability_index([8] * 100, [8] * 50 + [7] * 50) > 0.25


@given(samples, samples)
def test_population_stability_index__any_samples__is_finite_and_not_negative(
    old: list[float], new: list[float]
) -> None:
    value = population_stability_index(old, new)
    assert math.isfinite(value)
    assert value >= 0


@given(samples)
def test_population_stability_index__sample_against_itself__is_zero(sample: list[float]) -> None:
    assert population_stability_index(sample, sample) == 0


def test_population_stability_index__empty_sample__is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        population_stability_index([], [1.0])


def test_jensen_shannon_distance__half_against_one_side__matches_the_formula_by_hand() -> None:
    # p = (1/2, 1/2), q = (1, 0), m = (3/4, 1/4): JSD = 1.5 - 0.75 log2 3 + ... = 0.3112781 bits.
    assert jensen_shannon_distance({"a": 5, "b": 5}, {"a": 9}) == pytest.approx(math.sqrt(0.31127812445913283))


@given(tables, tables, tables)
def test_jensen_shannon_distance__any_tables__is_a_bounded_metric(
    a: dict[str, int], b: dict[str, int], c: dict[str, int]
) -> None:
    distance = jensen_shannon_distance
    assert 0 <= distance(a, b) <= 1
    assert distance(a, a) == pytest.approx(0, abs=1e-7)
    assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-7)
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-7


def test_jensen_shannon_distance__nothing_in_common__is_one() -> None:
    assert jensen_shannon_distance({"a": 3}, {"b": 1}) == pytest.approx(1)


def test_jensen_shannon_distance__nothing_counted__is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one count"):
        jensen_shannon_distance({"a": 0}, {"a": 1})
