"""Trees of kept predictions, written by the service's own code."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from pipelines.core.prediction_ids import first_id_at, new_prediction_id
from serving.prediction_journal import encode_block, encode_records, read_journal
from serving.prediction_records import FeedbackRecord, JournalHeader, PredictionRecord
from serving.prediction_stores import FolderPredictionStore
from serving.prediction_tables import make_parquet_files

Keep = Callable[..., list[str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def keep(root: Path) -> Keep:
    """Keeps predictions a second apart as one file per day, and gives their ids, oldest first."""

    def write(
        start: datetime,
        labels: Sequence[str],
        *,
        model: str = "shapes-classification",
        version: str = "1",
        onnx_sha256: str = "ab" * 32,
        confidence: float = 0.9,
        **changes: Any,
    ) -> list[str]:
        records = []
        for number, label in enumerate(labels):
            time = start + timedelta(seconds=number)
            record = PredictionRecord(
                prediction_id=first_id_at(time)[:10] + new_prediction_id()[10:],
                time=time,
                request_id="7f3c",
                endpoint="predict",
                label=label,
                confidence=confidence,
                probabilities=(confidence, 1 - confidence),
                image_sha256="cd" * 32,
                format="PNG",
                mode="L",
                width_px=8,
                height_px=8,
                n_bytes=300,
                caller="demo",
                duration_ms=1.5,
            )
            for name, value in changes.items():
                setattr(record, name, value)
            records.append(record)
        put(root, JournalHeader("predictions", model, version, onnx_sha256, ("circle", "square")), records)
        return [record.prediction_id for record in records]

    return write


@pytest.fixture
def tell(root: Path) -> Callable[[str, str, datetime], None]:
    """Keeps one feedback."""

    def write(prediction_id: str, true_label: str, time: datetime) -> None:
        record = FeedbackRecord(prediction_id, true_label, time, "demo", "8a1b")
        put(root, JournalHeader("feedback", "any", "1", "", ()), [record])

    return write


def put(root: Path, header: JournalHeader, records: Sequence[object]) -> None:
    lines = b"".join(line + b"\n" for line in encode_records(records))
    content = read_journal(encode_block(orjson.dumps(asdict(header)) + b"\n") + encode_block(lines))
    for file in make_parquet_files(new_prediction_id(), content):
        FolderPredictionStore(root).put(file.path, file.content)
