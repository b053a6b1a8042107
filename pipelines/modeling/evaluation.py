"""Measures an exported model on the test split: overall, per class, per slice, under changes, beside its reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.core.metrics import ClassScores, Scores, check_probabilities, confusion_matrix, score, score_classes
from pipelines.core.statistics import (
    BoolArray,
    FloatArray,
    IntArray,
    Interval,
    Uncertainty,
    bootstrap_interval,
    mcnemar_exact,
    paired_difference_interval,
)
from pipelines.errors import Refusal
from pipelines.modeling import behaviour
from pipelines.modeling.behaviour import Invariance, Sanity, choose_images
from pipelines.modeling.comparison import Comparison
from pipelines.modeling.evaluation_data import EvaluationData
from pipelines.modeling.inference import OnnxPredictor, ShowProgress
from pipelines.modeling.slices import Slice, find_slices


@dataclass(frozen=True)
class Paired:
    """The model and its reference on the same images, both restricted to the classes that both know.

    Differences are the model minus the reference.  Each limit of a difference holds with the evaluation's confidence,
    so that at 0.95 the two together are a 90 % interval: what is asked of a difference is asked of one side.

    Attributes:
        rows: int64 `(M,)`, rows of the test split.
        correct: bool `(M,)`, whether the model was right.
        reference_correct: bool `(M,)`, whether the reference was.
        scores: of the model on these images.
        reference_scores: of the reference.
        accuracy_difference: Tango's score interval.
        f1_difference: of the macro averages, paired bootstrap.
        log_loss_difference: paired bootstrap; below 0 the model is better.
    """

    rows: IntArray
    correct: BoolArray
    reference_correct: BoolArray
    scores: Scores
    reference_scores: Scores
    accuracy_difference: Interval
    f1_difference: Interval
    log_loss_difference: Interval

    @property
    def gained(self) -> int:
        """Images that only the model got right."""
        return int((self.correct & ~self.reference_correct).sum())

    @property
    def lost(self) -> int:
        """Images that only the reference got right."""
        return int((self.reference_correct & ~self.correct).sum())


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        data: the test split.
        probabilities: float64 `(N, K)`.
        how: how intervals were made.
        scores: of all images.
        classes: in the order of the labels.
        slices: with the scores of each.
        invariances: predictions under harmless changes.
        sanity: properties that must hold.
        comparison: with whom, and on which images.
        paired: the outcome of it; `None` without a reference or without an image to compare on.
    """

    data: EvaluationData
    probabilities: FloatArray
    how: Uncertainty
    scores: Scores
    classes: list[ClassScores]
    slices: list[tuple[Slice, Scores]]
    invariances: list[Invariance]
    sanity: list[Sanity]
    comparison: Comparison
    paired: Paired | None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.contract.labels

    @cached_property
    def predicted(self) -> IntArray:
        """int64 `(N,)`, indices into the labels."""
        indices: IntArray = self.probabilities.argmax(axis=1).astype(np.int64)
        return indices

    @cached_property
    def confusion(self) -> IntArray:
        """int64 `(K, K)`: row the true class, column the predicted one."""
        return confusion_matrix(self.data.truth, self.predicted, len(self.labels))

    def worst_errors(self, most: int) -> IntArray:
        """Rows of the wrong predictions, those first in which the model was furthest from the truth."""
        wrong = np.flatnonzero(self.predicted != self.data.truth)
        excess = self.probabilities[wrong, self.predicted[wrong]] - self.probabilities[wrong, self.data.truth[wrong]]
        return wrong[np.argsort(-excess, kind="stable")][:most].astype(np.int64)


def evaluate(
    predictor: OnnxPredictor,
    data: EvaluationData,
    comparison: Comparison,
    how: Uncertainty,
    show_progress: ShowProgress,
) -> Evaluation:
    """Measure a model.

    Raises:
        Refusal: the model does not fit the test split, or its answers are no probabilities.
    """
    if predictor.contract != data.contract:
        raise Refusal(
            "the model's contract",
            predictor.contract.model_dump_json(),
            limit=f"{data.contract.model_dump_json()}, that of data/splits",
            way_out="run model_training again on these splits",
        )
    some = choose_images(data.images)
    copies = behaviour.count_predictions(some)
    title = f"evaluating {len(data):,} test images and {copies:,} copies for the behaviour tests:"
    with show_progress(title, len(data) + copies) as progress:
        predictor.observe = progress.advance
        probabilities = check_probabilities(predictor.predict(data.images), "the model's probabilities")
        invariances = behaviour.check_invariances(predictor, some, confidence=how.confidence, seed=how.seed)
        sanity = behaviour.check_sanity(predictor, some)
    return Evaluation(
        data=data,
        probabilities=probabilities,
        how=how,
        scores=score(probabilities, data.truth, how),
        classes=score_classes(probabilities, data.truth, how),
        slices=[
            (part, score(probabilities[part.inside], data.truth[part.inside], how))
            for part in find_slices(data.table, data.contract.labels)
        ],
        invariances=invariances,
        sanity=sanity,
        comparison=comparison,
        paired=_pair(probabilities, data, comparison, how),
    )


def _pair(probabilities: FloatArray, data: EvaluationData, comparison: Comparison, how: Uncertainty) -> Paired | None:
    rows, count = comparison.rows, len(comparison.rows)
    if count == 0 or len(comparison.labels) < 2:
        return None
    common = [data.contract.labels.index(label) for label in comparison.labels]
    truth = np.searchsorted(common, data.truth[rows]).astype(np.int64)
    model = _renormalise(probabilities[rows][:, common])
    reference = check_probabilities(_renormalise(comparison.probabilities[:, common]), "the reference's probabilities")
    predicted, reference_predicted = model.argmax(axis=1), reference.argmax(axis=1)
    correct, reference_correct = predicted == truth, reference_predicted == truth
    gained, lost = int((correct & ~reference_correct).sum()), int((reference_correct & ~correct).sum())
    one_sided = 2 * how.confidence - 1
    both = Uncertainty(one_sided, how.samples, how.seed)
    surprise = _surprise(model, truth) - _surprise(reference, truth)

    def f1_gain(indices: IntArray) -> float:
        mine, theirs = (
            _macro_f1(confusion_matrix(truth[indices], answers[indices], len(common)))
            for answers in (predicted, reference_predicted)
        )
        return mine - theirs

    return Paired(
        rows=rows,
        correct=correct,
        reference_correct=reference_correct,
        scores=score(model, truth, how),
        reference_scores=score(reference, truth, how),
        accuracy_difference=paired_difference_interval(gained, lost, count, one_sided),
        f1_difference=bootstrap_interval(f1_gain, count, both),
        log_loss_difference=bootstrap_interval(lambda indices: float(surprise[indices].mean()), count, both),
    )


def _renormalise(probabilities: FloatArray) -> FloatArray:
    """Scale rows to sum to 1; a row of zeros, a model sure of a class that the other lacks, becomes even."""
    sums = probabilities.sum(axis=1, keepdims=True)
    return np.where(sums > 0, probabilities / np.where(sums > 0, sums, 1.0), 1 / probabilities.shape[1])


def _surprise(probabilities: FloatArray, truth: IntArray) -> FloatArray:
    smallest = float(np.finfo(np.float32).tiny)
    return -np.log(np.maximum(probabilities[np.arange(len(truth)), truth], smallest))


def _macro_f1(confusion: IntArray) -> float:
    images = confusion.sum(axis=1)
    present = images > 0
    return float((2 * np.diag(confusion)[present] / (images + confusion.sum(axis=0))[present]).mean())


def metrics_tree(evaluation: Evaluation) -> dict[str, Any]:
    """`evaluation/metrics.json`: every number with its interval, and of what it is."""
    comparison, paired = evaluation.comparison, evaluation.paired
    return {
        "images": len(evaluation.data),
        "labels": list(evaluation.labels),
        "confidence": evaluation.how.confidence,
        "overall": asdict(evaluation.scores),
        "classes": {label: asdict(scores) for label, scores in zip(evaluation.labels, evaluation.classes, strict=True)},
        "slices": [{"kind": part.kind, "name": part.name, **asdict(scores)} for part, scores in evaluation.slices],
        "confusion": evaluation.confusion.tolist(),
        "behaviour": {
            "invariances": [asdict(invariance) for invariance in evaluation.invariances],
            "sanity": [{**asdict(sanity), "holds": sanity.holds} for sanity in evaluation.sanity],
        },
        "reference": {
            "kind": comparison.kind,
            "version": comparison.version,
            "same_file": comparison.same_file,
            "images": len(comparison.rows),
            "left_out_trained_on": comparison.seen,
            "left_out_unknown_class": comparison.unknown,
            "labels": list(comparison.labels),
        }
        | (
            {
                "gained": paired.gained,
                "lost": paired.lost,
                "mcnemar_p": mcnemar_exact(paired.gained, paired.lost),
                "model": asdict(paired.scores),
                "reference": asdict(paired.reference_scores),
                "difference_confidence": 2 * evaluation.how.confidence - 1,
                "accuracy_difference": asdict(paired.accuracy_difference),
                "f1_difference": asdict(paired.f1_difference),
                "log_loss_difference": asdict(paired.log_loss_difference),
            }
            if paired
            else {}
        ),
    }


def predictions_table(evaluation: Evaluation) -> pa.Table:
    """`evaluation/predictions.parquet`: one row per test image; the reference is null where it was not asked."""
    data, comparison = evaluation.data, evaluation.comparison
    columns: dict[str, pa.Array] = {
        "row": pa.array(np.arange(len(data)), pa.int64()),
        "sha256": pa.array(data.table["sha256"].tolist(), pa.string()),
        "key": pa.array(data.table["key"].tolist(), pa.string()),
        "label_index": pa.array(data.truth, pa.int64()),
    }
    for index in range(len(evaluation.labels)):
        columns[f"p_{index}"] = pa.array(evaluation.probabilities[:, index].astype(np.float32), pa.float32())
    if comparison.kind != "none":
        unasked = ~np.isin(np.arange(len(data)), comparison.rows)
        for index in range(len(evaluation.labels)):
            values = np.zeros(len(data), dtype=np.float32)
            values[comparison.rows] = comparison.probabilities[:, index]
            columns[f"reference_p_{index}"] = pa.array(values, pa.float32(), mask=unasked)
    return pa.table(columns)
