"""Behaviour tests: what a model must do whatever its accuracy is (after Ribeiro et al., CheckList, ACL 2020).

*Invariances*: a change that no person would answer differently to must not change the prediction.  *Sanity*: odd
images get proper probabilities, and an image gets the same answer alone as among others.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.core.statistics import FloatArray, Interval, wilson_interval
from pipelines.modeling.inference import Images, OnnxPredictor, Probabilities

SHIFT_PX = 1.0
MAX_SHIFT_SHARE = 1 / 28  # of the side: on a smaller image a whole pixel is no small change any more
BRIGHTNESS_LEVELS = 10  # of 255
CONTRAST_SHARE = 0.1
JPEG_QUALITY = 75
NOISE_LEVELS = 4.0  # standard deviation, of 255
BATCH_TOLERANCE = 1e-4  # float32 sums in another order differ in the seventh digit of a logit
SUM_TOLERANCE = 1e-3
_MAX_IMAGES = 512
_MAX_PIXEL_BYTES = 2**26  # a network for large images is slow: fewer of them, but never under 64
_MIN_IMAGES = 64
_BATCH_TEST_IMAGES = 16
_FLAT_IMAGES = 2  # black, white

Change = Callable[[Images], Images]


@dataclass(frozen=True)
class Invariance:
    """How many predictions survived a kind of change.

    Attributes:
        name: of the kind.
        description: what was changed, and by how much.
        images: how many were tried.
        agreement: share of images whose prediction is the same under every variant of the change.
    """

    name: str
    description: str
    images: int
    agreement: Interval


@dataclass(frozen=True)
class Sanity:
    """A property that holds or does not.

    Attributes:
        name: of the property.
        value: largest deviation from it; `None` where the model's answer is not a finite number.
        limit: largest deviation allowed.
    """

    name: str
    value: float | None
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the deviation is within the limit."""
        return self.value is not None and self.value <= self.limit


def choose_images(images: Images) -> Images:
    """Evenly spaced images, at most 512 and fewer where they are large; the behaviour tests see these."""
    per_image = int(np.prod(images.shape[1:]))
    most = max(_MIN_IMAGES, min(_MAX_IMAGES, _MAX_PIXEL_BYTES // per_image))
    rows = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(np.int64))
    return np.asarray(images[rows])


def count_predictions(images: Images) -> int:
    """How many images the two checks below predict, for a progress bar."""
    variants = sum(len(changes) for _, _, changes in _changes(images.shape[1], seed=0))
    return len(images) * (1 + variants) + _FLAT_IMAGES + 2 * min(len(images), _BATCH_TEST_IMAGES)


def check_invariances(predictor: OnnxPredictor, images: Images, *, confidence: float, seed: int) -> list[Invariance]:
    """Predict every image under every harmless change.

    Args:
        predictor: the exported model.
        images: uint8 `(N, H, W, C)`, at least one.
        confidence: of Wilson's interval of each share.
        seed: of the noise.
    """
    original = predictor.predict(images).argmax(axis=1)
    found = []
    for name, description, changes in _changes(images.shape[1], seed):
        survived = np.ones(len(images), dtype=bool)
        for change in changes:
            survived &= predictor.predict(images, change=change).argmax(axis=1) == original
        agreement = wilson_interval(int(survived.sum()), len(images), confidence)
        if agreement is None:
            raise ValueError("there are no images to change")
        found.append(Invariance(name, description, len(images), agreement))
    return found


def check_sanity(predictor: OnnxPredictor, images: Images) -> list[Sanity]:
    """Probabilities of black and white images and their sums, and of an image alone against it in a batch."""
    few = images[:_BATCH_TEST_IMAGES]
    side, channels = predictor.contract.input.size_px, predictor.contract.input.channels
    flat = np.stack(
        [np.full((side, side, channels), level, dtype=np.uint8) for level in np.linspace(0, 255, _FLAT_IMAGES)]
    )
    together = predictor.predict(few)
    alone = predictor.predict(few, batch_images=1)
    return [
        Sanity("black and white images get probabilities", _sum_deviation(predictor.predict(flat)), SUM_TOLERANCE),
        Sanity("probabilities sum to 1", _sum_deviation(together), SUM_TOLERANCE),
        Sanity("an image alone is judged as in a batch", _largest(alone - together), BATCH_TOLERANCE),
    ]


def shift(images: Images, down_px: float, right_px: float) -> Images:
    """Move the content by at most one pixel each way, interpolating linearly; the border repeats itself."""
    moved = _blend(images, 1, down_px)
    return _to_uint8(_blend(moved, 2, right_px))


def adjust(images: Images, *, contrast: float = 1.0, brightness: float = 0.0) -> Images:
    """Scale each image's distance from its own mean, and add grey levels; clipped to 0-255."""
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return _to_uint8((images - mean) * contrast + mean + brightness)


def compress(images: Images, quality: int) -> Images:
    """Write each image as JPEG and read it back."""
    return np.stack([_through_jpeg(image, quality) for image in images])


def add_noise(images: Images, deviation: float, seed: int) -> Images:
    """Add independent Gaussian noise; clipped to 0-255.  An image's noise depends on the seed and its shape alone."""
    noise = np.random.default_rng(seed).normal(0.0, deviation, images.shape[1:])
    return _to_uint8(images + noise)


def _changes(side_px: int, seed: int) -> list[tuple[str, str, list[Change]]]:
    """Name, description and variants of each kind of change."""
    distance_px = min(SHIFT_PX, side_px * MAX_SHIFT_SHARE)
    directions = [(distance_px, 0), (-distance_px, 0), (0, distance_px), (0, -distance_px)]
    return [
        (
            "shift",
            f"by {distance_px:.2g} px up, down, left and right",
            [partial(shift, down_px=down, right_px=right) for down, right in directions],
        ),
        (
            "brightness",
            f"{BRIGHTNESS_LEVELS} of 255 levels darker and brighter",
            [partial(adjust, brightness=levels) for levels in (-BRIGHTNESS_LEVELS, BRIGHTNESS_LEVELS)],
        ),
        (
            "contrast",
            f"{CONTRAST_SHARE:.0%} less and more",
            [partial(adjust, contrast=factor) for factor in (1 - CONTRAST_SHARE, 1 + CONTRAST_SHARE)],
        ),
        ("compression", f"JPEG at quality {JPEG_QUALITY}", [partial(compress, quality=JPEG_QUALITY)]),
        (
            "noise",
            f"Gaussian, deviation {NOISE_LEVELS:g} of 255 levels",
            [partial(add_noise, deviation=NOISE_LEVELS, seed=seed)],
        ),
    ]


def _blend(values: NDArray[Any], axis: int, distance_px: float) -> FloatArray:
    """Values moved along an axis by a part of a pixel."""
    size = values.shape[axis]
    neighbours = np.clip(np.arange(size) - int(np.sign(distance_px)), 0, size - 1)
    share = abs(distance_px)
    blended: FloatArray = (1 - share) * values + share * values.take(neighbours, axis=axis)
    return blended


def _through_jpeg(image: Images, quality: int) -> Images:
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).reshape(image.shape)


def _to_uint8(values: FloatArray) -> Images:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _sum_deviation(probabilities: Probabilities) -> float | None:
    return _largest(probabilities.sum(axis=1, dtype=np.float64) - 1)


def _largest(differences: NDArray[np.floating]) -> float | None:
    """The largest size of a difference, `None` where one is not a finite number."""
    largest = float(np.abs(differences).max())
    return largest if np.isfinite(largest) else None
