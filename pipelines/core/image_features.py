"""What an image looks like, in numbers: properties of files as they arrive, and features of what the model sees.

The first are kept with every ingested image, the second are what drift is measured on; both need NumPy and Pillow only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

MEASURED_PX = 256  # properties are measured on the image reduced to at most this, so that they cost little
EDGE_THRESHOLD = 64.0  # gradient magnitude, in grey levels per pixel times 8, above which a pixel lies on an edge

FEATURES = (
    "intensity",
    "contrast",
    "skewness",
    "dark_level",
    "bright_level",
    "dynamic_range",
    "entropy",
    "sharpness",
    "edge_density",
    "centre_contrast",
    "symmetry",
    "colourfulness",
)


@dataclass(frozen=True)
class ImageProperties:
    """Grey intensity (0-255) of an image reduced to at most 256 px, and its perceptual hash.

    Attributes:
        mean: average intensity.
        std: standard deviation of the intensity.
        p01: the 1st percentile.
        p99: the 99th percentile.
        phash: 64 bits, reinterpreted as a signed integer; the Hamming distance of two tells how alike they look.
    """

    mean: float
    std: float
    p01: float
    p99: float
    phash: int


def measure_image(image: Image.Image) -> ImageProperties:
    """Measure a decoded image (mode `L` or `RGB`)."""
    factor = math.ceil(max(image.size) / MEASURED_PX)
    grey = image.reduce(factor) if factor > 1 else image
    if grey.mode != "L":
        grey = grey.convert("L")
    counts = np.array(grey.histogram(), dtype=np.int64)
    total, first, second = (int(counts @ powers) for powers in _powers_of_levels())
    mean, squares = first / total, total * second - first * first  # integers: exact, however flat the image
    p01, p99 = counts.cumsum().searchsorted((0.01 * total, 0.99 * total)).tolist()
    return ImageProperties(mean, math.sqrt(squares) / total, float(p01), float(p99), perceptual_hash(grey))


def perceptual_hash(grey: Image.Image) -> int:
    """The DCT hash of a grey image: which of its 64 lowest frequencies lie above their median.

    After C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), section 3.2.1: reduce
    to 32 x 32, take the type-II discrete cosine transform, keep the lowest 8 x 8 coefficients, threshold at their
    median.

    Returns:
        64 bits, row by row, the first the most significant, reinterpreted as a signed integer.
    """
    method = Image.Resampling.BOX if min(grey.size) >= 32 else Image.Resampling.BILINEAR
    pixels = grey.resize((32, 32), method, reducing_gap=2.0).tobytes()
    small, basis = np.frombuffer(pixels, np.uint8).reshape(32, 32).astype(np.float64), _dct_basis()
    # A flat image has no frequencies but rounding noise, which would hash differently from one machine to the next.
    frequencies = (basis @ small @ basis.T).round(6)
    ordered = np.sort(frequencies, axis=None)  # np.median costs more than all the rest
    bits = np.packbits(frequencies > (ordered[31] + ordered[32]) / 2)
    return int.from_bytes(bits.tobytes(), "big", signed=True)


@cache
def _powers_of_levels() -> npt.NDArray[np.int64]:
    """The 256 grey levels to the powers 0, 1 and 2, `(3, 256)`."""
    return np.arange(256, dtype=np.int64) ** np.arange(3)[:, None]


@cache
def _dct_basis() -> npt.NDArray[np.float64]:
    """The 8 lowest rows of the 32-point DCT-II matrix, `(8, 32)`."""
    frequency, sample = np.arange(8)[:, None], np.arange(32)[None, :]
    return np.cos(np.pi * frequency * (2 * sample + 1) / 64)


def compute_features(images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """Describe a batch of model inputs.

    Args:
        images: uint8 `(N, H, W, C)` with C 1 or 3.

    Returns:
        For each name in `FEATURES` a float32 `(N,)`:

        - `intensity`, `contrast`, `skewness`: mean, standard deviation, third standardised moment of the grey levels;
        - `dark_level`, `bright_level`, `dynamic_range`: 1st and 99th percentile, and their difference;
        - `entropy`: Shannon's, of the grey-level histogram, in bits (0-8);
        - `sharpness`: variance of the Laplacian (Pech-Pacheco et al., ICPR 2000), low where an image is blurred;
        - `edge_density`: share of pixels whose Sobel gradient exceeds `EDGE_THRESHOLD`;
        - `centre_contrast`: mean of the middle half of each side minus the mean of the whole;
        - `symmetry`: correlation with the image's own mirror image, 1 for a flat one;
        - `colourfulness`: Hasler and Süsstrunk (SPIE 2003), 0 for grey images.
    """
    count, height, width, channels = images.shape
    grey = _luma(images)
    histogram = _histogram(grey)
    pixels = height * width
    levels = np.arange(256.0)
    share = histogram / pixels
    mean = share @ levels
    centred_levels = levels[None, :] - mean[:, None]
    variance = (share * centred_levels**2).sum(axis=1)
    std = np.sqrt(variance)
    third = (share * centred_levels**3).sum(axis=1)
    cumulated = np.cumsum(histogram, axis=1)
    dark, bright = ((cumulated < quantile * pixels).sum(axis=1).astype(np.float64) for quantile in (0.01, 0.99))
    logarithm = np.log2(share, out=np.zeros_like(share), where=share > 0)

    values = grey.astype(np.float32)
    centre = values[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    laplacian, gradient = _derivatives(values)
    centred = values - mean[:, None, None].astype(np.float32)
    mirrored = (centred * centred[:, :, ::-1]).mean(axis=(1, 2), dtype=np.float64)
    flat = variance < 1e-9
    safe = np.where(flat, 1.0, variance)
    features = {
        "intensity": mean,
        "contrast": std,
        "skewness": np.where(flat, 0.0, third / safe**1.5),
        "dark_level": dark,
        "bright_level": bright,
        "dynamic_range": bright - dark,
        "entropy": -(share * logarithm).sum(axis=1) + 0.0,  # adding zero turns -0.0 into 0.0
        "sharpness": laplacian.var(axis=(1, 2), dtype=np.float64),
        "edge_density": (gradient > EDGE_THRESHOLD).mean(axis=(1, 2)),
        "centre_contrast": centre.mean(axis=(1, 2), dtype=np.float64) - mean,
        "symmetry": np.where(flat, 1.0, mirrored / safe),
        "colourfulness": _colourfulness(images) if channels == 3 else np.zeros(count),
    }
    return {name: features[name].astype(np.float32) for name in FEATURES}


def count_levels(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each level occurs in each channel of a batch: int64 `(C, 256)` from uint8 `(N, H, W, C)`.

    Counts of batches add up exactly, so that a mean and a deviation from them do not depend on the batches.
    """
    channels = images.shape[-1]
    return np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(channels)])


def _luma(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Grey levels `(N, H, W)`, with Pillow's integer weights of ITU-R BT.601."""
    if images.shape[-1] == 1:
        return images[..., 0]
    wide = images.astype(np.uint32)
    return ((wide[..., 0] * 19595 + wide[..., 1] * 38470 + wide[..., 2] * 7471 + 0x8000) >> 16).astype(np.uint8)


def _histogram(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Level counts of each image, `(N, 256)`, in one pass over the batch."""
    count = len(grey)
    offsets = np.arange(count, dtype=np.int64)[:, None] * 256
    return np.bincount((grey.reshape(count, -1) + offsets).ravel(), minlength=count * 256).reshape(count, 256)


def _derivatives(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The 4-neighbour Laplacian and the Sobel gradient's magnitude of the inner pixels, each `(N, H-2, W-2)`."""
    up, middle, down = values[:, :-2], values[:, 1:-1], values[:, 2:]
    laplacian = up[..., 1:-1] + down[..., 1:-1] + middle[..., :-2] + middle[..., 2:] - 4 * middle[..., 1:-1]
    columns = up + 2 * middle + down
    across = columns[..., 2:] - columns[..., :-2]
    rows = down - up
    along = rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]
    return laplacian, np.hypot(across, along)


def _colourfulness(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    red, green, blue = (images[..., channel].astype(np.float32) for channel in range(3))
    red_green, yellow_blue = red - green, 0.5 * (red + green) - blue
    axes = (1, 2)
    deviation = np.hypot(red_green.std(axis=axes, dtype=np.float64), yellow_blue.std(axis=axes, dtype=np.float64))
    offset = np.hypot(red_green.mean(axis=axes, dtype=np.float64), yellow_blue.mean(axis=axes, dtype=np.float64))
    return np.asarray(deviation + 0.3 * offset, dtype=np.float64)
