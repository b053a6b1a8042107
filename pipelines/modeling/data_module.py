"""Batches straight from the memory-mapped arrays: one slice per batch, no workers, no per-image Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipelines.modeling.seeds import generator_at
from pipelines.modeling.training_data import LabelledImages, TrainingData

Batch = tuple[Tensor, Tensor]


class BatchSampler(Sampler[Any]):
    """Row numbers of each batch, shuffled by a function of the seed and the epoch.

    Batches are as equal in size as they can be, none above `batch_size`: a last batch of one image would break batch
    normalisation.  Lightning calls `set_epoch` before each epoch, also after a resume.

    Of several ranks, each takes its part of every batch: together they take the steps that one would.

    Args:
        images: number of images.
        batch_size: the largest batch, over all ranks.
        seed: of the shuffling; None keeps the order.
        rank: whose part to take.
        world: number of ranks.
    """

    def __init__(self, images: int, batch_size: int, *, seed: int | None, rank: int = 0, world: int = 1) -> None:
        self._images, self._seed, self._epoch = images, seed, 0
        self._rank, self._world = rank, world
        self._batches = -(-images // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        # A generator reads the epoch at the first batch; resuming, Lightning calls `iter` before `set_epoch`.
        order = np.arange(self._images)
        if self._seed is not None:
            order = torch.randperm(self._images, generator=generator_at(self._seed, "shuffle", self._epoch)).numpy()
        for batch in np.array_split(order, self._batches):
            yield np.array_split(batch, self._world)[self._rank]


class ArrayBatches(Dataset[Batch]):
    """A split, indexed by a whole batch of row numbers."""

    def __init__(self, split: LabelledImages) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, rows: Any) -> Batch:
        """Images uint8 `(N, H, W, C)` and labels int64 `(N,)` of the rows."""
        return torch.from_numpy(self._split.images[rows]), torch.from_numpy(self._split.labels[rows])


class ImageDataModule(pl.LightningDataModule):
    """The training and validation splits as Lightning wants them; of several ranks, one rank's part."""

    def __init__(self, data: TrainingData, *, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._rank, self._world = rank, world

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches."""
        return self._loader(self._data.train, self._seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches in the order of the array."""
        return self._loader(self._data.val, None)

    def _loader(self, split: LabelledImages, seed: int | None) -> DataLoader[Batch]:
        sampler = BatchSampler(len(split), self._batch_size, seed=seed, rank=self._rank, world=self._world)
        return DataLoader(ArrayBatches(split), sampler=sampler, batch_size=None)
