"""A heat map lies where the evidence is, on a model that is known and on the real digits."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from serving.explanation import explain, log_odds

Pixels = npt.NDArray[np.uint8]


def _square_model(top: int, left: int, side: int, *, channels: int = 1) -> tuple[Pixels, object]:
    """An image of noise, and a model that looks at nothing but the contrast within one square."""
    image = np.random.default_rng(0).integers(0, 256, (32, 40, channels)).astype(np.uint8)

    def predict(batch: Pixels) -> npt.NDArray[np.float32]:
        part = batch[:, top : top + side, left : left + side].astype(np.float64)
        logit = part.std(axis=(1, 2, 3)) / 10
        positive = 1 / (1 + np.exp(-logit))
        return np.stack([1 - positive, positive], axis=1).astype(np.float32)

    return image, predict


@pytest.mark.parametrize(("top", "left", "channels"), [(3, 4, 1), (20, 28, 3), (12, 15, 1)])
def test_explain__model_that_sees_one_square__points_there(top: int, left: int, channels: int) -> None:
    image, predict = _square_model(top, left, 8, channels=channels)
    found = explain(predict, image, 1, 30.0, max_masks=400)  # type: ignore[arg-type]
    assert found.heat.shape == (32, 40)
    assert found.heat.dtype == np.float32
    assert (found.heat.min(), found.heat.max()) == (0.0, 1.0)
    row, column = np.unravel_index(found.heat.argmax(), found.heat.shape)
    assert top - 2 <= row < top + 10
    assert left - 2 <= column < left + 10
    inside = found.heat[top : top + 8, left : left + 8].mean()
    assert inside > 4 * found.heat.mean()
    against = explain(predict, image, 0, 30.0, max_masks=400)  # type: ignore[arg-type]
    assert against.signed[top + 4, left + 4] < 0  # what speaks for one of two labels speaks against the other
    assert against.heat[top + 4, left + 4] == 0


def test_explain__same_image_and_masks__is_the_same_map_and_another_image_draws_others() -> None:
    image, predict = _square_model(3, 4, 8)
    first, again = (explain(predict, image, 1, 30.0, max_masks=40) for _ in range(2))  # type: ignore[arg-type]
    assert first.masks == 40
    assert np.array_equal(first.signed, again.signed)
    seen: list[Pixels] = []

    def remember(batch: Pixels) -> npt.NDArray[np.float32]:
        seen.append(batch != batch[:1])
        return np.full((len(batch), 2), 0.5, np.float32)

    explain(remember, image, 1, 30.0, max_masks=8)
    explain(remember, image + 1, 1, 30.0, max_masks=8)
    assert not np.array_equal(*seen)


def test_explain__any_budget__gives_a_map_in_time_and_says_on_how_many_masks() -> None:
    image, predict = _square_model(3, 4, 8)

    def slow(batch: Pixels) -> npt.NDArray[np.float32]:
        time.sleep(0.01 * len(batch))
        return predict(batch)  # type: ignore[operator,no-any-return]

    hurried = explain(slow, image, 1, 0.0)
    assert hurried.masks == 8
    found = explain(slow, image, 1, 0.5)
    assert 8 < found.masks <= 50  # each takes a hundredth of a second at least
    assert found.elapsed_s < 5
    assert np.isfinite(found.signed).all()


def test_explain__model_that_looks_at_nothing_or_a_plain_image__is_no_evidence() -> None:
    plain = np.full((28, 28, 3), 7, np.uint8)
    constant = explain(lambda batch: np.full((len(batch), 3), 1 / 3, np.float32), plain, 0, 1.0, max_masks=32)
    assert constant.heat.max() == 0
    _, predict = _square_model(3, 4, 8)
    assert explain(predict, plain[..., :1], 1, 1.0, max_masks=32).heat.max() == 0  # type: ignore[arg-type]


def test_log_odds__probabilities_that_round_to_one__still_differ() -> None:
    certain = np.array([[1e-9, 1.0], [1e-10, 1.0], [1.0, 0.0]], np.float32)
    odds = log_odds(certain, 1)
    assert odds[:2] == pytest.approx([np.log(1e9), np.log(1e10)], rel=1e-4)
    assert np.isfinite(odds).all()


def test_explain__a_classifier_of_real_digits__finds_what_it_needs_better_than_chance() -> None:
    """The deletion curve (Petsiuk et al. 2018): hide the hottest pixels first, and the label's probability falls."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    digits = load_digits()
    model = MLPClassifier((64,), max_iter=200, tol=1e-3, random_state=0).fit(
        digits.data[:1500] / 16, digits.target[:1500]
    )
    enlarged = np.kron(digits.images[1500:1512], np.ones((3, 3)))[..., None]
    images = (enlarged * 255 / 16).astype(np.uint8)  # (12, 24, 24, 1)

    def predict(batch: Pixels) -> npt.NDArray[np.float32]:
        small = batch.reshape(len(batch), 8, 3, 8, 3).mean(axis=(2, 4))
        return model.predict_proba(small.reshape(len(batch), 64) / 255).astype(np.float32)  # type: ignore[no-any-return]

    def deletion_area(image: Pixels, label: int, order: npt.NDArray[np.int64]) -> float:
        steps = np.linspace(0, order.size, 17).astype(int)
        hidden = np.stack([image.reshape(-1)] * len(steps))
        for row, step in zip(hidden, steps, strict=True):
            row[order[:step]] = image.mean()
        return float(predict(hidden.reshape(len(steps), *image.shape))[:, label].mean())

    labels = predict(images).argmax(axis=1)
    random = np.random.default_rng(0)
    found, chance = [], []
    for image, label in zip(images, labels, strict=True):
        signed = explain(predict, image, int(label), 30.0, max_masks=256).signed
        found.append(deletion_area(image, label, np.argsort(-signed, axis=None, kind="stable")))
        chance.append(deletion_area(image, label, random.permutation(image.size)))
    assert np.mean(found) < 0.7 * np.mean(chance)
    assert (np.array(found) < chance).mean() > 0.8
