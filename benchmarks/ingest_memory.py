"""Peak memory while images are ingested and preprocessed, for more and more of them: it must not grow with the data.

Each amount is read by a process of its own, from a source that makes JPEGs as they are asked for, all different;
shards, cache and arrays are really written, so the disk needs about 1.2 times the largest amount.

    python benchmarks/ingest_memory.py --gb 1 2 4
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from generated_images import write_image_folder

from pipelines.core.contract import InputContract
from pipelines.data.ingestion import ingest
from pipelines.data.preprocessing import write_splits
from pipelines.data.sources.base import SourceItem
from pipelines.params import DataIngestionParams, DataPreprocessingParams
from pipelines.settings import get_settings

SIZE_PX = 1024
MODEL_SIZE_PX = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="amounts of encoded images")
    parser.add_argument("--folder", type=Path, default=None, help="where to write")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(_ingest(options.one, options.folder)))
        return
    print(f"{'encoded':>10}{'images':>10}{'peak memory':>14}{'images/s':>10}")
    peaks = []
    for amount in options.gb:
        with tempfile.TemporaryDirectory(prefix="perch-bench-", dir=options.folder) as folder:
            command = [sys.executable, __file__, "--one", str(amount), "--folder", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout)
        peaks.append(result["peak_mb"])
        print(f"{amount:>7.1f} GB{result['images']:>10,}{result['peak_mb']:>11,.0f} MB{result['images_per_s']:>10,.0f}")
    print(f"largest / smallest peak: {max(peaks) / min(peaks):.2f}")


class GeneratedSource:
    """As many JPEGs as asked for: a few real ones, each with a comment that makes its bytes its own."""

    identity = "generated"
    concurrent_reads = 0

    def __init__(self, folder: Path, n_bytes: float) -> None:
        write_image_folder(folder, 16, SIZE_PX)
        self._images = [file.read_bytes() for file in sorted(folder.rglob("*.jpg"))]
        self._count = int(n_bytes / (sum(map(len, self._images)) / len(self._images)))

    def list_items(self) -> list[SourceItem]:
        """All of them, of two classes."""
        return [
            SourceItem(f"{number:09d}.jpg", "left" if number % 2 else "right", str(number), fingerprint="1")
            for number in range(self._count)
        ]

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """One of the real images, with its own comment."""
        image, comment = self._images[int(item.location) % len(self._images)], item.location.encode()
        # A comment segment right after the start of the image (ITU-T T.81, B.2.4.5).
        return (image[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + image[2:])[: max_bytes + 1]


def _ingest(gigabytes: float, root: Path) -> dict[str, float]:
    params, preprocessing = DataIngestionParams(), DataPreprocessingParams(size_px=MODEL_SIZE_PX)
    source = GeneratedSource(root / "images", gigabytes * 1e9)
    began = time.perf_counter()
    manifest = ingest(
        source,
        params,
        InputContract(size_px=MODEL_SIZE_PX, channels=1, resize="squash"),
        dataset="benchmark",
        raw=root / "raw",
        quarantine_file=root / "quarantine.parquet",
        cache_dir=root / "cache",
        threads=get_settings().decode_workers,
    ).manifest
    write_splits(
        root / "raw",
        root / "splits",
        params,
        preprocessing,
        cache_dir=root / "cache",
        threads=get_settings().decode_workers,
    )
    return {
        "images": manifest.rows,
        "images_per_s": manifest.rows / (time.perf_counter() - began),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


if __name__ == "__main__":
    main()
