from typing import Any

import numpy as np
import pytest

from pipelines.modeling.behaviour import (
    Sanity,
    add_noise,
    adjust,
    check_invariances,
    check_sanity,
    choose_images,
    compress,
    count_predictions,
    shift,
)
from pipelines.modeling.inference import OnnxPredictor


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)


def test_shift__one_down_one_left__moves_the_content_and_repeats_the_border(images: np.ndarray) -> None:
    moved = shift(images, 1, -1)
    np.testing.assert_array_equal(moved[:, 1:, :-1], images[:, :-1, 1:])
    np.testing.assert_array_equal(moved[:, 0, :-1], images[:, 0, 1:])


def test_shift__part_of_a_pixel__lies_between(images: np.ndarray) -> None:
    whole, part = shift(images, 1, 0).astype(float), shift(images, 0.25, 0).astype(float)
    np.testing.assert_allclose(part, 0.75 * images + 0.25 * whole, atol=0.5)
    np.testing.assert_array_equal(shift(images, 0, 0), images)


def test_adjust__contrast_and_brightness__clip_and_keep_the_mean(images: np.ndarray) -> None:
    assert adjust(images, brightness=300).min() == 255
    soft = adjust(images, contrast=0.5)
    assert soft.mean() == pytest.approx(images.mean(), abs=1)
    assert soft.std() == pytest.approx(images.std() / 2, rel=0.05)
    np.testing.assert_array_equal(adjust(images), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_compress__grey_or_colour__keeps_the_shape_and_about_the_content(channels: int) -> None:
    ramp = np.linspace(0, 255, 32 * 32).astype(np.uint8).reshape(1, 32, 32, 1).repeat(channels, axis=3)
    packed = compress(ramp, 75)
    assert packed.shape == ramp.shape
    assert np.abs(packed.astype(int) - ramp).mean() < 5


def test_add_noise__equal_seeds__give_equal_bytes(images: np.ndarray) -> None:
    np.testing.assert_array_equal(add_noise(images, 4, 1), add_noise(images, 4, 1))
    assert not np.array_equal(add_noise(images, 4, 1), add_noise(images, 4, 2))


def test_choose_images__more_than_needed__spreads_them_over_the_split() -> None:
    images = np.arange(3000, dtype=np.int64).astype(np.uint8).reshape(3000, 1, 1, 1)
    assert len(choose_images(images)) == 512
    assert len(choose_images(images[:30])) == 30
    assert len(choose_images(np.broadcast_to(np.uint8(0), (100, 2000, 2000, 3)))) == 64


def test_check_invariances__sound_model__survives_and_repeats(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    predictor = OnnxPredictor(run.workspace.model / "model.onnx")
    images = np.load(run.workspace.splits / "test.npy")
    found = check_invariances(predictor, images, confidence=0.95, seed=7)
    assert [one.name for one in found] == ["shift", "brightness", "contrast", "compression", "noise"]
    assert all(one.agreement.value > 0.95 for one in found)
    assert found[0].description == "by 0.29 px up, down, left and right"
    assert found == check_invariances(predictor, images, confidence=0.95, seed=7)


def test_check_sanity__sound_model__holds(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    found = check_sanity(OnnxPredictor(run.workspace.model / "model.onnx"), np.load(run.workspace.splits / "test.npy"))
    assert len(found) == 3
    assert all(one.holds for one in found)


def test_count_predictions__progress__ends_at_the_total(make_evaluation_run: Any) -> None:
    run = make_evaluation_run(test_images=20)
    predictor, seen = OnnxPredictor(run.workspace.model / "model.onnx"), []
    images = np.load(run.workspace.splits / "test.npy")
    predictor.observe = seen.append
    check_invariances(predictor, images, confidence=0.95, seed=7)
    check_sanity(predictor, images)
    assert sum(seen) == count_predictions(images)


def test_sanity__deviation_that_is_not_finite__does_not_hold() -> None:
    assert not Sanity("sums", None, 1e-3).holds
