"""Whether a classifier is as sure as it is right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.core.statistics import BoolArray, FloatArray, IntArray, Interval, Uncertainty, bootstrap_interval

MAX_BINS = 15
_IMAGES_PER_BIN = 20


@dataclass(frozen=True)
class CalibrationBin:
    """Images of similar confidence: how sure the model was, and how often it was right."""

    images: int
    confidence: float
    accuracy: float


def calibration_error(confidence: FloatArray, correct: BoolArray, how: Uncertainty) -> Interval:
    """Expected calibration error: how far confidence and accuracy lie apart, weighted by images; 0 is best.

    The bins hold equally many images, at least 20 each and 15 bins at most, which is less biased than bins of equal
    width; equal confidences share a bin.  On few images the error is overstated, the more so its upper limit, so a
    judgement should use the lower one.  The interval is a bootstrap with the bins held fixed.  Sources: Naeini, Cooper
    and Hauskrecht, AAAI 2015; bins after Nixon et al., CVPR workshops 2019, and Roelofs et al., AISTATS 2022.

    Args:
        confidence: float `(N,)`, the probability of what was predicted.
        correct: bool `(N,)`, whether that was right.
        how: confidence and resamples of the interval.
    """
    bins = _assign_bins(confidence)
    gap, count = confidence - correct, len(confidence)

    def error(indices: IntArray) -> float:
        return float(np.abs(np.bincount(bins[indices], weights=gap[indices])).sum()) / count

    return bootstrap_interval(error, count, how)


def reliability(confidence: FloatArray, correct: BoolArray) -> list[CalibrationBin]:
    """The bins of `calibration_error`, from the least to the most confident."""
    bins = _assign_bins(confidence)
    return [
        CalibrationBin(int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean()))
        for inside in (bins == index for index in np.unique(bins))
    ]


def _assign_bins(confidence: FloatArray) -> NDArray[np.intp]:
    count = len(confidence)
    bins = min(MAX_BINS, max(1, count // _IMAGES_PER_BIN))
    ordered = np.sort(confidence)
    first = np.unique(ordered[[index * count // bins for index in range(1, bins)]])
    return np.searchsorted(first, confidence, side="right")
