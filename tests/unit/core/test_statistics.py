import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binomtest

from pipelines.core.statistics import (
    Uncertainty,
    bootstrap_interval,
    mcnemar_exact,
    normal_quantile,
    paired_difference_interval,
    pairs_to_show_non_inferiority,
    wilson_interval,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pairs = st.integers(1, 300).flatmap(
    lambda n: st.integers(0, n).flatmap(
        lambda gained: st.tuples(st.just(gained), st.integers(0, n - gained), st.just(n))
    )
)


def test_normal_quantile__95_percent__is_1_96() -> None:
    assert normal_quantile(0.95) == pytest.approx(1.959964, abs=1e-6)


@given(counts, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_interval__any_counts__equals_scipy(count: tuple[int, int], confidence: float) -> None:
    successes, trials = count
    interval = wilson_interval(successes, trials, confidence)
    expected = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert interval is not None
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_wilson_interval__no_trials__is_none() -> None:
    assert wilson_interval(0, 0, 0.95) is None


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_exact__any_counts__equals_the_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("gained", "lost", "total"), [(0, 1, 44), (3, 9, 135), (0, 12, 20), (40, 31, 600)])
def test_paired_difference_interval__limits__are_where_the_score_test_just_rejects(
    gained: int, lost: int, total: int
) -> None:
    def score(difference: float) -> float:
        """The score statistic, with the nuisance share found by numerical maximum likelihood."""

        def minus_log_likelihood(share_lost: float) -> float:
            cells = np.array([share_lost + difference, share_lost, 1 - 2 * share_lost - difference])
            return -float(xlogy([gained, lost, total - gained - lost], cells).sum())

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        found = minimize_scalar(minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12})
        variance = total * (2 * found.x + difference * (1 - difference))
        return (gained - lost - total * difference) / math.sqrt(variance)

    interval = paired_difference_interval(gained, lost, total, 0.95)
    assert score(interval.low) == pytest.approx(1.96, abs=1e-3)
    assert score(interval.high) == pytest.approx(-1.96, abs=1e-3)


@given(pairs)
def test_paired_difference_interval__models_swapped__is_mirrored(counts: tuple[int, int, int]) -> None:
    gained, lost, total = counts
    forth = paired_difference_interval(gained, lost, total, 0.95)
    back = paired_difference_interval(lost, gained, total, 0.95)
    assert -1 <= forth.low <= forth.value <= forth.high <= 1
    assert forth.low == pytest.approx(-back.high, abs=1e-9)
    assert forth.high == pytest.approx(-back.low, abs=1e-9)


@pytest.mark.parametrize("total", [1, 20, 135, 5000])
def test_paired_difference_interval__no_discordant_pair__has_its_closed_form(total: int) -> None:
    interval = paired_difference_interval(0, 0, total, 0.95)
    expected = 1.959964**2 / (total + 1.959964**2)
    assert interval.value == 0
    assert interval.high == pytest.approx(expected, abs=1e-6)
    assert interval.low == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize(("gained", "lost", "total"), [(0, 0, 0), (3, 3, 5), (-1, 0, 5)])
def test_paired_difference_interval__impossible_counts__are_refused(gained: int, lost: int, total: int) -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_difference_interval(gained, lost, total, 0.95)


@pytest.mark.parametrize(("total", "discordance"), [(60, 0.06), (135, 0.03), (180, 0.12), (624, 0.12)])
@pytest.mark.parametrize("difference", [0.0, -0.02])
def test_paired_difference_interval__simulated_pairs__covers_the_truth(
    total: int, discordance: float, difference: float
) -> None:
    shares = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    draws = np.random.default_rng(1).multinomial(total, shares, 4000)[:, :2]
    tables, times = np.unique(draws, axis=0, return_counts=True)
    intervals = [paired_difference_interval(gained, lost, total, 0.95) for gained, lost in tables.tolist()]
    covered = sum(int(n) for i, n in zip(intervals, times, strict=True) if i.low <= difference <= i.high) / 4000
    assert covered >= 0.935


def test_pairs_to_show_non_inferiority__the_design_example__is_about_930() -> None:
    assert pairs_to_show_non_inferiority(0.02, 0.06, 0.95) == pytest.approx(930, abs=5)


@given(st.floats(0.001, 0.5), st.sampled_from([0.9, 0.95, 0.975]))
def test_pairs_to_show_non_inferiority__full_agreement__is_the_smallest_number_that_proves(
    margin: float, confidence: float
) -> None:
    needed = pairs_to_show_non_inferiority(margin, 0.0, confidence)
    assert paired_difference_interval(0, 0, needed, 2 * confidence - 1).low > -margin
    if needed > 2:
        assert paired_difference_interval(0, 0, needed - 2, 2 * confidence - 1).low <= -margin


def test_bootstrap_interval__mean_of_normals__matches_theory_and_repeats() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)

    def mean(indices: np.ndarray) -> float:
        return float(values[indices].mean())

    interval = bootstrap_interval(mean, 400, Uncertainty(0.95, 2000, seed=1))
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    assert interval == bootstrap_interval(mean, 400, Uncertainty(0.95, 2000, seed=1))
    assert interval != bootstrap_interval(mean, 400, Uncertainty(0.95, 2000, seed=2))
