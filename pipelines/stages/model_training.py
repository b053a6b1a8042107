"""Train with Lightning, tune where asked, export to ONNX, and check the export against PyTorch.

A killed training goes on from its last whole epoch and ends with the same weights.
"""

from __future__ import annotations

import shutil

from pydantic import BaseModel, ConfigDict, Field

from pipelines.core.results import StageResult, write_json
from pipelines.core.workspace import Workspace
from pipelines.params import Params


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
    parity_max_difference: float
    parity_images: int
    torch_threads: int


class ModelTrainingResult(StageResult):
    """What a finished training says."""

    weights_sha256: str = Field(description="Of all weights; equal for equal data, parameters, code and threads.")
    onnx_sha256: str = Field(description="Of model/model.onnx.")


def run(params: Params, workspace: Workspace) -> ModelTrainingResult:
    """Train, export, check.

    Raises:
        Refusal: the data cannot be trained on, the loss diverged, or the export is not the trained network.
        TryLater: the disk is full.
    """
    import hashlib

    import torch

    from pipelines.modeling.curves import write_curves
    from pipelines.modeling.export import export_onnx, measure_parity, refuse_disparity
    from pipelines.modeling.fingerprint import fingerprint_training
    from pipelines.modeling.training import Resumption, train
    from pipelines.modeling.training_data import load_training_data
    from pipelines.modeling.weights import hash_weights

    data = load_training_data(workspace)
    settings = params.model_training
    fingerprint = fingerprint_training(
        f"{params.seed} {settings.model_dump_json()}", workspace.splits, workspace.features
    )
    training = train(
        data, settings, seed=params.seed, resumption=Resumption(workspace.checkpoints / "training.ckpt", fingerprint)
    )
    workspace.model.mkdir(parents=True, exist_ok=True)
    onnx_file = workspace.model / "model.onnx"
    export_onnx(training.network, data.contract, onnx_file)
    parity_images = data.val.images[:256]
    difference = measure_parity(training.network, onnx_file, parity_images)
    refuse_disparity(difference, settings.max_parity_difference)
    write_curves(workspace.model / "curves.csv", training.history.records)
    record = TrainingRecord(
        network=settings.network,
        parameters=sum(parameter.numel() for parameter in training.network.parameters()),
        weights_sha256=hash_weights(training.network),
        onnx_sha256=hashlib.sha256(onnx_file.read_bytes()).hexdigest(),
        best_epoch=training.history.best_epoch,
        epochs_run=len(training.history.records),
        stopped_early=training.stopped_early,
        parity_max_difference=difference,
        parity_images=len(parity_images),
        torch_threads=torch.get_num_threads(),
    )
    write_json(workspace.model / "training.json", record.model_dump(mode="json"))
    shutil.rmtree(workspace.checkpoints, ignore_errors=True)
    best = training.history.best
    return ModelTrainingResult(
        summary=_summarise(record, training.epochs, best["val/accuracy"]),
        metrics={
            "train/loss": best["train/loss"],
            "val/loss": best["val/loss"],
            "val/accuracy": best["val/accuracy"],
            "model/parameters": record.parameters,
            "model/parity_difference": difference,
        },
        weights_sha256=record.weights_sha256,
        onnx_sha256=record.onnx_sha256,
    )


def _summarise(record: TrainingRecord, epochs: int, accuracy: float) -> str:
    stopped = ", stopped early" if record.stopped_early else ""
    return f"epoch {record.best_epoch} of {epochs}{stopped}, val/accuracy {accuracy:.3f}"
