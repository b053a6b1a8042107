import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from pipelines.core.metrics import (
    check_probabilities,
    confusion_matrix,
    f1_interval,
    macro_averages,
    macro_roc_auc,
    roc_auc,
    roc_auc_interval,
    score,
    score_classes,
)
from pipelines.core.statistics import FloatArray, IntArray, Uncertainty
from pipelines.errors import Refusal

HOW = Uncertainty(confidence=0.95, samples=200, seed=7)


def make_predictions(images: int, classes: int, skill: float, seed: int = 0) -> tuple[FloatArray, IntArray]:
    """Probabilities and truth of a classifier; a higher skill errs less."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, images)
    logits = random.normal(size=(images, classes))
    logits[np.arange(images), truth] += skill
    weights = np.exp(skill * logits)
    return weights / weights.sum(axis=1, keepdims=True), truth


@pytest.mark.parametrize(("images", "classes", "skill"), [(1, 2, 1.0), (40, 2, 1.0), (135, 10, 2.0), (60, 5, 0.2)])
def test_score__random_predictions__equals_scikit_learn(images: int, classes: int, skill: float) -> None:
    probabilities, truth = make_predictions(images, classes, skill)
    predicted, labels = probabilities.argmax(axis=1), np.unique(truth)
    scores = score(probabilities, truth, HOW)
    expected = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, average="macro", zero_division=0
    )
    assert scores.accuracy.value == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert (scores.precision.value, scores.recall.value, scores.f1.value) == pytest.approx(expected[:3])
    log_loss = sklearn_metrics.log_loss(truth, probabilities, labels=range(classes))
    assert scores.log_loss.value == pytest.approx(log_loss)
    for interval in (scores.accuracy, scores.precision, scores.recall, scores.f1, scores.brier, scores.log_loss):
        assert interval.low <= interval.value <= interval.high


def test_score__two_classes__brier_and_auc_equal_scikit_learn() -> None:
    probabilities, truth = make_predictions(80, 2, 0.8)
    scores = score(probabilities, truth, HOW)
    assert scores.brier.value == pytest.approx(2 * sklearn_metrics.brier_score_loss(truth, probabilities[:, 1]))
    assert scores.roc_auc is not None
    assert scores.roc_auc.value == pytest.approx(sklearn_metrics.roc_auc_score(truth, probabilities[:, 1]))
    assert scores.roc_auc == roc_auc_interval(probabilities[:, 1], truth == 1, 0.95)


def test_score__many_classes__auc_equals_scikit_learn() -> None:
    probabilities, truth = make_predictions(200, 6, 1.0)
    macro = macro_roc_auc(probabilities, truth, 0.95)
    assert macro is not None
    assert macro.value == pytest.approx(
        sklearn_metrics.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro")
    )


def test_score__all_images_of_one_class__has_no_roc_auc() -> None:
    scores = score(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), HOW)
    assert scores.roc_auc is None
    assert scores.accuracy.value == 0.5


@pytest.mark.parametrize("right", [True, False])
def test_score__all_right_or_all_wrong__keeps_the_doubt_of_a_small_test_set(right: bool) -> None:
    truth = np.arange(30) % 3
    probabilities = np.eye(3)[truth if right else (truth + 1) % 3]
    scores = score(probabilities, truth, HOW)
    for interval in (scores.accuracy, scores.precision, scores.recall, scores.f1):
        assert interval.value == float(right)
        assert interval.high - interval.low > 0.02
    assert scores.roc_auc is not None
    assert scores.roc_auc.high - scores.roc_auc.low > 0.02
    assert np.isfinite(scores.log_loss.value)


def test_score_classes__class_without_images__has_no_recall_and_no_auc() -> None:
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]])
    classes = score_classes(probabilities, np.array([0, 0, 0]), HOW)
    absent = classes[2]
    assert (absent.images, absent.predicted) == (0, 1)
    assert absent.recall is None
    assert absent.roc_auc is None
    assert absent.precision is not None
    assert absent.precision.value == 0
    assert classes[1].f1 is None


@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(2, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_roc_auc__ties_or_none__equals_scikit_learn(seed: int, images: int, levels: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    positive = random.random(images) < 0.4
    scores = random.integers(0, levels, images) / levels if ties else random.random(images)
    if positive.all() or not positive.any():
        assert roc_auc(scores, positive) is None
    else:
        assert roc_auc(scores, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores))


def test_roc_auc_interval__perfect_separation__is_wider_on_fewer_images() -> None:
    few = roc_auc_interval(np.arange(10.0), np.arange(10) >= 5, 0.95)
    many = roc_auc_interval(np.arange(400.0), np.arange(400) >= 200, 0.95)
    assert few is not None
    assert many is not None
    assert few.value == few.high == many.value == 1
    assert few.low < 0.85 < 0.98 < many.low < 1


def test_roc_auc_interval__simulated_readings__covers_the_truth() -> None:
    random = np.random.default_rng(1)
    truth, covered = 0.8413447460685429, 0  # Phi(1): two normal groups sqrt(2) apart
    positive = np.arange(120) < 30
    for _ in range(500):
        interval = roc_auc_interval(random.normal(size=120) + np.sqrt(2) * positive, positive, 0.95)
        assert interval is not None
        covered += interval.low <= truth <= interval.high
    assert covered / 500 >= 0.93


@pytest.mark.parametrize(("images", "classes", "skill"), [(60, 2, 2.5), (135, 10, 4.0), (270, 4, 1.5)])
def test_macro_averages__simulated_test_sets__cover_the_truth(images: int, classes: int, skill: float) -> None:
    probabilities, truth = make_predictions(100_000, classes, skill)
    everything = macro_averages(confusion_matrix(truth, probabilities.argmax(axis=1), classes), HOW)
    covered = np.zeros(3)
    for seed in range(150):
        probabilities, truth = make_predictions(images, classes, skill, seed + 1)
        found = macro_averages(confusion_matrix(truth, probabilities.argmax(axis=1), classes), HOW)
        covered += [part.low <= whole.value <= part.high for part, whole in zip(found, everything, strict=True)]
    assert (covered / 150 >= 0.86).all()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_f1_interval__any_counts__is_the_harmonic_mean(right: int, false_alarms: int, missed: int) -> None:
    interval = f1_interval(right, right + false_alarms, right + missed, 0.95)
    if right + false_alarms + missed == 0:
        assert interval is None
    else:
        assert interval is not None
        assert interval.value == pytest.approx(2 * right / (2 * right + false_alarms + missed))
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([[0.5, np.nan], [0.5, 0.5]], "image 0"),
        ([[0.5, 0.5], [np.inf, 0.0]], "image 1"),
        ([[0.5, 0.6]], "sum of 1"),
        ([[1.2, -0.2]], "0 or more"),
        (np.zeros((0, 2)), "shape"),
        ([0.5, 0.5], "shape"),
    ],
)
def test_check_probabilities__what_cannot_be_any__is_refused(probabilities: object, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        check_probabilities(probabilities, "the model's probabilities")  # type: ignore[arg-type]
