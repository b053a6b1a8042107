"""Slices of the test split that a model must serve as well as the whole: image size, intensity, source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from pipelines.core.statistics import BoolArray, FloatArray

SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
MAX_SOURCES = 12
_MAX_NAMED_SIZES = 4


@dataclass(frozen=True)
class Slice:
    """Some of the images.

    Attributes:
        kind: what they have in common.
        name: which of the kind, e.g. `28 x 28 px`.
        inside: bool `(N,)`.
    """

    kind: Literal["size", "intensity", "source"]
    name: str
    inside: BoolArray


def find_slices(table: pd.DataFrame, labels: Sequence[str]) -> list[Slice]:
    """Cut a table of images by size, intensity and source.

    * size: of the original, before it was shaped for the model; each size by itself where there are at most four,
      else thirds by the number of pixels.
    * intensity: thirds by the mean grey value, 0-255.
    * source: the top folder of `key`, unless that is a class or a split; else the group.  The twelve with the most
      images, and the others together; none where all images are of one source, or all groups are of one image.

    Args:
        table: columns `key`, `group`, `width_px`, `height_px`, `mean`.
        labels: the classes.
    """
    return [*_by_size(table), *_by_intensity(table), *_by_source(table, labels)]


def _by_size(table: pd.DataFrame) -> list[Slice]:
    sizes = table["width_px"].astype(str) + " x " + table["height_px"].astype(str) + " px"
    pixels = (table["width_px"].astype(np.int64) * table["height_px"]).to_numpy(np.float64)
    if sizes.nunique() <= _MAX_NAMED_SIZES:
        named = pd.DataFrame({"size": sizes, "pixels": pixels}).drop_duplicates().sort_values(["pixels", "size"])
        return [Slice("size", name, (sizes == name).to_numpy()) for name in named["size"]]
    return [
        Slice("size", f"{word}, {low:,.0f} to {high:,.0f} pixels", inside)
        for word, low, high, inside in _thirds(pixels, ("small", "medium", "large"))
    ]


def _by_intensity(table: pd.DataFrame) -> list[Slice]:
    means = table["mean"].to_numpy(np.float64)
    return [
        Slice("intensity", f"{word}, mean {low:.0f} to {high:.0f}", inside)
        for word, low, high, inside in _thirds(means, ("dark", "medium", "bright"))
    ]


def _by_source(table: pd.DataFrame, labels: Sequence[str]) -> list[Slice]:
    folders = table["key"].str.partition("/")
    top = folders[0].where(folders[1] == "/", "")
    if not top.isin([*labels, *SPLIT_FOLDERS, ""]).any():
        sources = top
    elif (table["group"] != "").all() and table["group"].nunique() < len(table):
        sources = table["group"]
    else:
        return []
    counts = sources.value_counts()
    if len(counts) < 2:
        return []
    largest = sorted(counts.index, key=lambda source: (-counts[source], source))[:MAX_SOURCES]
    slices = [Slice("source", source, (sources == source).to_numpy()) for source in sorted(largest)]
    others = ~sources.isin(largest).to_numpy()
    return [*slices, Slice("source", f"{len(counts) - MAX_SOURCES} others", others)] if others.any() else slices


def _thirds(values: FloatArray, words: tuple[str, str, str]) -> list[tuple[str, float, float, BoolArray]]:
    """Name, smallest and largest value, and members of each third; equal values stay together."""
    limits = np.quantile(values, [1 / 3, 2 / 3], method="lower")
    thirds = np.searchsorted(limits, values, side="left")
    present = np.unique(thirds)
    if len(present) == 1:
        return [("all", float(values.min()), float(values.max()), np.ones(len(values), dtype=bool))]
    return [
        (words[third], float(values[thirds == third].min()), float(values[thirds == third].max()), thirds == third)
        for third in present
    ]
