"""What a model card says beyond the measurements: how the data changed, how the model was made, what was checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.core.results import read_json
from pipelines.core.workspace import Workspace


@dataclass(frozen=True)
class ClassRows:
    """Images of one class; `before` is `None` without a reference."""

    label: str
    now: int
    before: int | None


@dataclass(frozen=True)
class DataChange:
    """The ingested images beside those of the reference's run.

    Attributes:
        as_of: the date up to which images were taken, where there is one.
        source: where they came from.
        sha256: names this version of the data.
        rows: how many images.
        rows_before: how many the reference's run had; `None` without a reference.
        new: images whose bytes the reference's run had not.
        gone: images of the reference's run that are no longer there.
        quarantined: files that could not be read.
        left_out: images in no split, by reason.
        splits: images per split.
        classes: images per class.
    """

    as_of: str | None
    source: str
    sha256: str
    rows: int
    rows_before: int | None
    new: int | None
    gone: int | None
    quarantined: int
    left_out: dict[str, int]
    splits: dict[str, int]
    classes: list[ClassRows]


def read_data_change(workspace: Workspace) -> DataChange:
    """Compare the manifests and the tables of images of this run and of its reference."""
    manifest = read_json(workspace.raw / "manifest.json")
    images = _read_images(workspace.splits)
    counts: dict[str, int] = manifest["labels"]
    before: dict[str, Any] = {}
    new = gone = None
    if (workspace.reference / "manifest.json").is_file():
        before = read_json(workspace.reference / "manifest.json")
        ours, theirs = set(images["sha256"]), set(_read_images(workspace.reference)["sha256"])
        new, gone = len(ours - theirs), len(theirs - ours)
    counts_before: dict[str, int] = before.get("labels", {})
    return DataChange(
        as_of=manifest["as_of"],
        source=manifest["source"],
        sha256=manifest["data_sha256"],
        rows=manifest["rows"],
        rows_before=before.get("rows"),
        new=new,
        gone=gone,
        quarantined=manifest["quarantined"],
        left_out={
            str(reason): int(n) for reason, n in images["left_out"].value_counts().sort_index().items() if reason
        },
        splits={split: int((images["used_split"] == split).sum()) for split in ("train", "val", "test")},
        classes=[
            ClassRows(label, counts.get(label, 0), counts_before.get(label, 0) if before else None)
            for label in sorted({*counts, *counts_before})
        ],
    )


@dataclass(frozen=True)
class ModelFacts:
    """How the model came about, and what it weighs.

    Attributes:
        network: the kind of network.
        parameters: how many.
        epochs: how the training went, in words.
        hyperparameters: found by tuning; empty without it.
        parity: largest difference of a probability between the file and PyTorch, on how many images.
        onnx_bytes: of the file.
        onnx_sha256: of the file.
        int8: what became of the int8 variant, in words; empty where none was tried.
    """

    network: str
    parameters: int
    epochs: str
    hyperparameters: dict[str, Any]
    parity: tuple[float, int]
    onnx_bytes: int
    onnx_sha256: str
    int8: str


def read_model_facts(model: Path, onnx_sha256: str) -> ModelFacts:
    """Read the training's record."""
    record = read_json(model / "training.json")
    int8 = record.get("int8") or {}
    stopped = ", stopped early" if record["stopped_early"] else ""
    return ModelFacts(
        network=record["network"],
        parameters=record["parameters"],
        epochs=f"best epoch {record['best_epoch']} of {record['epochs_run']} run{stopped}",
        hyperparameters=record.get("hyperparameters") or {},
        parity=(record["parity_max_difference"], record["parity_images"]),
        onnx_bytes=(model / "model.onnx").stat().st_size,
        onnx_sha256=onnx_sha256,
        int8="" if not int8 else ("kept" if int8["kept"] else "not kept") + f": {int8['reason']}",
    )


@dataclass(frozen=True)
class SuiteFacts:
    """The expectations that the data was held against."""

    met: int
    total: int
    suites: list[tuple[str, int, int]]
    unmet: list[str]


def read_suite_facts(validation: Path) -> SuiteFacts:
    """Read what the validation found."""
    tree = read_json(validation / "validation.json")
    return SuiteFacts(
        met=tree["met"],
        total=tree["total"],
        suites=[
            (suite["name"], sum(one["success"] for one in suite["expectations"]), len(suite["expectations"]))
            for suite in tree["suites"]
        ],
        unmet=[
            f"{one['column'] or suite['name']}: observed {one['observed']}, limit {one['limit']}"
            for suite in tree["suites"]
            for one in suite["expectations"]
            if not one["success"]
        ],
    )


def _read_images(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "images.parquet", columns=["sha256", "used_split", "left_out"])
