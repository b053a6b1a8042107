"""Train with Lightning, tune where asked, export to ONNX, and check the export against PyTorch.

A killed training goes on from its last whole epoch, killed tuning from its last whole trial, and both end with the
same weights.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from pipelines.core.results import StageResult, write_json
from pipelines.core.workspace import Workspace
from pipelines.params import ModelTrainingParams, Params

if TYPE_CHECKING:
    from pipelines.modeling.live_run import LiveRun
    from pipelines.modeling.training import Training
    from pipelines.modeling.training_data import TrainingData

_PARITY_IMAGES = 256


class Int8Record(BaseModel):
    """What came of the int8 variant; how much faster it is depends on the machine and stands in the log alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kept: bool
    reason: str
    accuracy_difference: float | None = None
    accuracy_difference_low: float | None = None


class TrainingRecord(BaseModel):
    """`model/training.json`: how the model came about, for the model card and the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str
    parameters: int
    weights_sha256: str
    onnx_sha256: str
    best_epoch: int
    epochs_run: int
    stopped_early: bool
    temperature: float
    parity_max_difference: float
    parity_images: int
    torch_threads: int
    hyperparameters: dict[str, float]
    int8: Int8Record


class ModelTrainingResult(StageResult):
    """What a finished training says."""

    weights_sha256: str = Field(description="Of all weights; equal for equal data, parameters, code and threads.")
    onnx_sha256: str = Field(description="Of model/model.onnx.")


def run(params: Params, workspace: Workspace) -> ModelTrainingResult:
    """Tune, train, export, check.

    Raises:
        Refusal: the data cannot be trained on, the loss diverged, or the export is not the trained network.
        TryLater: the disk is full.
    """
    from pipelines.modeling.live_run import LiveRun
    from pipelines.modeling.training_data import load_training_data

    data = load_training_data(workspace)
    shutil.rmtree(workspace.model, ignore_errors=True)  # what a killed attempt may have left
    workspace.model.mkdir(parents=True)
    with LiveRun.from_environment() as live_run:
        settings, hyperparameters = _tune(params, workspace, data, live_run)
        training = _train(params, settings, workspace, data, live_run)
    record = _export(params, workspace, data, training, hyperparameters)
    shutil.rmtree(workspace.checkpoints, ignore_errors=True)
    best = training.history.best
    return ModelTrainingResult(
        summary=_summarise(record, training.epochs, best["val/accuracy"]),
        metrics={
            "train/loss": best["train/loss"],
            "val/loss": best["val/loss"],
            "val/accuracy": best["val/accuracy"],
            "model/parameters": record.parameters,
            "model/parity_difference": record.parity_max_difference,
        },
        weights_sha256=record.weights_sha256,
        onnx_sha256=record.onnx_sha256,
    )


def _tune(
    params: Params, workspace: Workspace, data: TrainingData, live_run: LiveRun
) -> tuple[ModelTrainingParams, dict[str, float]]:
    """The parameters to train with, and which of them tuning chose."""
    from pipelines.modeling.tuning import read_trials, tune, write_trials

    settings = params.model_training
    if settings.trials == 0:
        return settings, {}
    tuning = tune(
        data,
        settings,
        seed=params.seed,
        folder=workspace.checkpoints,
        fingerprint=_fingerprint(params, settings, workspace),
        live_run=live_run,
        given=read_trials(workspace.tuning / "trials.json"),
    )
    write_trials(workspace.model / "trials.csv", settings, tuning.trials)
    return tuning.params, tuning.hyperparameters


def _train(
    params: Params, settings: ModelTrainingParams, workspace: Workspace, data: TrainingData, live_run: LiveRun
) -> Training:
    """Train, watched, and write the curves."""
    from pipelines.modeling.callbacks import EpochHistory
    from pipelines.modeling.curves import write_curves
    from pipelines.modeling.live_run import LiveCurves
    from pipelines.modeling.progress import TrainingProgress
    from pipelines.modeling.training import Resumption, train

    history = EpochHistory(settings.patience_epochs)
    training = train(
        data,
        settings,
        seed=params.seed,
        resumption=Resumption(workspace.checkpoints / "training.ckpt", _fingerprint(params, settings, workspace)),
        observers=[TrainingProgress(history, len(data.train)), LiveCurves(live_run, history)],
        history=history,
    )
    write_curves(workspace.model / "curves.csv", history.records)
    return training


def _export(
    params: Params, workspace: Workspace, data: TrainingData, training: Training, hyperparameters: dict[str, float]
) -> TrainingRecord:
    """Write the ONNX file, hold it against PyTorch, try int8, and record it all."""
    import hashlib

    import torch

    from pipelines.modeling.export import compute_logits, export_onnx, measure_parity, refuse_disparity
    from pipelines.modeling.temperature import fit_temperature
    from pipelines.modeling.weights import hash_weights

    onnx_file = workspace.model / "model.onnx"
    temperature = 1.0
    if params.model_training.temperature_scaling:
        temperature = fit_temperature(compute_logits(training.network, data.val.images), data.val.labels)
    export_onnx(training.network, data.contract, onnx_file, temperature=temperature)
    parity_images = data.val.images[:_PARITY_IMAGES]
    difference = measure_parity(training.network, onnx_file, parity_images, temperature=temperature)
    refuse_disparity(difference, params.model_training.max_parity_difference)
    record = TrainingRecord(
        network=params.model_training.network,
        parameters=sum(parameter.numel() for parameter in training.network.parameters()),
        weights_sha256=hash_weights(training.network),
        onnx_sha256=hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
        best_epoch=training.history.best_epoch,
        epochs_run=len(training.history.records),
        stopped_early=training.stopped_early,
        temperature=temperature,
        parity_max_difference=difference,
        parity_images=len(parity_images),
        torch_threads=torch.get_num_threads(),
        hyperparameters=hyperparameters,
        int8=_try_int8(params, workspace, data),
    )
    write_json(workspace.model / "training.json", record.model_dump(mode="json"))
    return record


def _try_int8(params: Params, workspace: Workspace, data: TrainingData) -> Int8Record:
    from rich.console import Console

    from pipelines.modeling.quantization import QuantizationLimits, try_int8

    settings, gate = params.model_training, params.model_evaluation
    if not settings.int8:
        return Int8Record(kept=False, reason="not asked for")
    limits = QuantizationLimits(settings.min_int8_speedup, gate.max_accuracy_drop, gate.confidence)
    model, target = workspace.model / "model.onnx", workspace.model / "model_int8.onnx"
    outcome = try_int8(model, target, data, limits, seed=params.seed)
    kept = "kept" if outcome.kept else f"not kept: {outcome.reason}"
    Console(stderr=True).print(f"  int8 {outcome.speedup:.2f} times as fast, {kept}", highlight=False, soft_wrap=True)
    return Int8Record(
        kept=outcome.kept,
        reason=outcome.reason,
        accuracy_difference=outcome.check.value,
        accuracy_difference_low=outcome.check.low,
    )


def _fingerprint(params: Params, settings: ModelTrainingParams, workspace: Workspace) -> str:
    """What checkpoints of this training are a function of."""
    from pipelines.modeling.fingerprint import fingerprint_training

    given = workspace.tuning / "trials.json"
    trials = given.read_text(encoding="utf-8") if given.is_file() else ""
    return fingerprint_training(
        f"{params.seed} {settings.model_dump_json()} {trials}", workspace.splits, workspace.features
    )


def _summarise(record: TrainingRecord, epochs: int, accuracy: float) -> str:
    """How long it trained and which epoch's weights are kept; they are rarely the last one's."""
    trained = f"stopped after epoch {record.epochs_run} of {epochs}" if record.stopped_early else f"{epochs} epochs"
    return f"{trained}, best {record.best_epoch}, val/accuracy {accuracy:.3f}"
