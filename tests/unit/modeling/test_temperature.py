"""Temperature scaling recovers how sure a model should be, and never promises certainty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from pipelines.modeling.temperature import fit_temperature


def draw(count: int, classes: int, scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels drawn from the probabilities that they mean."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, scale, (count, classes)).astype(np.float32)
    chosen = [random.choice(classes, p=row) for row in softmax(logits.astype(np.float64), axis=1)]
    return logits, np.array(chosen)


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_fit_temperature__logits_scaled_away_from_the_truth__finds_the_scale(factor: float) -> None:
    logits, labels = draw(5000, 4, 2.0, seed=1)
    assert fit_temperature(logits * np.float32(factor), labels) == pytest.approx(factor, rel=0.06)


def test_fit_temperature__all_right__stays_short_of_certainty() -> None:
    logits = np.eye(10, dtype=np.float32)[np.arange(100) % 10] * 3
    labels = np.arange(100) % 10
    temperature = fit_temperature(logits, labels)
    confidence = softmax(logits / temperature, axis=1).max(axis=1)
    assert temperature < 1
    assert confidence.max() == pytest.approx(101 / 102, abs=0.003)  # the smoothed target


def test_fit_temperature__one_image__gives_a_number() -> None:
    assert 0.05 <= fit_temperature(np.zeros((1, 2), dtype=np.float32), np.array([0])) <= 20
