"""Read the source, measure every image, pack shards; what cannot be read goes to quarantine."""

from __future__ import annotations

from rich.console import Console

from pipelines.core.contract import InputContract
from pipelines.core.results import StageResult
from pipelines.core.workspace import Workspace
from pipelines.data.ingestion import ingest
from pipelines.data.quarantine import describe_files, name_reasons, read_quarantine
from pipelines.data.sources.opening import open_source
from pipelines.params import Params
from pipelines.settings import get_settings


class DataIngestionResult(StageResult):
    """What was ingested, and the digest that names this version of the data."""

    data_sha256: str


def run(params: Params, workspace: Workspace) -> DataIngestionResult:
    """Write `data/raw/` and `data/quarantine.parquet`.

    Raises:
        Refusal: there is nothing to train on, or too much of it is broken.
        TryLater: the source cannot be reached now.
    """
    settings = get_settings()
    shaping = params.data_preprocessing
    ingested = ingest(
        open_source(params.data_ingestion, settings),
        params.data_ingestion,
        InputContract(size_px=shaping.size_px, channels=shaping.channels, resize=shaping.resize),
        dataset=params.dataset,
        raw=workspace.raw,
        quarantine_file=workspace.quarantine_file,
        cache_dir=settings.ingest_cache_dir,
        threads=settings.decode_workers,
    )
    manifest = ingested.manifest
    reasons = name_reasons(ingested.quarantined)
    if reasons:
        _say_what_was_quarantined(workspace)
    quarantined = f"{manifest.quarantined:,} quarantined" + (f" ({reasons})" if reasons else "")
    return DataIngestionResult(
        summary=f"{manifest.rows:,} images, {quarantined}",
        metrics={
            "data/images": float(manifest.rows),
            "data/quarantined": float(manifest.quarantined),
            "data/classes": float(len(manifest.labels)),
        },
        data_sha256=manifest.data_sha256,
    )


def _say_what_was_quarantined(workspace: Workspace) -> None:
    files = describe_files(read_quarantine(workspace.quarantine_file))
    text = f"  quarantined: {files}\n  `perch quarantine {workspace.root.name}` lists them all"
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
