"""What training reads: the arrays of `data/splits` and the constants of `data/features`."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipelines.core.contract import ModelContract
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal


@dataclass(frozen=True)
class LabelledImages:
    """One split.

    Attributes:
        images: uint8 `(N, H, W, C)`, usually a read-only memory map.
        labels: int64 `(N,)`, indices into the contract's labels.
    """

    images: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Callable[..., LabelledImages], tuple[Any, ...]]:
        """Travel to another process as the file's name where the images are a memory map, and not as its content."""
        images: Any = self.images
        base: object = images.base
        if isinstance(images, np.memmap) and isinstance(base, mmap.mmap):  # and no view of one
            place = (str(images.filename), images.dtype.str, images.offset, images.shape)
            return _map_again, (place, self.labels)
        return LabelledImages, (images, self.labels)


def _map_again(place: tuple[str, str, int, tuple[int, ...]], labels: np.ndarray[Any, Any]) -> LabelledImages:
    file, dtype, offset, shape = place
    return LabelledImages(np.memmap(file, dtype, "r", offset, shape), labels)


@dataclass(frozen=True)
class TrainingData:
    """The training and validation splits with what was computed from the former.

    Attributes:
        train: what the weights are fitted to.
        val: what decides when to stop.
        contract: the classes and the shape of an image.
        mean: per channel, 0-255.
        std: per channel, 0-255, above 0.
        class_weights: float32 `(classes,)`, in the order of the contract's labels.
    """

    train: LabelledImages
    val: LabelledImages
    contract: ModelContract
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_weights: np.ndarray[Any, np.dtype[np.float32]]


def load_training_data(workspace: Workspace) -> TrainingData:
    """Open the splits as memory maps.

    Raises:
        Refusal: a class has no image in the training split, or the arrays and the table of images disagree.
    """
    contract = ModelContract.model_validate_json((workspace.splits / "contract.json").read_text(encoding="utf-8"))
    statistics = json.loads((workspace.features / "statistics.json").read_text(encoding="utf-8"))
    table = pd.read_parquet(workspace.splits / "images.parquet", columns=["used_split", "row", "label_index"])
    train, val = (_load_split(workspace, table, split) for split in ("train", "val"))
    counts = np.bincount(train.labels, minlength=len(contract.labels))
    if missing := [label for label, count in zip(contract.labels, counts, strict=True) if count == 0]:
        raise Refusal(
            "the training split",
            f"holds no image of {', '.join(missing)}",
            limit="at least one image of each class",
            way_out="bring more images of that class, or leave the class out",
        )
    return TrainingData(
        train,
        val,
        contract,
        mean=tuple(statistics["mean"]),
        std=tuple(max(float(value), 1e-3) for value in statistics["std"]),
        class_weights=np.array([statistics["class_weights"][label] for label in contract.labels], dtype=np.float32),
    )


def _load_split(workspace: Workspace, table: pd.DataFrame, split: str) -> LabelledImages:
    images = np.load(workspace.splits / f"{split}.npy", mmap_mode="r")
    rows = table[table["used_split"] == split].sort_values("row")
    if len(rows) != len(images):
        raise Refusal(
            f"data/splits/{split}.npy",
            f"{len(images)} images",
            limit=f"{len(rows)}, the rows of data/splits/images.parquet",
            way_out="run data_preprocessing again",
        )
    return LabelledImages(images, rows["label_index"].to_numpy(np.int64))
