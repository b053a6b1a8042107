"""From shards to one uint8 array per split: who belongs where, who is left out, and the arrays themselves."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.contract import InputContract, ModelContract
from pipelines.core.results import write_json
from pipelines.core.splitting import SPLITS, SplitShares, assign_splits, find_small_classes
from pipelines.data.progress import ImageProgress
from pipelines.data.shaped_images import ShapedImages
from pipelines.data.shards import read_manifest, read_metadata
from pipelines.errors import Refusal
from pipelines.params import DataIngestionParams, DataPreprocessingParams

DUPLICATE = "duplicate"
OUTLIER = "outlier"

# 1 % of full scale: however alike a class's images are, smaller deviations make no outlier.
_SMALLEST_SCALE = 2.55
_MOST_OUTLIERS = 0.05  # share of a class
_MAD_TO_STD = 1.4826  # the median absolute deviation of a normal distribution, times this, is its standard deviation


def assign_and_leave_out(table: pa.Table, params: DataPreprocessingParams) -> tuple[list[str], list[str]]:
    """Decide each image's split, and which images are left out.

    Duplicates: of images with the same bytes and the same label one is kept, in test before validation before training
    and then by key; those in a test split that the source gives all stay, so that published test sets keep their size.
    Outliers are left out of training only: an evaluation must not be made easier.

    Args:
        table: the raw columns, ordered by key.
        params: shares and limits.

    Returns:
        For each image its split (also of images left out), and why it is left out or an empty string.

    Raises:
        Refusal: a class has too few images in a split.
    """
    keys, labels, given, sha256 = (table[name].to_pylist() for name in ("key", "label", "given_split", "sha256"))
    shares = SplitShares(params.train_share, params.val_share)
    splits = assign_splits(sha256, table["group"].to_pylist(), given, shares)
    left_out = [""] * len(keys)
    kept: set[tuple[str, str]] = set()
    for row in sorted(range(len(keys)), key=lambda row: (-SPLITS.index(splits[row]), row)):
        content = (sha256[row], labels[row])
        if content in kept and given[row] != "test":
            left_out[row] = DUPLICATE
        kept.add(content)
    properties = np.stack([table[name].to_numpy() for name in ("mean", "std")])
    for row in np.flatnonzero(find_outliers(labels, properties, params.outlier_z)).tolist():
        if splits[row] == "train" and not left_out[row]:
            left_out[row] = OUTLIER
    used = [split if not reason else "" for split, reason in zip(splits, left_out, strict=True)]
    _refuse_small_classes(labels, used, params.min_images_per_class)
    return splits, left_out


def find_outliers(
    labels: Sequence[str], properties: npt.NDArray[np.float32], outlier_z: float
) -> npt.NDArray[np.bool_]:
    """Tell which images lie too far from their class in some property.

    The robust z-score of Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993): distance from the median
    over 1.4826 times the median absolute deviation, which a few wild images cannot move.  Where they are not few, they
    are another kind of image of that class (a second scanner, colour beside grey), and none of the class is an outlier.

    Args:
        labels: the class of each image.
        properties: `(P, N)`, each row one property of all images, in grey levels.
        outlier_z: the largest score that is still ordinary.

    Returns:
        bool `(N,)`.
    """
    outliers = np.zeros(len(labels), dtype=np.bool_)
    names = np.asarray(labels)
    for label in np.unique(names):
        rows = np.flatnonzero(names == label)
        values = properties[:, rows].astype(np.float64)
        distance = np.abs(values - np.median(values, axis=1, keepdims=True))
        scale = np.maximum(_MAD_TO_STD * np.median(distance, axis=1, keepdims=True), _SMALLEST_SCALE)
        far = (distance > outlier_z * scale).any(axis=0)
        if far.sum() <= max(1, _MOST_OUTLIERS * len(rows)):
            outliers[rows] = far
    return outliers


def write_splits(
    raw: Path,
    splits_dir: Path,
    ingestion: DataIngestionParams,
    params: DataPreprocessingParams,
    *,
    cache_dir: Path,
    threads: int,
) -> dict[str, int]:
    """Write `data/splits/`: one array per split, the table of images, and the model's contract.

    Args:
        raw: folder of the shards.
        splits_dir: folder to write, emptied first.
        ingestion: the limits under which images are decoded.
        params: shares, shape and limits.
        cache_dir: where `data_ingestion` left the images as it had decoded them; without it they are decoded again.
        threads: how many images are decoded at once.

    Returns:
        How many images each split has, and how many were left out for which reason.

    Raises:
        Refusal: a class has too few images in a split.
    """
    table = read_metadata(raw)
    splits, left_out = assign_and_leave_out(table, params)
    used = [split if not reason else "" for split, reason in zip(splits, left_out, strict=True)]
    counts = {split: used.count(split) for split in SPLITS}
    labels = tuple(sorted(set(table["label"].to_pylist())))
    contract = InputContract(size_px=params.size_px, channels=params.channels, resize=params.resize)

    shutil.rmtree(splits_dir, ignore_errors=True)
    splits_dir.mkdir(parents=True)
    shaped = ShapedImages(cache_dir, contract)
    rows: list[int] = []
    with ExitStack() as stack:
        files = {split: stack.enter_context((splits_dir / f"{split}.npy").open("wb")) for split in SPLITS}
        for split, file in files.items():
            _write_header(file, (counts[split], params.size_px, params.size_px, params.channels))
        progress = stack.enter_context(ImageProgress("shaping", len(used)))
        written = dict.fromkeys(SPLITS, 0)
        for shard in read_manifest(raw).shards:
            images = shaped.open_or_make(
                shard,
                raw,
                max_pixels=ingestion.max_image_pixels,
                max_bytes=ingestion.max_image_bytes,
                threads=threads,
            )
            for image in images:
                split = used[len(rows)]
                rows.append(written[split] if split else -1)
                if split:
                    files[split].write(image.data)
                    written[split] += 1
            progress.advance(shard.rows)
    index = {label: position for position, label in enumerate(labels)}
    columns: dict[str, Any] = {
        "used_split": pa.array(used, pa.string()),
        "row": pa.array(rows, pa.int64()),
        "left_out": pa.array(left_out, pa.string()),
        "label_index": pa.array([index[label] for label in table["label"].to_pylist()], pa.int64()),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    pq.write_table(table, splits_dir / "images.parquet", compression="zstd")
    write_json(splits_dir / "contract.json", ModelContract(input=contract, labels=labels).model_dump(mode="json"))
    return counts | {reason: left_out.count(reason) for reason in (DUPLICATE, OUTLIER)}


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The header of an `.npy` file whose rows are appended one by one, so that none has to be held in memory."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _refuse_small_classes(labels: Sequence[str], used: Sequence[str], minimum: int) -> None:
    small = find_small_classes(labels, used, minimum, classes=set(labels))
    if not small:
        return
    lines = [
        f"{label}: " + ", ".join(f"{count} {split}" for split, count in counts.items())
        for label, counts in small.items()
    ]
    raise Refusal(
        "the images of each class in each split",
        "\n  " + "\n  ".join(lines),
        limit=f"{minimum} in each, data_preprocessing.min_images_per_class",
        way_out="add images of these classes, give the splits yourself (folders train/ val/ test/, or a column of the "
        "table), or lower the limit",
    )
