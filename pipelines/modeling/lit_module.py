"""One training step and one validation step, for any network and any optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.modeling.augmentation import BatchAugmentation
from pipelines.modeling.data_module import Batch
from pipelines.modeling.seeds import derive_seed, generator_at

OptimizerFactory = Callable[[nn.Module, int], tuple[Optimizer, LRScheduler]]
"""From the network and the number of optimiser steps to an optimiser and a schedule that is stepped after each."""


@dataclass(frozen=True)
class Loss:
    """Cross entropy with class weights; smoothed while training, plain while validating.

    Attributes:
        class_weights: float32 `(classes,)`.
        label_smoothing: share of each target that is spread over all classes (Szegedy et al. 2016, arXiv 1512.00567).
    """

    class_weights: Tensor
    label_smoothing: float = 0.0

    def training(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weighted mean over the batch, a scalar."""
        weights = self.class_weights.to(logits.device)
        return functional.cross_entropy(logits, labels, weight=weights, label_smoothing=self.label_smoothing)

    def training_sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a weighted sum and the sum of the weights, for a part of a batch."""
        weights = self.class_weights.to(logits.device)
        total = functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total, weights[labels].sum()

    def validation(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum over the batch and the sum of the weights, so that batches can be added up."""
        weights = self.class_weights.to(logits.device)
        return functional.cross_entropy(logits, labels, weight=weights, reduction="sum"), weights[labels].sum()


class ClassifierLitModule(pl.LightningModule):
    """Trains a classifier; the network, the loss, the optimiser and the augmentation are given.

    Every random number of a step is a function of the seed, the epoch and the batch, so that a training resumed at an
    epoch's end goes on exactly as if it had never stopped.

    Args:
        network: from uint8 or float32 pixels `(N, H, W, C)` to logits.
        loss: what is minimised, and what the best epoch is chosen by.
        optimizer_factory: makes the optimiser and its schedule.
        augmentation: changes training images; None leaves them alone.
        seed: of augmentation and dropout.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Loss,
        optimizer_factory: OptimizerFactory,
        augmentation: BatchAugmentation | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.network = network
        self._loss, self._optimizer_factory, self._augmentation, self._seed = (
            loss,
            optimizer_factory,
            augmentation,
            seed,
        )
        self._train_sums = torch.zeros(2)  # loss times images, images
        self._val_sums = torch.zeros(4)  # loss times weight, weight, right answers, images

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of a batch of pixels."""
        logits: Tensor = self.network(pixels)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Augment, predict, and return the loss."""
        images, labels = batch
        place = (self.current_epoch, batch_idx, *([self.global_rank] if self._ranks > 1 else []))
        torch.manual_seed(derive_seed(self._seed, "dropout", *place))
        if self._augmentation is not None:
            images = self._augmentation(images, generator_at(self._seed, "augment", *place))
        if self._ranks > 1:
            return self._shared_loss(self.network(images), labels)
        loss = self._loss.training(self.network(images), labels)
        self._train_sums[0] += loss.detach() * len(labels)
        self._train_sums[1] += len(labels)
        return loss

    @property
    def _ranks(self) -> int:
        return int(self.trainer.world_size)

    def _shared_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """This rank's part of the whole batch's loss; the gradient that DDP averages over the ranks is the batch's.

        A mean per rank would not do: class weights make each rank's own mean divide by another sum.
        """
        total, weight = self._loss.training_sums(logits, labels)
        sums = torch.stack([weight.detach(), torch.full_like(weight, len(labels))])
        all_weight, all_images = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self._train_sums[0] += total.detach() / all_weight * all_images
        self._train_sums[1] += len(labels)
        shared: Tensor = total / all_weight * self._ranks
        return shared

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Add one batch to the epoch's sums."""
        images, labels = batch
        logits = self.network(images).float()
        loss, weight = self._loss.validation(logits, labels)
        right = (logits.argmax(dim=1) == labels).sum()
        self._val_sums += torch.stack([loss, weight, right.float(), torch.full_like(loss, len(labels))])

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's sums, where the network is: reading them once per epoch keeps a GPU busy."""
        self._train_sums = torch.zeros(2, device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Begin the epoch's sums; every rank measures the weights and batch statistics that rank 0 keeps."""
        self._val_sums = torch.zeros(4, device=self.device)
        if self._ranks > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def epoch_metrics(self) -> dict[str, float]:
        """Means over the epoch that was just trained and validated, and the learning rate it ended with."""
        train_loss, train_images = self._over_ranks(self._train_sums).tolist()
        val_loss, val_weight, right, val_images = self._over_ranks(self._val_sums).tolist()
        return {
            "train/loss": train_loss / train_images,
            "val/loss": val_loss / val_weight,
            "val/accuracy": right / val_images,
            "lr": float(self.trainer.optimizers[0].param_groups[0]["lr"]),
        }

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of all ranks, added in their order, so that every rank gets the same bits."""
        if self._ranks == 1:
            return sums
        gathered = self.all_gather(sums)
        if not isinstance(gathered, Tensor):
            raise TypeError(f"gathered a {type(gathered).__name__}")
        return gathered.sum(dim=0)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Called by Lightning once the number of steps is known."""
        optimizer, schedule = self._optimizer_factory(self.network, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
