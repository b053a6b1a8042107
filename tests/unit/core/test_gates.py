from functools import cache
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.core.gates import GateCheck, Verdict, at_least, no_clear_drop, non_inferior, not_judged
from pipelines.core.statistics import Interval


def outcomes(gained: int, lost: int, both: int, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What each classifier got right: (new, old)."""
    new = [True] * gained + [False] * lost + [True] * both + [False] * neither
    old = [False] * gained + [True] * lost + [True] * both + [False] * neither
    return np.array(new, bool), np.array(old, bool)


@cache
def passes(gained: int, lost: int, total: int) -> bool:
    return non_inferior(*outcomes(gained, lost, total - gained - lost), 0.05, 0.95).passed


def chance_to_pass(total: int, discordance: float, difference: float) -> float:
    """Probability, over all tables with a noticeable chance, that `non_inferior` passes at a 5 % margin."""
    up, down = (discordance + difference) / 2, (discordance - difference) / 2
    chance = 0.0
    for gained in range(total + 1):
        p_gained = comb(total, gained) * up**gained * (1 - up) ** (total - gained)
        if p_gained < 1e-7:
            continue
        rest, share = total - gained, down / (1 - up)
        for lost in range(rest + 1):
            p_lost = comb(rest, lost) * share**lost * (1 - share) ** (rest - lost)
            if p_lost > 1e-7:
                chance += p_gained * p_lost * passes(gained, lost, total)
    return chance


@pytest.mark.parametrize(
    ("total", "discordance", "equally_good"),
    [(60, 0.06, 0.61), (135, 0.06, 0.69), (180, 0.03, 0.94), (270, 0.06, 0.93)],
)
def test_non_inferior__equally_good_model__passes_as_often_as_documented(
    total: int, discordance: float, equally_good: float
) -> None:
    assert chance_to_pass(total, discordance, 0.0) == pytest.approx(equally_good, abs=0.006)


@pytest.mark.parametrize(("total", "discordance", "limit"), [(60, 0.06, 0.08), (135, 0.06, 0.051), (270, 0.06, 0.051)])
def test_non_inferior__model_worse_by_the_margin__rarely_passes(total: int, discordance: float, limit: float) -> None:
    assert chance_to_pass(total, discordance, -0.05) < limit


def test_non_inferior__no_discordant_pair__passes_and_carries_its_numbers() -> None:
    check = non_inferior(*outcomes(0, 0, 130, 5), margin=0.05, confidence=0.95)
    assert check.passed
    assert check.judged
    assert check.value == 0
    assert check.limit == -0.05
    assert check.low is not None
    assert -0.05 < check.low < 0


def test_non_inferior__clearly_worse__fails_without_asking_for_more_images() -> None:
    check = non_inferior(*outcomes(0, 40, 160), margin=0.05, confidence=0.95)
    assert not check.passed
    assert "too few" not in check.detail


def test_non_inferior__inconclusive_loss__fails_and_says_how_many_images_would_show() -> None:
    check = non_inferior(*outcomes(3, 6, 91), margin=0.05, confidence=0.95)
    assert not check.passed
    assert "too few to prove 5.0%" in check.detail
    assert "about 223 images" in check.detail


def test_non_inferior__too_few_images_but_level__passes_and_says_so() -> None:
    check = non_inferior(*outcomes(1, 1, 28), margin=0.05, confidence=0.95)
    assert check.passed
    assert "none lost on balance" in check.detail
    assert not non_inferior(*outcomes(0, 1, 29), margin=0.05, confidence=0.95).passed


def test_non_inferior__margin_zero__asks_for_no_loss_on_balance() -> None:
    assert non_inferior(*outcomes(2, 2, 100), margin=0.0, confidence=0.95).passed
    assert not non_inferior(*outcomes(1, 2, 100), margin=0.0, confidence=0.95).passed


def test_non_inferior__no_images__is_not_judged() -> None:
    check = non_inferior(np.zeros(0, bool), np.zeros(0, bool), margin=0.05, confidence=0.95)
    assert not check.judged
    assert check.passed


def test_non_inferior__outcomes_that_are_no_pairs__are_refused() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        non_inferior(np.ones(3, bool), np.ones(4, bool), margin=0.05, confidence=0.95)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 200), st.floats(0, 0.2))
def test_non_inferior__one_more_image_right__never_turns_a_pass_into_a_failure(
    gained: int, lost: int, both: int, margin: float
) -> None:
    before = non_inferior(*outcomes(gained, lost + 1, both), margin, 0.95)
    after = non_inferior(*outcomes(gained, lost, both + 1), margin, 0.95)
    assert after.passed >= before.passed


def test_no_clear_drop__equally_good_models_with_ten_small_classes__rarely_blocks() -> None:
    draws = np.random.default_rng(0).multinomial(15, [0.06, 0.06, 0.88], (2000, 10))[..., :2]
    fine = cache(lambda gained, lost: no_clear_drop(*outcomes(gained, lost, 15 - gained - lost), 0.1, 0.95, "").passed)
    blocked = np.mean([not all(fine(gained, lost) for gained, lost in run) for run in draws.tolist()])
    assert blocked < 0.02


@pytest.mark.parametrize(("images", "caught_at_least"), [(15, 0.65), (27, 0.88)])
def test_no_clear_drop__class_that_lost_40_points__is_usually_caught(images: int, caught_at_least: float) -> None:
    draws = np.random.default_rng(0).multinomial(images, [0.01, 0.41, 0.58], 3000)[:, :2].tolist()
    fine = cache(
        lambda gained, lost: no_clear_drop(*outcomes(gained, lost, images - gained - lost), 0.1, 0.95, "").passed
    )
    assert np.mean([not fine(gained, lost) for gained, lost in draws]) > caught_at_least


def test_at_least__point_above_but_lower_limit_below_the_floor__fails() -> None:
    assert not at_least("accuracy", Interval(0.9, 0.84, 0.95), 0.85).passed
    assert at_least("accuracy", Interval(0.9, 0.85, 0.95), 0.85).passed


def test_verdict__checks_that_were_not_judged__do_not_count() -> None:
    good, unjudged = at_least("accuracy", Interval(0.9, 0.88, 0.95), 0.85), not_judged("drop", "no champion yet")
    assert Verdict.of([good, unjudged]).passed
    bad = GateCheck(name="class 8 recall", passed=False)
    verdict = Verdict.of([good, unjudged, bad])
    assert not verdict.passed
    assert verdict.failed == [bad]


def test_gate_check__number_that_is_not_finite__is_refused() -> None:
    with pytest.raises(ValidationError):
        GateCheck(name="accuracy", passed=True, value=float("nan"))
