import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.canary_observations import CanaryLimits, Counts
from pipelines.core.late_change import LateStretch, clearly_bad_share, late_boundary, late_stretch
from pipelines.core.operating_characteristic import Late, of_agreement
from pipelines.core.share_bounds import log_evidence_above

ALLOWED = 0.1
looks = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), min_size=1, max_size=30)


def _follow(seen: list[tuple[int, float]], allowed: float = ALLOWED) -> list[tuple[Counts, LateStretch]]:
    """What each of several looks finds, of which each adds so many requests with such a share of bad ones."""
    found, counts, best = [], Counts(), Counts()
    for total, share in seen:
        counts = Counts(counts.bad + total * share, counts.total + total)
        late = late_stretch(counts, best, allowed)
        best = late.best
        found.append((counts, late))
    return found


@given(looks, st.sampled_from([0.03, 0.1, 0.5]))
@settings(deadline=None)
def test_late_stretch__any_course__is_the_end_of_it_that_speaks_most_against_the_canary(
    seen: list[tuple[int, float]], allowed: float
) -> None:
    worse, gain = clearly_bad_share(allowed), []
    for counts, late in _follow(seen, allowed):
        assert late.log_evidence >= 0
        good = counts.total - counts.bad
        gain.append(counts.bad * math.log(worse / allowed) + good * math.log((1 - worse) / (1 - allowed)))
        lowest = min(0.0, *gain)
        assert late.counts.bad + late.best.bad == pytest.approx(counts.bad)
        assert late.counts.total + late.best.total == pytest.approx(counts.total)
        bad, well = late.counts.bad, late.counts.total - late.counts.bad
        rise = bad * math.log(worse / allowed) + well * math.log((1 - worse) / (1 - allowed))
        assert rise == pytest.approx(gain[-1] - lowest, abs=1e-6)


@given(looks, st.floats(0, 1))
@settings(deadline=None)
def test_late_stretch__one_more_bad_request__never_speaks_less_against_the_canary(
    seen: list[tuple[int, float]], share: float
) -> None:
    counts, late = _follow(seen)[-1]
    well = late_stretch(Counts(counts.bad + share, counts.total + 1), late.best, ALLOWED)
    worse = late_stretch(Counts(counts.bad + 1, counts.total + 1), late.best, ALLOWED)
    assert worse.log_evidence >= well.log_evidence - 1e-9


def test_late_stretch__looked_at_again_without_a_new_request__says_the_same() -> None:
    first = late_stretch(Counts(8, 12), Counts(), ALLOWED)
    assert first.log_evidence == log_evidence_above(8, 12, ALLOWED) > 5
    assert late_stretch(Counts(8, 12), first.best, ALLOWED) == first


@pytest.mark.parametrize("now", [Counts(2, 40), Counts(60, 100)], ids=["fewer requests", "more bad ones than new ones"])
def test_late_stretch__counts_that_cannot_have_followed__begin_anew(now: Counts) -> None:
    assert late_stretch(now, Counts(5, 60), ALLOWED) == late_stretch(now, Counts(), ALLOWED)


def test_late_stretch__sums_of_parts_in_another_order__are_no_new_window() -> None:
    best = Counts(30.000000000000004, 1_000)
    late = late_stretch(Counts(30.0, 1_000), best, ALLOWED)
    assert (late.log_evidence, late.best.total) == (0.0, 1_000)


LIMITS = CanaryLimits()


def _promoted(late: Late, *, last: int, share: float, streams: int = 100) -> float:
    """How often 6,000 mirrored requests promote of which the last ones have the champion's label less often."""
    rates = [0.03] * (200 - last // 30) + [1 - share] * (last // 30 + 100)
    outcomes = of_agreement(LIMITS, rates, look_requests=30, step_looks=200, streams=streams, seed=1, late=late)
    return outcomes.promoted


@pytest.mark.parametrize(("last", "share"), [(600, 0.6), (600, 0.8), (60, 0.6), (30, 0.2)])
def test_of_agreement__fault_that_begins_late__passes_all_of_shadow_and_not_its_best_moment(
    last: int, share: float
) -> None:
    assert _promoted("nothing", last=last, share=share) > 0.95
    assert _promoted("since the best moment", last=last, share=share) < 0.05


def test_of_agreement__models_at_the_very_limit__are_wrongly_rolled_back_within_alpha() -> None:
    outcomes = of_agreement(LIMITS, [0.1] * 667, look_requests=30, step_looks=668, streams=200, seed=2)
    assert outcomes.promoted == 0
    assert outcomes.rolled_back <= LIMITS.alpha


def test_of_agreement__good_models__are_promoted_as_often_and_as_soon_as_without() -> None:
    for share in (0.97, 0.95, 0.93):
        with_late, without = (
            of_agreement(LIMITS, [1 - share] * 200, look_requests=30, step_looks=10, streams=200, seed=3, late=late)
            for late in ("since the best moment", "nothing")
        )
        assert with_late.promoted >= without.promoted - 0.01
        assert with_late.requests <= 1.02 * without.requests


def test_late_boundary__of_the_defaults__is_the_documented_one() -> None:
    assert late_boundary(20_000, 0.025) == pytest.approx(13.6, abs=0.01)
    assert clearly_bad_share(0.1) == pytest.approx(0.2)
    assert clearly_bad_share(0.5) == 0.75


def test_of_agreement__the_same_streams__end_as_the_gate_itself_says() -> None:
    """The simulation is quick because it does not call the gate; here it is held to it."""
    from pipelines.core.canary_judgement import judge
    from pipelines.core.canary_observations import CanaryWindow, MirrorWindow, SlotWindow
    from pipelines.core.sequential_test import NEED_MORE_DATA, PROMOTE

    rates, step_looks = [0.04] * 25 + [0.35] * 15, 30
    for seed in range(15):
        other = np.random.default_rng(seed).binomial(10, rates, (1, len(rates))).cumsum()
        verdict, sent, turning = NEED_MORE_DATA, 0, {}
        for look, bad in enumerate(other.tolist(), 1):
            sent = 10 * look
            slot = SlotWindow(sent, 0, {0.5: sent, math.inf: sent}, 0, 0.0)
            mirror = MirrorWindow(["a", "b"], {("a", "a"): sent - bad, ("a", "b"): bad}, None)
            limits = LIMITS.model_copy(update={"max_score_difference": None})
            judgement = judge(CanaryWindow(slot, slot, 0.5, mirror, turning), limits, phase="shadow")
            verdict, turning = judgement.gate("agreement").verdict, judgement.turning_points
            if verdict not in (NEED_MORE_DATA, PROMOTE) or (verdict == PROMOTE and look >= step_looks):
                break
        outcomes = of_agreement(LIMITS, rates, look_requests=10, step_looks=step_looks, streams=1, seed=seed)
        assert outcomes.requests == sent, seed
        assert bool(outcomes.promoted) is (verdict == PROMOTE)
