"""Temperature scaling: one number, fitted on the validation split, that makes confidences mean what they say.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599).  It changes no prediction, only how
sure the model says it is; label smoothing and short training leave it too unsure, long training too sure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

_LOG_BOUNDS = (np.log(0.05), np.log(20.0))

Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature by which logits must be divided for the smallest loss.

    The true class's target is `(N + 1) / (N + 2)`, as Platt smooths his (Advances in Large Margin Classifiers,
    1999): of N images that are all right one cannot conclude that the next will be.

    Args:
        logits: float32 `(N, classes)`, N at least 1.
        labels: int64 `(N,)`, the true classes.

    Returns:
        Above 1 where the model was too sure, below 1 where it was not sure enough; rounded to 4 digits, so that the
        last bits of a sum do not show in the exported file.
    """
    count, classes = logits.shape
    right = (count + 1) / (count + 2)
    wrong = (1 - right) / (classes - 1)

    def loss(log_temperature: float) -> float:
        logs = log_softmax(logits.astype(np.float64) / np.exp(log_temperature), axis=1)
        of_true = logs[np.arange(count), labels]
        return float(-(right * of_true + wrong * (logs.sum(axis=1) - of_true)).mean())

    found = minimize_scalar(loss, bounds=_LOG_BOUNDS, method="bounded")
    return float(np.round(np.exp(found.x), 4))
