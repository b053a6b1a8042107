"""Measure the exported model with intervals, compare it with the champion, give a verdict and a model card.

The stage succeeds whatever the verdict is, so that the evidence is kept; `model_registration` refuses a model that did
not pass.
"""

from __future__ import annotations

import shutil
from functools import partial

from pydantic import Field

from pipelines.core.gates import Verdict
from pipelines.core.hash_chain import canonical_json, sha256_text
from pipelines.core.metrics import Scores
from pipelines.core.results import StageResult, write_json
from pipelines.core.statistics import Interval, Uncertainty
from pipelines.core.workspace import Workspace
from pipelines.params import Params

MODEL_CARD = "evaluation/model_card.html"
_NAMED_FAILURES = 3


class ModelEvaluationResult(StageResult):
    """The verdict and the numbers behind it."""

    passed: bool = Field(description="Whether the model may be registered.")
    evidence_sha256: str = Field(description="Of metrics, verdict and the model's file together.")


def run(params: Params, workspace: Workspace) -> ModelEvaluationResult:
    """Write `evaluation/`.

    Raises:
        Refusal: the test split is empty, the model or the reference cannot be used, or an answer is no probability.
    """
    import pyarrow.parquet as pq

    from pipelines.core.file_hash import hash_file
    from pipelines.data.progress import ImageProgress
    from pipelines.data.shards import read_images
    from pipelines.modeling.card_facts import read_data_change, read_model_facts, read_suite_facts
    from pipelines.modeling.comparison import compare
    from pipelines.modeling.evaluation import evaluate, metrics_tree, predictions_table
    from pipelines.modeling.evaluation_data import load_evaluation_data
    from pipelines.modeling.inference import OnnxPredictor
    from pipelines.modeling.model_card import ModelCard
    from pipelines.modeling.verdict import judge

    limits = params.model_evaluation
    model_file = workspace.model / "model.onnx"
    data = load_evaluation_data(workspace)
    originals = partial(read_images, workspace.raw)
    comparison = compare(data, model_file, workspace.reference, originals, ImageProgress)
    how = Uncertainty(limits.confidence, limits.bootstrap_samples, params.seed)
    evaluation = evaluate(OnnxPredictor(model_file), data, comparison, how, ImageProgress)
    verdict = judge(evaluation, limits)
    metrics = metrics_tree(evaluation)
    onnx_sha256 = hash_file(model_file)
    evidence_sha256 = sha256_text(
        canonical_json({"metrics": metrics, "verdict": verdict.model_dump(mode="json"), "onnx_sha256": onnx_sha256})
    )
    card = ModelCard(
        model_name=params.model_name,
        dataset=params.dataset,
        evaluation=evaluation,
        verdict=verdict,
        data=read_data_change(workspace),
        model=read_model_facts(workspace.model, onnx_sha256),
        suites=read_suite_facts(workspace.validation),
        evidence_sha256=evidence_sha256,
        worst_errors=limits.worst_errors,
    )
    shutil.rmtree(workspace.evaluation, ignore_errors=True)
    figures_dir = workspace.evaluation / "figures"
    figures_dir.mkdir(parents=True)
    figures = card.figures()
    for name, png in figures.items():
        (figures_dir / name).write_bytes(png)
    pq.write_table(predictions_table(evaluation), workspace.evaluation / "predictions.parquet", compression="zstd")
    write_json(workspace.evaluation / "metrics.json", metrics)
    write_json(workspace.evaluation / "verdict.json", verdict.model_dump(mode="json"))
    (workspace.evaluation / "model_card.html").write_text(card.render_html(figures), encoding="utf-8")
    (workspace.evaluation / "model_card.md").write_text(card.render_markdown(), encoding="utf-8")
    difference = {"test/accuracy_difference": evaluation.paired.accuracy_difference} if evaluation.paired else {}
    return ModelEvaluationResult(
        summary=_summarise(evaluation.scores.accuracy, limits.min_accuracy, verdict),
        metrics=_flatten({**_named(evaluation.scores), **difference})
        | {
            "test/images": float(len(data)),
            "gate/passed": float(verdict.passed),
            "gate/checks_failed": float(len(verdict.failed)),
        },
        reports={"Model card": MODEL_CARD},
        passed=verdict.passed,
        evidence_sha256=evidence_sha256,
    )


def _summarise(accuracy: Interval, floor: float, verdict: Verdict) -> str:
    text = f"accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}], floor {floor:g}"
    if verdict.passed:
        return f"{text}, passed"
    names = [check.name for check in verdict.failed]
    more = f" and {len(names) - _NAMED_FAILURES} more" if len(names) > _NAMED_FAILURES else ""
    return f"{text}, not passed: {', '.join(names[:_NAMED_FAILURES])}{more}"


def _named(scores: Scores) -> dict[str, Interval]:
    intervals = {
        "accuracy": scores.accuracy,
        "precision": scores.precision,
        "recall": scores.recall,
        "f1": scores.f1,
        "roc_auc": scores.roc_auc,
        "calibration_error": scores.calibration_error,
        "brier": scores.brier,
        "log_loss": scores.log_loss,
    }
    return {f"test/{name}": interval for name, interval in intervals.items() if interval is not None}


def _flatten(intervals: dict[str, Interval]) -> dict[str, float]:
    """Each interval as three metrics: `test/f1`, `test/f1_low`, `test/f1_high`."""
    return {
        f"{name}{suffix}": number
        for name, interval in intervals.items()
        for suffix, number in (("", interval.value), ("_low", interval.low), ("_high", interval.high))
    }
