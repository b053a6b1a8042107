import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta as beta_distribution

from pipelines.core.share_bounds import (
    log_evidence_above,
    log_evidence_below,
    lower_bound,
    share_interval,
    trials_to_show_below,
    upper_bound,
)

counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
shares = st.floats(0.001, 0.999)


@pytest.mark.parametrize(("total", "trials", "share"), [(0, 88, 0.05), (7, 40, 0.1), (2.5, 9.5, 0.4), (30, 30, 0.9)])
def test_log_evidence_above__closed_form__is_the_average_likelihood_ratio(
    total: float, trials: float, share: float
) -> None:
    def ratio(theta: float) -> float:
        return (theta / share) ** total * ((1 - theta) / (1 - share)) ** (trials - total)

    average = quad(ratio, share, 1, epsabs=0, epsrel=1e-10)[0] / (1 - share)
    assert log_evidence_above(total, trials, share) == pytest.approx(math.log(average), abs=1e-7)


@given(counts, shares)
def test_log_evidence__both_sides__mirror_each_other(count: tuple[int, int], share: float) -> None:
    total, trials = count
    assert log_evidence_below(total, trials, share) == log_evidence_above(trials - total, trials, 1 - share)


@given(counts, shares)
@example((25, 2424), 0.2969202555214756)
def test_log_evidence_above__one_more_failure__never_shrinks(count: tuple[int, int], share: float) -> None:
    total, trials = count
    before, after = log_evidence_above(total, trials, share), log_evidence_above(total + 1, trials + 1, share)
    assert after >= before - 1e-9 or before < -5  # far below 0 it decides nothing, and a double is too coarse


@given(counts, st.sampled_from([0.01, 0.05, 0.2]))
def test_share_interval__any_counts__is_where_the_evidence_reaches_alpha(count: tuple[int, int], alpha: float) -> None:
    interval = share_interval(*count, alpha)
    assert interval is not None
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    if interval.high < 1:
        assert log_evidence_below(*count, interval.high) == pytest.approx(-math.log(alpha), abs=1e-3)
    if interval.low > 0:
        assert log_evidence_above(*count, interval.low) == pytest.approx(-math.log(alpha), abs=1e-3)


@given(counts)
def test_share_interval__at_one_look__is_wider_than_clopper_and_pearson_s(count: tuple[int, int]) -> None:
    """The price of looking at any time; a bound that is tighter than the exact one would be wrong."""
    total, trials = count
    exact_high = beta_distribution.ppf(0.95, total + 1, trials - total) if total < trials else 1.0
    assert upper_bound(total, trials, 0.05) >= exact_high - 1e-9
    assert (
        lower_bound(total, trials, 0.05)
        <= 1 - (beta_distribution.ppf(0.95, trials - total + 1, total) if total else 1.0) + 1e-9
    )


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_bounds__looked_at_after_every_request__are_wrong_as_rarely_as_promised(share: float) -> None:
    """And Clopper and Pearson's are wrong far more often, which is why they are not used."""
    streams, length = 400, 1_000
    totals = (np.random.default_rng(3).random((streams, length)) < share).cumsum(axis=1)
    refuted = np.array(
        [max(log_evidence_above(totals[i, n - 1], n, share) for n in range(1, length + 1, 7)) for i in range(streams)]
    )
    sent = np.arange(1, length + 1)
    naive = beta_distribution.ppf(0.05, np.maximum(totals, 1e-9), sent - totals + 1).max(axis=1)
    assert (refuted >= math.log(20)).mean() <= 0.05
    assert (naive > share).mean() > 0.15


def test_bounds__fractions_instead_of_failures__are_wrong_as_rarely() -> None:
    values = np.random.default_rng(5).beta(0.3, 1.2, (300, 600))
    mean = 0.3 / 1.5
    totals = values.cumsum(axis=1)
    refuted = [max(log_evidence_above(totals[i, n - 1], n, mean) for n in range(1, 601, 7)) for i in range(300)]
    assert (np.array(refuted) >= math.log(20)).mean() <= 0.05


def test_share_interval__nothing_seen__says_nothing() -> None:
    assert share_interval(0, 0, 0.05) is None
    assert (lower_bound(0, 0, 0.05), upper_bound(0, 0, 0.05)) == (0.0, 1.0)


@pytest.mark.parametrize(("total", "trials", "share"), [(math.nan, 1, 0.5), (1, math.nan, 0.5), (2, 1, 0.5), (0, 1, 1)])
def test_log_evidence_above__numbers_that_cannot_be__are_refused(total: float, trials: float, share: float) -> None:
    with pytest.raises(ValueError, match=r".+"):
        log_evidence_above(total, trials, share)


def test_trials_to_show_below__for_p95__are_88() -> None:
    assert trials_to_show_below(0.05, 0.05) == 88


@given(st.sampled_from([0.05, 0.1]), st.floats(0, 0.03), st.floats(0, 2))
def test_trials_to_show_below__as_many_as_it_says__show_it(limit: float, share: float, spread: float) -> None:
    trials = trials_to_show_below(limit, 0.05, share, spread=spread)
    assert trials is not None
    total = trials * share + spread * math.sqrt(trials * share * (1 - share))
    assert upper_bound(total, trials, 0.05) <= limit + 1e-9


def test_trials_to_show_below__a_share_at_the_limit__is_never_shown() -> None:
    assert trials_to_show_below(0.05, 0.05, 0.05) is None
