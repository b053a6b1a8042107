"""Makes folders of images that compress and decode like photographs, for benchmarks that need many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image_folder(folder: Path, images: int, size_px: int, *, channels: int = 1, quality: int = 85) -> int:
    """Write JPEGs of two classes, all different; returns how many bytes they take.

    Each is 1/f noise, the spectrum of natural images (Field, J. Opt. Soc. Am. A 1987), with a little sensor noise.
    """
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :])
    frequency[0, 0] = 1.0
    scenes = []
    for _ in range(6):
        phases = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        scene = np.fft.irfft2(phases / frequency**1.2, s=(size_px, size_px))
        scenes.append(np.clip(128 + 45 * scene / scene.std(), 0, 255).astype(np.uint8))
    total = 0
    for index in range(images):
        picked = [scenes[int(rng.integers(len(scenes)))] for _ in range(channels)]
        shifts = tuple(int(shift) for shift in rng.integers(0, size_px, size=2))
        pixels = np.stack([np.roll(scene, shifts, axis=(0, 1)) for scene in picked], axis=-1).astype(np.int16)
        noise = rng.integers(-3, 4, size=(64, size_px, 1), dtype=np.int16)
        pixels += np.tile(noise, (size_px // 64 + 1, 1, 1))[:size_px]
        file = folder / ("left" if index % 2 else "right") / f"{index:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze()).save(file, quality=quality)
        total += file.stat().st_size
    return total
