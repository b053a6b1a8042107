"""Small real images on disk, and one call that ingests them the way the stage does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.core.contract import InputContract
from pipelines.data.ingestion import Ingested, ingest
from pipelines.data.sources.base import Source
from pipelines.data.sources.opening import open_source
from pipelines.params import DataIngestionParams
from pipelines.settings import Settings

MakeFolder = Callable[..., Path]
Ingest = Callable[..., Ingested]


def draw_image(seed: int, size: tuple[int, int] = (24, 20), mode: str = "L") -> Image.Image:
    """Smooth noise, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes one sub-folder per class, by default 12 PNGs each; a prefix like `train/` goes in front."""

    def make(
        name: str = "images", classes: dict[str, int] | None = None, *, suffix: str = ".png", seed: int = 0
    ) -> Path:
        root = tmp_path / name
        for offset, (label, count) in enumerate((classes or {"cat": 12, "dog": 12}).items()):
            (root / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw_image(1000 * offset + number).save(root / label / f"{number:03d}{suffix}")
        return root

    return make


@pytest.fixture
def ingest_to(tmp_path: Path) -> Ingest:
    """Ingests a source into `<tmp_path>/<run>/raw`, over one cache for all runs of a test."""

    def run(
        source: str | Path,
        name: str = "run",
        *,
        contract: InputContract | None = None,
        opened: Source | None = None,
        cache: str = "cache",
        threads: int = 2,
        **params: Any,
    ) -> Ingested:
        ingestion = DataIngestionParams(source=str(source), **params)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = Settings(project_dir=tmp_path, home=tmp_path / "home")
        return ingest(
            opened or open_source(ingestion, settings),
            ingestion,
            contract or InputContract(size_px=16, channels=1, resize="squash"),
            dataset="pets",
            raw=folder / "raw",
            quarantine_file=folder / "quarantine.parquet",
            cache_dir=tmp_path / cache,
            threads=threads,
        )

    return run


@pytest.fixture
def file_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Reads a folder as a mapping of names to bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }

    return read
