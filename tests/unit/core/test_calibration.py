import numpy as np
import pytest

from pipelines.core.calibration import calibration_error, reliability
from pipelines.core.statistics import Uncertainty

HOW = Uncertainty(confidence=0.95, samples=200, seed=7)


def test_calibration_error__as_sure_as_right__is_small() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1.0, 20_000)
    error = calibration_error(confidence, random.random(20_000) < confidence, HOW)
    assert error.value < 0.01
    assert error.low <= error.value <= error.high


def test_calibration_error__sure_but_half_wrong__is_the_gap() -> None:
    correct = np.arange(200) % 2 == 0
    error = calibration_error(np.full(200, 0.95), correct, HOW)
    assert error.value == pytest.approx(0.45)
    assert 0.35 < error.low < error.high < 0.55


def test_calibration_error__overconfident_by_a_tenth__is_found_where_there_are_many_images() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.6, 1.0, 10_000)
    error = calibration_error(confidence, random.random(10_000) < confidence - 0.1, HOW)
    assert error.value == pytest.approx(0.1, abs=0.015)


def test_calibration_error__images_in_another_order__is_the_same() -> None:
    random = np.random.default_rng(0)
    confidence = np.round(random.uniform(0.5, 1.0, 300), 2)
    correct = random.random(300) < confidence
    order = random.permutation(300)
    shuffled = calibration_error(confidence[order], correct[order], HOW)
    assert shuffled.value == pytest.approx(calibration_error(confidence, correct, HOW).value)


def test_reliability__any_images__counts_each_once_and_rises() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.3, 1.0, 500)
    bins = reliability(confidence, random.random(500) < confidence)
    assert sum(part.images for part in bins) == 500
    assert [part.confidence for part in bins] == sorted(part.confidence for part in bins)
    assert len(bins) == 15


def test_reliability__one_image__is_one_bin() -> None:
    assert len(reliability(np.array([0.8]), np.array([True]))) == 1
