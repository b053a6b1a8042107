"""`curves.csv`: every metric of every epoch, in a form that any tool reads."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path


def write_curves(path: Path, records: Sequence[dict[str, float]]) -> None:
    """Write `epoch,metric,value`, epochs from 1, metrics by name, values to nine significant digits.

    Args:
        path: of the new file.
        records: one dictionary per epoch.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", "metric", "value"])
        for epoch, record in enumerate(records, start=1):
            writer.writerows([epoch, name, f"{value:.9g}"] for name, value in sorted(record.items()))
