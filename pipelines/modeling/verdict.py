"""The gate of an evaluation: its measurements held against `model_evaluation`'s limits, one check for each.

What must be proven: that the accuracy reaches its floor, and that it is not worse than the reference's.  Everything
else blocks only when it is beyond doubt worse than its limit; `pipelines.core.gates` has the tests and the reasons.
"""

from __future__ import annotations

import numpy as np

from pipelines.core.gates import (
    GateCheck,
    Verdict,
    at_least,
    no_clear_drop,
    no_clear_excess,
    no_clear_shortfall,
    non_inferior,
    not_judged,
)
from pipelines.core.statistics import BoolArray
from pipelines.modeling.evaluation import Evaluation, Paired
from pipelines.params import ModelEvaluationParams

NO_CHAMPION = "no champion yet"


def judge(evaluation: Evaluation, params: ModelEvaluationParams) -> Verdict:
    """Hold every measurement against its limit."""
    return Verdict.of(
        [
            at_least(
                "accuracy",
                evaluation.scores.accuracy,
                params.min_accuracy,
                f"{len(evaluation.data):,} test images; the lower limit must reach the floor",
            ),
            *_against_reference(evaluation, params),
            no_clear_excess(
                "calibration error",
                evaluation.scores.calibration_error,
                params.max_calibration_error,
                _describe_calibration(evaluation),
            ),
            *(
                no_clear_shortfall(
                    f"predictions survive {invariance.name}",
                    invariance.agreement,
                    params.min_behaviour_agreement,
                    f"{invariance.description}; {invariance.images:,} images",
                )
                for invariance in evaluation.invariances
            ),
            *(
                GateCheck(
                    name=sanity.name,
                    passed=sanity.holds,
                    value=sanity.value,
                    limit=sanity.limit,
                    detail="largest deviation" if sanity.value is not None else "not a finite number",
                )
                for sanity in evaluation.sanity
            ),
        ]
    )


def _describe_calibration(evaluation: Evaluation) -> str:
    confidence, accuracy = float(evaluation.probabilities.max(axis=1).mean()), evaluation.scores.accuracy.value
    which = "less" if confidence < accuracy else "more"
    return f"{which} sure than right: mean confidence {confidence:.2f}, accuracy {accuracy:.2f}"


def _against_reference(evaluation: Evaluation, params: ModelEvaluationParams) -> list[GateCheck]:
    """The same names whether or not there is somebody to compare with, so that verdicts can be read side by side."""
    comparison, paired = evaluation.comparison, evaluation.paired
    name, margin = "accuracy drop", params.max_accuracy_drop
    if comparison.kind == "none":
        overall = not_judged(name, NO_CHAMPION, limit=-margin)
    elif paired is None:
        overall = GateCheck(name=name, passed=False, limit=-margin, detail=_why_not_compared(evaluation))
    elif comparison.same_file:
        # No number of images proves a margin on a handful of them; here nothing is left to prove.
        difference = paired.accuracy_difference
        overall = GateCheck(
            name=name,
            passed=True,
            value=difference.value,
            low=difference.low,
            high=difference.high,
            limit=-margin,
            detail=f"the model is {comparison.name}, byte for byte",
        )
    else:
        check = non_inferior(paired.correct, paired.reference_correct, margin, params.confidence, name)
        overall = check.model_copy(update={"detail": f"against {comparison.name}: {check.detail}"})
    return [overall, *_class_checks(evaluation, params), *_slice_checks(evaluation, params)]


def _class_checks(evaluation: Evaluation, params: ModelEvaluationParams) -> list[GateCheck]:
    checks = []
    for index, label in enumerate(evaluation.labels):
        name, margin = f"class {label} recall drop", params.max_class_recall_drop
        if evaluation.paired is None:
            checks.append(not_judged(name, _reason(evaluation), limit=-margin))
        elif label not in evaluation.comparison.labels:
            checks.append(not_judged(name, f"{evaluation.comparison.name} does not know this class", limit=-margin))
        else:
            inside = evaluation.data.truth == index
            checks.append(_drop(evaluation.paired, inside, margin, params.confidence, name))
    return checks


def _slice_checks(evaluation: Evaluation, params: ModelEvaluationParams) -> list[GateCheck]:
    checks = []
    for part, _ in evaluation.slices:
        name, margin = f"{part.kind} {part.name} accuracy drop", params.max_slice_accuracy_drop
        if evaluation.paired is None:
            checks.append(not_judged(name, _reason(evaluation), limit=-margin))
            continue
        check = _drop(evaluation.paired, part.inside, margin, params.confidence, name)
        images = int(part.inside[evaluation.paired.rows].sum())
        if images < params.min_slice_images:
            detail = f"{images} images, {params.min_slice_images} needed to judge"
            check = check.model_copy(update={"judged": False, "passed": True, "detail": detail})
        checks.append(check)
    return checks


def _drop(paired: Paired, inside: BoolArray, margin: float, confidence: float, name: str) -> GateCheck:
    group = np.asarray(inside)[paired.rows]
    return no_clear_drop(paired.correct[group], paired.reference_correct[group], margin, confidence, name)


def _reason(evaluation: Evaluation) -> str:
    return NO_CHAMPION if evaluation.comparison.kind == "none" else "no image to compare on"


def _why_not_compared(evaluation: Evaluation) -> str:
    comparison = evaluation.comparison
    if len(comparison.labels) < 2:
        lost = ", ".join(comparison.reference_only)
        return (
            f"{comparison.name} knows other classes ({lost}), so there is nothing to compare; "
            "register another problem under another model_name"
        )
    return (
        f"no test image is left to compare on: {comparison.name} was trained on {comparison.seen:,} of "
        f"{len(evaluation.data):,}; keep the splits as they were, or bring new images"
    )
