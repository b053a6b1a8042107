"""One epoch of Perch's training against the same network, optimiser and data in a bare PyTorch loop.

Run with `python benchmarks/training_epoch.py`.  Both take turns in one process; an epoch is a pass over the training
images and a validation.  The ratio of the medians must not be above 1.15 without augmentation, which the bare loop does
not have.  Seconds are of the clock; seconds of the processor stand beside them, for machines that do other things too.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a run: threads that spin while they wait disturb each other

import numpy as np
import pytorch_lightning as pl
import torch
from torch.nn import functional

from pipelines.core.contract import InputContract, ModelContract
from pipelines.modeling.network_factory import build_network
from pipelines.modeling.optimizers import optimizer_factory
from pipelines.modeling.training import train
from pipelines.modeling.training_data import LabelledImages, TrainingData
from pipelines.params import AugmentationParams, ModelTrainingParams

LIMIT = 1.15
WARM_UP_EPOCHS = 1
PLAIN = AugmentationParams(shift=0.0, rotation_deg=0.0, scale=0.0, contrast=0.0, brightness=0.0)

Times = list[tuple[float, float]]
"""Of each epoch: seconds of the clock, seconds of the processor."""


class EpochClock(pl.Callback):
    """Looks at both clocks at the start of each epoch and at the end of the last."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_epoch_start(self, *_: object) -> None:
        """Look."""
        self.marks.append(look())

    def on_train_end(self, *_: object) -> None:
        """Look."""
        self.marks.append(look())


def look() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def make_data(images: int, size_px: int) -> TrainingData:
    """Noise in two classes: the time of a step does not depend on what is in the pictures."""
    draw = np.random.default_rng(0)

    def split(count: int) -> LabelledImages:
        pixels = draw.integers(0, 256, (count, size_px, size_px, 1), dtype=np.uint8)
        return LabelledImages(pixels, draw.integers(0, 2, count))

    contract = ModelContract(input=InputContract(size_px=size_px, channels=1, resize="squash"), labels=("no", "yes"))
    return TrainingData(split(images), split(images // 8), contract, (127.5,), (73.9,), np.ones(2, dtype=np.float32))


def time_perch(data: TrainingData, params: ModelTrainingParams) -> Times:
    """Each epoch after the warm-up."""
    clock = EpochClock()
    train(data, params, seed=0, observers=[clock])
    return differences(clock.marks)


def time_bare(data: TrainingData, params: ModelTrainingParams) -> Times:
    """Each epoch after the warm-up, in the loop one would write by hand."""
    network = build_network(params, data, 0)
    steps_per_epoch = -(-len(data.train) // params.batch_size)
    optimizer, schedule = optimizer_factory(params)(network, params.epochs * steps_per_epoch)
    marks = [look()]
    for _ in range(params.epochs):
        network.train()
        for images, labels in batches(data.train, params.batch_size, torch.randperm(len(data.train)).numpy()):
            loss = functional.cross_entropy(network(images), labels, label_smoothing=params.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            for images, labels in batches(data.val, params.batch_size, np.arange(len(data.val))):
                functional.cross_entropy(network(images), labels)
        marks.append(look())
    return differences(marks)


def batches(split: LabelledImages, size: int, order: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield torch.from_numpy(split.images[rows]), torch.from_numpy(split.labels[rows])


def differences(marks: list[tuple[float, float]]) -> Times:
    epochs = itertools.pairwise(marks[WARM_UP_EPOCHS:])
    return [(after[0] - before[0], after[1] - before[1]) for before, after in epochs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048, help="in the training split")
    parser.add_argument("--size-px", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="timed in each round")
    options = parser.parse_args()
    data = make_data(options.images, options.size_px)
    plain = ModelTrainingParams(epochs=options.epochs + WARM_UP_EPOCHS, patience_epochs=1000, augmentation=PLAIN)
    augmented = plain.model_copy(update={"augmentation": AugmentationParams()})
    contenders = {
        "bare PyTorch": lambda: time_bare(data, plain),
        "Perch": lambda: time_perch(data, plain),
        "Perch with augmentation": lambda: time_perch(data, augmented),
    }
    times: dict[str, Times] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            times[name] += contender()
    clock, processor = (
        {name: statistics.median(epoch[which] for epoch in epochs) for name, epochs in times.items()}
        for which in (0, 1)
    )
    print(
        f"medians of an epoch of {options.images} images of {options.size_px} px on {torch.get_num_threads()} threads"
    )
    for name in contenders:
        against = clock[name] / clock["bare PyTorch"], processor[name] / processor["bare PyTorch"]
        print(
            f"  {name:<24} {clock[name]:7.3f} s  x {against[0]:.3f}   cpu {processor[name]:7.3f} s  x {against[1]:.3f}"
        )
    ratio = clock["Perch"] / clock["bare PyTorch"]
    print(f"  ratio {ratio:.3f}, limit {LIMIT}")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
