"""Training one network: Lightning with everything injected, resumable at every epoch, equal bytes for equal inputs."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
    SIGTERMException,
)
from torch import nn

from pipelines.errors import Refusal
from pipelines.modeling.augmentation import augmentation_for
from pipelines.modeling.callbacks import EpochCheckpoint, EpochHistory, MovingAverage, find_checkpoint
from pipelines.modeling.data_module import ImageDataModule
from pipelines.modeling.lit_module import ClassifierLitModule, Loss
from pipelines.modeling.network_factory import build_network
from pipelines.modeling.optimizers import optimizer_factory
from pipelines.modeling.training_data import TrainingData
from pipelines.params import ModelTrainingParams


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        network: on the CPU, in evaluation mode, with the weights of the best epoch.
        history: every epoch's metrics, and which was best.
        epochs: that were allowed.
    """

    network: nn.Module
    history: EpochHistory
    epochs: int

    @property
    def stopped_early(self) -> bool:
        """Whether patience ran out before the epochs did."""
        return len(self.history.records) < self.epochs


@dataclass(frozen=True)
class Resumption:
    """Where a training leaves its checkpoint, and what the checkpoint is a function of."""

    path: Path
    fingerprint: str


def train(
    data: TrainingData,
    params: ModelTrainingParams,
    *,
    seed: int,
    resumption: Resumption | None = None,
    observers: Sequence[pl.Callback] = (),
    history: EpochHistory | None = None,
) -> Training:
    """Train until the epochs or the patience run out, and return the best epoch's network.

    On one kind of CPU with one number of threads, equal arguments give equal weights, bit for bit, however often the
    training was killed and started again.

    Args:
        data: images and constants.
        params: network, optimiser, augmentation, epochs.
        seed: of the initial weights, the order of images, augmentation and dropout.
        resumption: where to go on from; None keeps nothing.
        observers: callbacks that watch, e.g. progress; they see `history` already updated at `on_train_epoch_end`.
        history: to share with observers; by default a new one.

    Raises:
        Refusal: the loss became NaN or infinite, the network cannot be built, or there is no such accelerator.
        TryLater: a checkpoint could not be written.
    """
    history = history or EpochHistory(params.patience_epochs)
    network = build_network(params, data, seed)
    lit_module = ClassifierLitModule(
        network,
        loss=Loss(
            torch.from_numpy(data.class_weights) if params.class_weights else torch.ones(len(data.contract.labels)),
            params.label_smoothing,
        ),
        optimizer_factory=optimizer_factory(params),
        augmentation=augmentation_for(params.augmentation),
        seed=seed,
    )
    callbacks: list[pl.Callback] = [history]
    if params.weight_averaging:
        callbacks.append(MovingAverage(params.weight_averaging))
    callbacks += observers
    if resumption is not None:
        callbacks.append(EpochCheckpoint(resumption.path, resumption.fingerprint))
    with _quiet_lightning(), _restoring_determinism(), _honest_exit_codes():
        trainer = _make_trainer(params, callbacks)
        checkpoint = find_checkpoint(resumption.path, resumption.fingerprint) if resumption else None
        data_module = ImageDataModule(data, batch_size=params.batch_size, seed=seed)
        trainer.fit(lit_module, data_module, ckpt_path=checkpoint, weights_only=True)
    network.cpu().load_state_dict(history.best_weights)
    return Training(network.eval(), history, params.epochs)


def _make_trainer(params: ModelTrainingParams, callbacks: list[pl.Callback]) -> pl.Trainer:
    try:
        return pl.Trainer(
            max_epochs=params.epochs,
            accelerator=params.accelerator,
            devices=1,
            precision=params.precision,
            deterministic=_deterministic(params.accelerator),
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,  # EpochCheckpoint does it: one file, atomic, with its fingerprint
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise Refusal(
            f"model_training.accelerator {params.accelerator} with precision {params.precision}",
            f"not possible here: {error}",
            way_out="use accelerator auto and precision 32-true",
        ) from error


def _deterministic(accelerator: str) -> Literal["warn", True]:
    """Strict on CPUs; a warning on GPUs, where some networks have operations without a deterministic kernel."""
    on_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    return "warn" if on_gpu else True


@contextmanager
def _honest_exit_codes() -> Iterator[None]:
    """Ended from outside, say so: Lightning would exit with code 0 after a SIGTERM, and with 1 after Ctrl-C."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as ending:
        if not isinstance(ending.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from None


@contextmanager
def _restoring_determinism() -> Iterator[None]:
    """Lightning turns deterministic algorithms on for the whole process; leave it as it was.

    PyTorch then also fills fresh memory with NaN, to show reads of what was never written: a twentieth of the time.
    """
    memory: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's advice and notices out of the log; errors still come as exceptions."""
    names = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\b")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
