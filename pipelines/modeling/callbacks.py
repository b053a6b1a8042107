"""What happens at the end of an epoch: measure, remember the best, stop early, leave a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from pipelines.errors import Refusal, TryLater
from pipelines.modeling.lit_module import ClassifierLitModule

MONITORED = "val/loss"
FINGERPRINT_KEY = "perch_fingerprint"
# Until batch statistics (0.9**50 of their beginning is left) and averaged weights follow the network.  With 4 steps an
# epoch, val/loss grew for 5 epochs while train/loss fell, and then dropped to a tenth.
_SETTLING_STEPS = 50


class EpochHistory(pl.Callback):
    """Keeps each epoch's metrics and the weights of the best, and stops when it has not improved for a while.

    Patience is not counted in the first 50 steps, whose measurements say little: on few images those are many epochs.

    Its whole state is in the checkpoint, so that a resumed training stops at the same epoch with the same weights.
    It must stand before weight averaging in the list of callbacks: the averaged weights are in place while it looks.

    Attributes:
        records: one dictionary per finished epoch, `split/name` to value.
        best_epoch: 1-based epoch with the lowest val/loss; 0 before the first.
        best_weights: the network's state dict after that epoch.
        unsettled_epochs: that ended within those steps.
    """

    def __init__(self, patience_epochs: int) -> None:
        self._patience = patience_epochs
        self.records: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}
        self.unsettled_epochs = 0

    @property
    def latest(self) -> dict[str, float]:
        """The last epoch's metrics."""
        return self.records[-1]

    @property
    def best(self) -> dict[str, float]:
        """The best epoch's metrics."""
        return self.records[self.best_epoch - 1]

    @property
    def out_of_patience(self) -> bool:
        """Whether the last epochs brought nothing better."""
        return len(self.records) - max(self.best_epoch, self.unsettled_epochs) >= self._patience

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Stop at once when the killed training had already decided to."""
        trainer.should_stop = self.out_of_patience and bool(self.records)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the epoch.

        Raises:
            Refusal: a loss is not a finite number.
        """
        if not isinstance(pl_module, ClassifierLitModule):
            raise TypeError(f"{type(pl_module).__name__} measures no epochs")
        metrics = pl_module.epoch_metrics()
        epoch = len(self.records) + 1
        for name in ("train/loss", MONITORED):
            if not math.isfinite(metrics[name]):
                raise Refusal(
                    f"{name} of epoch {epoch}",
                    metrics[name],
                    limit=f"a finite number; the learning rate ended at {metrics['lr']:.3g}",
                    way_out="lower model_training.learning_rate, or use precision 32-true",
                )
        self.records.append(metrics)
        if trainer.global_step < _SETTLING_STEPS:
            self.unsettled_epochs = epoch
        if self.best_epoch == 0 or metrics[MONITORED] < self.best[MONITORED]:
            self.best_epoch = epoch
            state = pl_module.network.state_dict()
            self.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        trainer.should_stop = trainer.should_stop or self.out_of_patience

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "records": self.records,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
            "unsettled_epochs": self.unsettled_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.records = list(state_dict["records"])
        self.best_epoch = state_dict["best_epoch"]
        self.best_weights = dict(state_dict["best_weights"])
        self.unsettled_epochs = state_dict["unsettled_epochs"]


class EpochCheckpoint(pl.Callback):
    """Leaves the whole state of the training after every epoch, in one file that is replaced at once.

    It must stand last in the list of callbacks, so that it saves what the others have done.

    Args:
        path: the checkpoint.
        fingerprint: of everything that the training is a function of; see `find_checkpoint`.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write beside the old checkpoint, then replace it.

        Raises:
            TryLater: the disk is full or the folder is not writable.
        """
        temporary = self._path.with_suffix(".partial")
        try:
            if trainer.is_global_zero:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(temporary)  # every rank calls it, the first alone writes
            if trainer.is_global_zero:
                temporary.replace(self._path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TryLater(f"the checkpoint {self._path} could not be written: {error}") from error

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Say what the checkpoint belongs to."""
        checkpoint[FINGERPRINT_KEY] = self._fingerprint


def find_checkpoint(path: Path, fingerprint: str) -> Path | None:
    """The checkpoint to go on from, or None where there is none, it is torn, or it belongs to another training."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  whatever is wrong with the file, training from the start gives the same weights
        return None
    return path if checkpoint.get(FINGERPRINT_KEY) == fingerprint else None


class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and batch statistics; it is what gets validated and kept.

    The decay grows as `(1 + n) / (10 + n)` up to its value, so that a short training does not average in its beginning
    (Tan and Le 2019, arXiv 1905.11946, in TensorFlow's form).

    Args:
        decay: share of the old average that one step keeps, e.g. 0.999.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
            kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
            if not averaged.is_floating_point():
                return current
            return averaged + (current - averaged) * (1 - kept)  # exact for constants, unlike a weighted sum

        super().__init__(use_buffers=True, avg_fn=average)
