"""Training one network: Lightning with everything injected, resumable at every epoch, equal bytes for equal inputs."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
    SIGTERMException,
)
from torch import nn

from pipelines.core.free_ports import any_free_port
from pipelines.errors import Refusal
from pipelines.modeling.augmentation import augmentation_for
from pipelines.modeling.callbacks import EpochCheckpoint, EpochHistory, MovingAverage, find_checkpoint
from pipelines.modeling.data_module import ImageDataModule
from pipelines.modeling.lit_module import ClassifierLitModule, Loss
from pipelines.modeling.network_factory import build_network
from pipelines.modeling.optimizers import optimizer_factory
from pipelines.modeling.preconditions import refuse_missing_cores
from pipelines.modeling.ranks import EndAtOnce, LocalRanks, Rank, RankJob, other_ranks
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

    With `devices` above 1, so many processes each train on a part of every batch (PyTorch's DistributedDataParallel).
    The loss and its gradient are those of the whole batch; each process normalises its part by itself where the network
    normalises batches, and has augmentation and dropout of its own, so that the weights are others than with one.

    Args:
        data: images and constants.
        params: network, optimiser, augmentation, epochs.
        seed: of the initial weights, the order of images, augmentation and dropout.
        resumption: where to go on from; None keeps nothing.
        observers: callbacks that watch, e.g. progress; they see `history` already updated at `on_train_epoch_end`.
        history: to share with observers; by default a new one.

    Raises:
        Refusal: the loss became NaN or infinite, the network cannot be built, there is no such accelerator, or the
            batches are too small for so many processes.
        TryLater: a checkpoint could not be written, or one of several processes was ended from outside.
    """
    _refuse_small_shares(data, params)
    history = history or EpochHistory(params.patience_epochs)
    with _quiet_lightning(), _restoring_determinism(), _honest_exit_codes():
        job = RankJob(
            data,
            params,
            seed,
            checkpoint=find_checkpoint(resumption.path, resumption.fingerprint) if resumption else None,
            fingerprint=resumption.fingerprint if resumption else None,
            threads=max(1, torch.get_num_threads() // params.devices),
            rank=Rank(0, params.devices, any_free_port() if params.devices > 1 else 0),
        )
        with other_ranks(job) if params.devices > 1 else nullcontext():
            network = _fit(job, history, observers, resumption.path if resumption else None)
    network.cpu().load_state_dict(history.best_weights)
    return Training(network.eval(), history, params.epochs)


def train_along(job: RankJob) -> None:
    """Do the part of a training that falls to a rank above 0.

    Raises:
        Refusal: as `train`; every rank meets it.
    """
    with _quiet_lightning(), _restoring_determinism():
        path = None if job.fingerprint is None else Path(os.devnull)  # only rank 0 writes the checkpoint
        _fit(job, EpochHistory(job.params.patience_epochs), (), path)


def _fit(job: RankJob, history: EpochHistory, observers: Sequence[pl.Callback], checkpoint: Path | None) -> nn.Module:
    """Train as one of the ranks; the network as it is at the end.

    Args:
        job: what to train, and as which rank.
        history: gets the epochs.
        observers: callbacks that watch.
        checkpoint: file to leave after each epoch; every rank must have one, or none.
    """
    data, params, seed = job.data, job.params, job.seed
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
    if checkpoint is not None:
        callbacks.append(EpochCheckpoint(checkpoint, job.fingerprint or ""))
    trainer = _make_trainer(params, callbacks, job.rank)
    data_module = ImageDataModule(
        data, batch_size=params.batch_size, seed=seed, rank=job.rank.number, world=job.rank.world
    )
    trainer.fit(lit_module, data_module, ckpt_path=job.checkpoint, weights_only=True)
    return network


def _make_trainer(params: ModelTrainingParams, callbacks: list[pl.Callback], rank: Rank) -> pl.Trainer:
    together = rank.world > 1
    try:
        return pl.Trainer(
            max_epochs=params.epochs,
            accelerator=params.accelerator,
            devices=rank.world,
            strategy=DDPStrategy(cluster_environment=LocalRanks(rank)) if together else "auto",
            precision=params.precision,
            deterministic=_deterministic(params.accelerator),
            callbacks=[*callbacks, EndAtOnce()] if together else callbacks,
            logger=False,
            enable_checkpointing=False,  # EpochCheckpoint does it: one file, atomic, with its fingerprint
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        devices = f", devices {rank.world}" if together else ""
        raise Refusal(
            f"model_training.accelerator {params.accelerator} with precision {params.precision}{devices}",
            f"not possible here: {error}",
            way_out="use accelerator auto, precision 32-true" + (" and devices 1" if together else ""),
        ) from error


def _refuse_small_shares(data: TrainingData, params: ModelTrainingParams) -> None:
    """Refuse more processes than there are cores, or than the smallest batch has work for."""
    if params.devices == 1:
        return
    if params.accelerator == "cpu" or not torch.cuda.is_available():
        refuse_missing_cores(params.devices)
    for name, split, needed in (("training", data.train, 2), ("validation", data.val, 1)):
        smallest = len(split) // -(-len(split) // params.batch_size)
        if smallest < needed * params.devices:
            raise Refusal(
                f"model_training.devices {params.devices}",
                f"batches of the {name} split hold {smallest} images",
                limit=f"{needed} for each process",
                way_out="lower model_training.devices, or raise model_training.batch_size",
            )


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
