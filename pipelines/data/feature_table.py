"""Constants that training needs and the table that drift is measured against, from the arrays of the splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipelines.core.image_features import FEATURES, compute_features, count_levels
from pipelines.core.splitting import SPLITS
from pipelines.data.progress import ImageProgress
from pipelines.errors import Refusal

_BATCH_PIXELS = 2**20  # enough to keep NumPy busy, little enough to stay in the processor's cache


class TrainingStatistics(BaseModel):
    """`data/features/statistics.json`; everything in it comes from the training split alone.

    Attributes:
        mean: per channel, 0-255.
        std: per channel, 0-255.
        class_weights: what one image of a class counts in the loss.
        train_images: how many images that was computed from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: list[float]
    std: list[float]
    class_weights: dict[str, float]
    train_images: int


def weigh_classes(counts: dict[str, int], max_weight: float) -> dict[str, float]:
    """Weights inversely proportional to the classes' frequencies, capped.

    `N / (K * n_class)`, so that with no cap every class counts the same in total and an average image counts 1 (King
    and Zeng, "Logistic Regression in Rare Events Data", 2001).
    """
    total, classes = sum(counts.values()), len(counts)
    return {label: min(total / (classes * count), max_weight) for label, count in sorted(counts.items())}


def write_features(
    splits_dir: Path, labels: Sequence[str], features_dir: Path, max_weight: float
) -> TrainingStatistics:
    """Write `statistics.json` and `features.parquet`, reading each array once, in batches.

    Args:
        splits_dir: `data/splits/`.
        labels: the classes, sorted.
        features_dir: folder to write.
        max_weight: cap on a class's weight.

    Raises:
        Refusal: the training images are all of one flat grey in some channel.
    """
    table = pq.read_table(splits_dir / "images.parquet")
    features_dir.mkdir(parents=True, exist_ok=True)
    parts, levels = [], np.zeros((0, 256), np.int64)
    with ImageProgress("measuring", table.num_rows - pc.sum(pc.equal(table["used_split"], "")).as_py()) as progress:
        for split in SPLITS:
            images = np.load(splits_dir / f"{split}.npy", mmap_mode="r")
            rows = table.filter(pc.equal(table["used_split"], split)).sort_by("row")
            measured = []
            if split == "train":
                levels = np.zeros((images.shape[-1], 256), np.int64)
            for start in range(0, len(images), _batch_size(images)):
                batch = np.asarray(images[start : start + _batch_size(images)])
                measured.append(compute_features(batch))
                if split == "train":
                    levels += count_levels(batch)
                progress.advance(len(batch))
            part = rows.select(["sha256", "used_split", "label", "width_px", "height_px"])
            for name in FEATURES:
                values = [of[name] for of in measured]
                column = np.concatenate(values) if values else np.zeros(0, np.float32)
                part = part.append_column(name, pa.array(column, pa.float32()))
            parts.append(part)
    features = pa.concat_tables(parts)
    mean, std = _moments(levels)
    if min(std) <= 0:
        raise Refusal(
            "the training images",
            f"are all of the same grey, {mean}, in some channel",
            limit="a deviation above 0",
            way_out="look at the images in the source; with data_preprocessing.channels 1 colour is not needed",
        )
    trained = parts[0]["label"].to_pylist()
    statistics = TrainingStatistics(
        mean=mean,
        std=std,
        class_weights=weigh_classes({label: trained.count(label) for label in labels}, max_weight),
        train_images=len(trained),
    )
    pq.write_table(features, features_dir / "features.parquet", compression="zstd")
    return statistics


def _moments(levels: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel from exact level counts `(C, 256)`."""
    values = np.arange(256.0)
    shares = levels / levels.sum(axis=1, keepdims=True)
    mean = shares @ values
    variance = (shares * (values[None, :] - mean[:, None]) ** 2).sum(axis=1)
    return [float(value) for value in mean], [float(value) for value in np.sqrt(variance)]


def _batch_size(images: npt.NDArray[np.uint8]) -> int:
    return int(max(1, _BATCH_PIXELS // (images.shape[1] * images.shape[2])))
