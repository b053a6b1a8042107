"""Assign splits by content, leave duplicates and outliers out, write one uint8 array per split."""

from __future__ import annotations

from pipelines.core.results import StageResult
from pipelines.core.splitting import SPLITS
from pipelines.core.workspace import Workspace
from pipelines.data.preprocessing import DUPLICATE, OUTLIER, write_splits
from pipelines.params import Params
from pipelines.settings import get_settings


class DataPreprocessingResult(StageResult):
    """How many images each split has."""


def run(params: Params, workspace: Workspace) -> DataPreprocessingResult:
    """Write `data/splits/`.

    Raises:
        Refusal: a class has too few images in a split.
    """
    settings = get_settings()
    counts = write_splits(
        workspace.raw,
        workspace.splits,
        params.data_ingestion,
        params.data_preprocessing,
        cache_dir=settings.ingest_cache_dir,
        threads=settings.decode_workers,
    )
    summary = " / ".join(f"{split} {counts[split]:,}" for split in SPLITS)
    left_out = ", ".join(f"{counts[reason]:,} {reason}s" for reason in (DUPLICATE, OUTLIER) if counts[reason])
    return DataPreprocessingResult(
        summary=summary + (f"; left out: {left_out}" if left_out else ""),
        metrics={f"data/{split}_images": float(counts[split]) for split in SPLITS}
        | {f"data/{reason}s": float(counts[reason]) for reason in (DUPLICATE, OUTLIER)},
    )
