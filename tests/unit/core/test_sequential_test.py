import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.sequential_test import NEED_MORE_DATA, PROMOTE, ROLL_BACK, ErrorRateTest

TEST = ErrorRateTest.around(0.001)
ORDER = {ROLL_BACK: 0, NEED_MORE_DATA: 1, PROMOTE: 2}

counts = st.integers(0, 50_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
tests = st.builds(
    ErrorRateTest,
    st.floats(1e-3, 0.02),
    st.floats(0.06, 0.5),
    st.sampled_from([0.01, 0.05, 0.2]),
    st.sampled_from([0.01, 0.05, 0.2]),
)


def _ratios(error_rate: float, streams: int, requests: int, batch: int = 1, seed: int = 7) -> np.ndarray:
    """float64 `(streams, requests / batch)`: the log likelihood ratio at each look, of simulated streams."""
    errors = np.random.default_rng(seed).binomial(batch, error_rate, (streams, requests // batch)).cumsum(axis=1)
    sent = batch * np.arange(1, requests // batch + 1)
    return errors * TEST.per_error + (sent - errors) * TEST.per_success


def test_around__a_limit_of_a_tenth_of_a_percent__is_the_documented_pair() -> None:
    assert pytest.approx(0.0002) == TEST.acceptable
    assert pytest.approx(0.002) == TEST.unacceptable


@pytest.mark.parametrize(
    ("error_rate", "requests"), [(0.0002, 2123), (0.002, 1257), (0.01, 200.1), (0.05, 40), (0.2, 10)]
)
def test_course__expected_requests__are_those_of_the_decision_record(error_rate: float, requests: float) -> None:
    assert TEST.course(error_rate).expected_requests == pytest.approx(requests, rel=1e-3)


@pytest.mark.parametrize("error_rate", [0.0002, 0.001, 0.01])
def test_course__beside_simulated_streams__agrees(error_rate: float) -> None:
    ratios = _ratios(error_rate, streams=400, requests=15_000)
    promotes, rolls_back = ratios <= TEST.promote_at, ratios >= TEST.roll_back_at
    first = (promotes | rolls_back).argmax(axis=1)
    promoted = promotes[np.arange(len(first)), first]
    course = TEST.course(error_rate)
    tolerance = 4 * math.sqrt(0.25 / 400)
    assert promoted.mean() == pytest.approx(course.promoted, abs=tolerance)
    assert (first + 1).mean() == pytest.approx(course.expected_requests, rel=0.2)
    assert (first < course.likely_requests).mean() == pytest.approx(0.9, abs=tolerance)


def test_course__every_error_rate__ends_somewhere() -> None:
    for error_rate in (0.0, 1e-5, 0.0007, 0.3, 1.0):
        course = TEST.course(error_rate)
        assert course.promoted + course.rolled_back + course.undecided == pytest.approx(1, abs=1e-6)
        assert course.expected_requests <= TEST.max_requests


@given(tests)
@settings(max_examples=20, deadline=None)
def test_course__at_the_two_rates__keeps_alpha_and_beta(test: ErrorRateTest) -> None:
    assert test.course(test.acceptable).rolled_back <= test.alpha
    assert test.course(test.unacceptable).promoted <= test.beta


def test_course__wald_s_own_boundaries__would_break_beta() -> None:
    """Why the boundaries are not those of the textbook, log(beta / (1 - alpha)): they promote 5.1 % of bad canaries."""
    narrower = ErrorRateTest(0.0002, 0.002, alpha=0.05 / 0.95, beta=0.05 / 0.95)
    assert narrower.course(0.002).promoted > 0.05


@pytest.mark.parametrize("batch", [5, 40])
def test_boundaries__of_streams_watched_beyond_the_verdict__are_still_crossed_as_rarely(batch: int) -> None:
    """An engine that waits for other gates looks on after the first crossing; alpha and beta must hold throughout."""
    acceptable = _ratios(0.0002, 1_000, 20_000, batch)
    unacceptable = _ratios(0.002, 1_000, 20_000, batch, seed=8)
    tolerance = 3 * math.sqrt(0.05 * 0.95 / 1_000)
    assert (acceptable.max(axis=1) >= TEST.roll_back_at).mean() <= TEST.alpha + tolerance
    assert (unacceptable.min(axis=1) <= TEST.promote_at).mean() <= TEST.beta + tolerance


def test_late_roll_back__healthy_streams__is_rarely_reached() -> None:
    ratios = _ratios(0.0002, 500, 20_000, batch=4)
    rise = (ratios - np.minimum.accumulate(np.minimum(ratios, 0), axis=1)).max(axis=1)
    assert (rise >= TEST.late_roll_back_at).mean() <= TEST.alpha


@given(counts)
def test_verdict__one_more_error__never_moves_towards_promotion(count: tuple[int, int]) -> None:
    requests, errors = count
    before = TEST.verdict(requests, errors)
    assert ORDER[TEST.verdict(requests + 1, errors + 1)] <= ORDER[before]
    if errors < requests:
        assert ORDER[TEST.verdict(requests, errors + 1)] <= ORDER[before]
        assert ORDER[TEST.verdict(requests + 1, errors)] >= ORDER[before]


@given(st.lists(st.booleans(), max_size=300), st.randoms())
def test_log_likelihood_ratio__requests_in_another_order__is_the_same(failed: list[bool], random: object) -> None:
    def add_up(outcomes: list[bool]) -> float:
        return sum(TEST.per_error if outcome else TEST.per_success for outcome in outcomes)

    shuffled = list(failed)
    random.shuffle(shuffled)
    assert TEST.log_likelihood_ratio(len(failed), sum(failed)) == pytest.approx(add_up(shuffled), abs=1e-9)


def test_verdict__no_requests__needs_more_data() -> None:
    assert TEST.verdict(0, 0) == NEED_MORE_DATA
    assert TEST.evidence(0, 0) == (0.0, 0.0)


def test_verdict__without_errors__promotes_at_the_shortest_promotion_and_not_before() -> None:
    assert TEST.shortest_promotion == 1663
    assert TEST.verdict(1662, 0) == NEED_MORE_DATA
    assert TEST.verdict(1663, 0) == PROMOTE


@pytest.mark.parametrize(("requests", "errors"), [(math.nan, 0), (10, math.nan), (10, -1), (10, 11), (math.inf, 1)])
def test_verdict__counts_that_are_none__are_refused(requests: float, errors: float) -> None:
    with pytest.raises(ValueError, match="errors of"):
        TEST.verdict(requests, errors)


def test_exhausted__no_verdict_after_the_last_request__is_no_promotion() -> None:
    undecided = 15
    assert TEST.verdict(20_000, undecided) == NEED_MORE_DATA
    assert TEST.exhausted(20_000, undecided)
    assert not TEST.exhausted(19_999, undecided)
    assert not TEST.exhausted(20_000, 0)


@given(counts)
def test_evidence__any_counts__is_whole_exactly_at_a_verdict(count: tuple[int, int]) -> None:
    to_promote, to_roll_back = TEST.evidence(*count)
    assert (to_promote == 1) == (TEST.verdict(*count) == PROMOTE)
    assert (to_roll_back == 1) == (TEST.verdict(*count) == ROLL_BACK)
    assert min(to_promote, to_roll_back) == 0


@pytest.mark.parametrize(
    ("error_rate", "requests"), [(0.0, 1663), (0.0002, 2123), (0.01, 200), (0.05, 40), (0.2, 10), (1.0, 2)]
)
def test_requests_left__from_the_start__is_near_the_exact_mean(error_rate: float, requests: float) -> None:
    assert TEST.requests_left(0, 0, error_rate) == pytest.approx(requests, rel=0.1)


@given(counts, st.floats(0, 1))
def test_requests_left__any_state__stays_within_what_is_left(count: tuple[int, int], error_rate: float) -> None:
    left = TEST.requests_left(*count, error_rate)
    decided = TEST.verdict(*count) != NEED_MORE_DATA
    assert 0 <= left <= max(0, TEST.max_requests - count[0])
    assert not decided or left == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"acceptable": 0.0},
        {"acceptable": 0.01, "unacceptable": 0.01},
        {"unacceptable": 1.0},
        {"alpha": 0.5},
        {"beta": 0.0},
        {"max_requests": 1662},
    ],
    ids=str,
)
def test_error_rate_test__impossible_arguments__are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ErrorRateTest(**{"acceptable": 0.0002, "unacceptable": 0.002, **wrong})
