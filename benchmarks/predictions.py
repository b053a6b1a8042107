"""How long `perch why` and `perch predictions` take on a million predictions, against opening Python alone.

Two versions of a model, thirty days, two workers that ship a file a minute each: 83,333 files of a dozen rows, which is
how the default settings leave a million predictions (`--rows-per-file` for another rhythm).  200 rows in the ledger.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from pipelines.core.prediction_ids import first_id_at
from pipelines.core.prediction_layout import predictions_path
from pipelines.registry.ledger import Ledger
from pipelines.settings import Settings

START = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 30
WORKERS = 2
LABELS = tuple("0123456789")
_DIGITS = np.frombuffer(b"0123456789ABCDEFGHJKMNPQRSTVWXYZ", np.uint8)


def make_tree(root: Path, n_rows: int, rows_per_file: int) -> list[str]:
    """Write the predictions; a sample of ids that are in them."""
    rng = np.random.default_rng(1)
    n_files = n_rows // rows_per_file
    step = timedelta(days=DAYS) / (n_files // WORKERS)
    sample = []
    for number in range(n_files):
        started = START + (number // WORKERS) * step
        version = "6" if started < START + timedelta(days=DAYS / 2) else "7"
        table = make_table(rng, started, step, rows_per_file, version)
        ids = table["prediction_id"]
        day, journal = started.date(), first_id_at(started)[:10] + f"{number:016d}"
        path = root / predictions_path("digits-classification", version, day, str(ids[0]), str(ids[-1]), journal)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, path, compression="zstd", store_schema=False)
        if number % (n_files // 50) == 0:
            sample.append(str(ids[rows_per_file // 2]))
    return sample


def make_table(rng: np.random.Generator, started: datetime, step: timedelta, n_rows: int, version: str) -> pa.Table:
    """One file's rows, as the service writes them."""
    offsets_s = np.sort(rng.uniform(0, step.total_seconds(), n_rows))
    times = [min(started + timedelta(seconds=s), started.replace(hour=23, minute=59, second=59)) for s in offsets_s]
    tails = _DIGITS[rng.integers(0, 32, (n_rows, 16))]
    ids = sorted(first_id_at(time)[:10] + bytes(tail).decode() for time, tail in zip(times, tails, strict=True))
    probabilities = rng.dirichlet(np.full(10, 0.1), n_rows).astype(np.float32)
    digests = [rng.bytes(32).hex() for _ in range(n_rows)]
    return pa.table(
        {
            "prediction_id": ids,
            "time": pa.array(times, pa.timestamp("us", tz="UTC")),
            "request_id": [digest[:32] for digest in digests],
            "model": ["digits-classification"] * n_rows,
            "model_version": [version] * n_rows,
            "onnx_sha256": [version * 64] * n_rows,
            "endpoint": ["predict"] * n_rows,
            "label": [LABELS[k] for k in probabilities.argmax(1)],
            "confidence": probabilities.max(1),
            "probabilities": pa.MapArray.from_arrays(
                pa.array(np.arange(n_rows + 1, dtype=np.int32) * 10), pa.array(LABELS * n_rows), probabilities.ravel()
            ),
            "image_sha256": digests,
            "format": ["PNG"] * n_rows,
            "mode": ["L"] * n_rows,
            "width_px": pa.array([8] * n_rows, pa.int32()),
            "height_px": pa.array([8] * n_rows, pa.int32()),
            "n_bytes": pa.array(rng.integers(100, 300, n_rows), pa.int64()),
            "caller": [f"client-{k}" for k in rng.integers(0, 5, n_rows)],
            "duration_ms": rng.gamma(4, 0.5, n_rows).astype(np.float32),
        }
    )


def make_ledger(settings: Settings) -> None:
    """Register and package both versions among two hundred others, so that the chain has something to lead through."""
    ledger = Ledger(settings.ledger_url)
    for number in range(1, 101):
        version, run_id = str(number), f"weekly-{number}"
        accuracy = {"value": 0.96, "low": 0.93, "high": 0.98}
        evidence: dict[str, Any] = {"run_id": run_id, "git_sha": "3e9d1c2" * 5, "git_clean": True}
        evidence |= {"data": {"sha256": "77ab" * 16, "md5": "0bad" * 8, "rows": 1797}, "test_accuracy": accuracy}
        evidence |= {"model": {"onnx_sha256": version[0] * 64}, "validation": {"met": 37, "total": 37}}
        common = {"model": "digits-classification", "version": version, "now": START - timedelta(days=200 - number)}
        ledger.append("registered", evidence=evidence, key=f"registered:{version}", **common)
        packaged = {"run_id": run_id, "release_sha256": "9b1e" * 16, "key_id": "2026-a"}
        ledger.append("packaged", evidence=packaged, key=f"packaged:{version}", **common)
    ledger.close()


def measure(arguments: list[str], environment: dict[str, str], times: int) -> float:
    """Median wall seconds of a command."""
    walls = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL)
        walls.append(time.perf_counter() - started)
    return statistics.median(walls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-file", type=int, default=12)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="make the predictions here, or use what was made here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = options.keep or Path(temporary)
        samples = home / "samples.txt"
        if not samples.exists():
            home.mkdir(parents=True, exist_ok=True)
            samples.write_text("\n".join(make_tree(home / "predictions", options.rows, options.rows_per_file)))
        if not (home / "ledger.db").exists():
            make_ledger(Settings(home=home))
        sample = samples.read_text().split()
        files = sum(1 for _ in home.rglob("*.parquet"))
        print(f"{options.rows:,} predictions in {files:,} files")
        environment = {**os.environ, "PERCH_HOME": str(home)}
        environment.pop("PERCH_PREDICTIONS_URL", None)
        bare = measure([sys.executable, "-c", "import typer, rich, pydantic_settings"], environment, options.times)
        print(f"{'Python with the command line alone':40} {bare:6.2f} s")
        perch = [sys.executable, "-m", "pipelines"]
        for title, arguments in {
            "perch why ID": ["why", sample[len(sample) // 2]],
            "perch predictions": ["predictions"],
            "perch predictions --label 3 --since 2d": ["predictions", "--label", "3", "--since", "2026-10-29"],
            "perch predictions --count day": ["predictions", "--count", "day"],
        }.items():
            wall = measure([*perch, *arguments], environment, options.times)
            print(f"{title:40} {wall:6.2f} s   {wall / bare:5.1f} x")


if __name__ == "__main__":
    main()
