"""How fast images become arrays: ingestion and preprocessing against a loop that does nothing but decode.

Both run in turn over the same JPEGs with the same number of threads; the ratio of their images per second, from the
medians of several rounds, is what `docs/` reports.  The bare loop opens each file and decodes it; Perch finds, reads,
hashes, decodes, measures, packs, splits and writes them, starting each round with an empty cache.

    python benchmarks/ingest.py --images 400 --size 1024 --rounds 5
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from generated_images import write_image_folder
from PIL import Image

from pipelines.core.contract import InputContract
from pipelines.data.ingestion import ingest
from pipelines.data.preprocessing import write_splits
from pipelines.data.sources.opening import open_source
from pipelines.params import DataIngestionParams, DataPreprocessingParams
from pipelines.settings import Settings, get_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=1024, help="side of the images, in pixels")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1)
    parser.add_argument("--model-size", type=int, default=28, help="side of the model's input, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=get_settings().decode_workers)
    parser.add_argument("--from-memory", action="store_true", help="spare the bare loop the reading of files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines for a person")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="perch-bench-") as name:
        root = Path(name)
        n_bytes = write_image_folder(root / "images", options.images, options.size, channels=options.channels)
        files: list[Path | bytes] = sorted((root / "images").rglob("*.jpg"))
        if options.from_memory:
            files = [file.read_bytes() for file in files]
        mode = "RGB" if options.channels == 3 else "L"
        bare, perch = [], []
        for _ in range(options.rounds):
            bare.append(_measure(lambda: _decode_all(files, mode, options.threads)))
            perch.append(_measure(lambda: _ingest_and_preprocess(root, options)))
            shutil.rmtree(root / "run")
    wall = [statistics.median(seconds for seconds, _ in times) for times in (bare, perch)]
    cpu = [statistics.median(seconds for _, seconds in times) for times in (bare, perch)]
    result = {
        "images": options.images,
        "image": f"{options.size} x {options.size} {mode} JPEG, {n_bytes / options.images / 1000:.0f} kB",
        "threads": options.threads,
        "bare_images_per_s": round(options.images / wall[0], 1),
        "perch_images_per_s": round(options.images / wall[1], 1),
        "ratio": round(wall[0] / wall[1], 3),
        "ratio_of_cpu_time": round(cpu[0] / cpu[1], 3),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:<20}{value}" for name, value in result.items()))


def _measure(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _decode_all(files: list[Path | bytes], mode: str, threads: int) -> None:
    def decode(file: Path | bytes) -> None:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.convert(mode).load()

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(decode, files):
            pass


def _ingest_and_preprocess(root: Path, options: argparse.Namespace) -> None:
    ingestion = DataIngestionParams(source=str(root / "images"))
    preprocessing = DataPreprocessingParams(size_px=options.model_size, channels=options.channels)
    run = root / "run"
    ingest(
        open_source(ingestion, Settings(home=run)),
        ingestion,
        InputContract(size_px=options.model_size, channels=options.channels, resize=preprocessing.resize),
        dataset="benchmark",
        raw=run / "raw",
        quarantine_file=run / "quarantine.parquet",
        cache_dir=run / "cache",
        threads=options.threads,
    )
    write_splits(
        run / "raw",
        run / "splits",
        ingestion,
        preprocessing,
        cache_dir=run / "cache",
        threads=options.threads,
    )


if __name__ == "__main__":
    main()
