import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipelines.core.image_features import FEATURES, compute_features, count_levels, measure_image, perceptual_hash

RNG = np.random.default_rng(3)


def noise(height: int = 64, width: int = 64) -> Image.Image:
    coarse = Image.fromarray(RNG.integers(0, 256, (9, 9), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def bits_between(first: int, second: int) -> int:
    return ((first ^ second) & (2**64 - 1)).bit_count()


def test_measure_image__known_levels__gives_their_moments_and_percentiles():
    pixels = np.repeat(np.arange(100, dtype=np.uint8), 100).reshape(100, 100)
    measured = measure_image(Image.fromarray(pixels))
    assert measured.mean == pytest.approx(49.5)
    assert measured.std == pytest.approx(pixels.std())
    assert (measured.p01, measured.p99) == (0, 98)


def test_measure_image__colour_and_its_luma__measure_the_same():
    image = Image.merge("RGB", (noise(), noise(), noise()))
    colour, grey = measure_image(image), measure_image(image.convert("L"))
    assert colour == grey


def test_measure_image__large__is_close_to_measuring_all_of_it():
    image = noise(900, 1300)
    measured = measure_image(image)
    assert measured.mean == pytest.approx(np.asarray(image).mean(), abs=1)
    assert measured.std == pytest.approx(np.asarray(image).std(), abs=1.5)


def test_perceptual_hash__resized_and_brightened__stays_near():
    image = noise(200, 200)
    changed = Image.fromarray(np.clip(np.asarray(image.resize((150, 150))).astype(int) + 6, 0, 255).astype(np.uint8))
    assert bits_between(perceptual_hash(image), perceptual_hash(changed)) <= 4


def test_perceptual_hash__different_images__lie_far_apart():
    hashes = [perceptual_hash(noise()) for _ in range(8)]
    distances = [bits_between(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 8
    assert all(-(2**63) <= value < 2**63 for value in hashes)


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_perceptual_hash__flat__does_not_hash_rounding_noise(level):
    assert perceptual_hash(Image.new("L", (40, 40), level)) in {0, -(2**63)}


images = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 4), st.integers(3, 12), st.integers(3, 12), st.sampled_from([1, 3]))
)


@settings(deadline=None)
@given(batch=images)
def test_compute_features__any_batch__equals_its_images_one_by_one(batch):
    together = compute_features(batch)
    assert list(together) == list(FEATURES)
    for name, values in together.items():
        assert values.dtype == np.float32
        assert np.isfinite(values).all(), name
        alone = np.concatenate([compute_features(batch[row : row + 1])[name] for row in range(len(batch))])
        np.testing.assert_allclose(values, alone, rtol=1e-5, atol=1e-5, err_msg=name)


@settings(deadline=None)
@given(batch=images)
def test_compute_features__any_batch__stays_within_bounds(batch):
    features = compute_features(batch)
    assert (features["entropy"] >= 0).all()
    assert (features["entropy"] <= 8).all()
    assert (features["edge_density"] <= 1).all()
    assert (np.abs(features["symmetry"]) <= 1.001).all()
    assert (features["dark_level"] <= features["bright_level"]).all()


def test_compute_features__flat_image__has_no_structure():
    features = compute_features(np.full((1, 16, 16, 3), 90, np.uint8))
    assert features["intensity"][0] == 90
    assert [features[name][0] for name in ("contrast", "entropy", "sharpness", "edge_density", "colourfulness")] == [
        0
    ] * 5
    assert features["symmetry"][0] == 1


def test_compute_features__blurred__is_less_sharp():
    sharp = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(sharp).resize((8, 8)).resize((32, 32)))
    values = compute_features(np.stack([sharp, blurred])[..., None])["sharpness"]
    assert values[0] > 10 * values[1]


def test_compute_features__two_equal_levels__has_one_bit_of_entropy():
    image = np.zeros((1, 8, 8, 1), np.uint8)
    image[:, :, 4:] = 255
    features = compute_features(image)
    assert features["entropy"][0] == pytest.approx(1.0)
    assert features["symmetry"][0] == pytest.approx(-1.0)
    assert features["contrast"][0] == pytest.approx(127.5)


def test_compute_features__grey_in_three_channels__equals_grey_in_one():
    grey = RNG.integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    one, three = compute_features(grey), compute_features(np.repeat(grey, 3, axis=-1))
    for name in FEATURES:
        np.testing.assert_allclose(one[name], three[name], err_msg=name)


def test_count_levels__any_partition__adds_up_to_exact_moments():
    batch = RNG.integers(0, 256, (10, 7, 5, 3), dtype=np.uint8)
    counts = count_levels(batch[:4]) + count_levels(batch[4:])
    assert np.array_equal(counts, count_levels(batch))
    mean = counts[1] @ np.arange(256) / counts[1].sum()
    assert math.isclose(mean, batch[..., 1].mean())
