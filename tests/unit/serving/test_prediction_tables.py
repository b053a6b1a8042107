import io
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.prediction_layout import parse_path
from serving.prediction_journal import JournalContent, encode_block, encode_records, read_journal
from serving.prediction_records import FeedbackRecord, JournalHeader, PredictionRecord
from serving.prediction_tables import make_parquet_files

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
JOURNAL = new_prediction_id()


def predict(time: datetime = NOON, **changes: Any) -> PredictionRecord:
    values: dict[str, Any] = {
        "prediction_id": new_prediction_id(),
        "time": time,
        "request_id": "r-1",
        "endpoint": "predict",
        "label": "dog",
        "confidence": 0.75,
        "probabilities": (0.25, 0.75),
        "image_sha256": "ab" * 32,
        "format": "PNG",
        "mode": "L",
        "width_px": 8,
        "height_px": 9,
        "n_bytes": 300,
        "caller": "demo",
        "duration_ms": 1.5,
    }
    return PredictionRecord(**values | changes)


def journal_of(records: list[Any], kind: str = "predictions") -> JournalContent:
    header = JournalHeader(kind, "digits", "3", "cd" * 32, ("cat", "dog"))
    lines = b"".join(line + b"\n" for line in encode_records(records))
    return read_journal(encode_block(orjson.dumps(asdict(header)) + b"\n") + encode_block(lines))


def read(content: bytes) -> pa.Table:
    return parquet.read_table(io.BytesIO(content))


def test_make_parquet_files__a_prediction__keeps_every_field() -> None:
    record = predict(probabilities=np.float32([0.25, 0.75]), confidence=np.float32(0.75))
    (file,) = make_parquet_files(JOURNAL, journal_of([record]))
    (row,) = read(file.content).to_pylist(maps_as_pydicts="strict")
    assert row == {
        **asdict(record),
        "model": "digits",
        "model_version": "3",
        "onnx_sha256": "cd" * 32,
        "probabilities": {"cat": 0.25, "dog": 0.75},
    }


def test_make_parquet_files__around_midnight__gives_a_file_per_day_with_sorted_ids() -> None:
    midnight = datetime(2026, 11, 21, tzinfo=UTC)
    us = timedelta(microseconds=1)
    records = [predict(midnight + offset * us) for offset in (-2, -1, 0, 1, 86_400_000_000)]
    files = list(make_parquet_files(JOURNAL, journal_of(records[::-1])))
    days = {}
    for file in files:
        parsed = parse_path(file.path)
        assert parsed is not None
        ids = read(file.content)["prediction_id"].to_pylist()
        assert ids == sorted(ids)
        assert (parsed.first_id, parsed.last_id, parsed.model, parsed.version) == (ids[0], ids[-1], "digits", "3")
        days[parsed.day] = len(ids)
    assert days == {date(2026, 11, 20): 2, date(2026, 11, 21): 2, date(2026, 11, 22): 1}


def test_make_parquet_files__twice__are_equal_byte_for_byte() -> None:
    content = journal_of([predict() for _ in range(50)])
    assert list(make_parquet_files(JOURNAL, content)) == list(make_parquet_files(JOURNAL, content))


def test_make_parquet_files__feedback__has_its_own_tree() -> None:
    record = FeedbackRecord(new_prediction_id(), "cat", NOON, "demo", "r-2")
    (file,) = make_parquet_files(JOURNAL, journal_of([record], "feedback"))
    assert file.path.startswith("feedback/day=2026-11-20/")
    assert read(file.content).to_pylist() == [asdict(record)]


def test_make_parquet_files__probabilities_of_another_length__are_left_out() -> None:
    good, missing = predict(), predict(probabilities=None)
    (file,) = make_parquet_files(JOURNAL, journal_of([predict(probabilities=(1.0,)), good, missing]))
    assert file.rows == 1
    assert read(file.content)["prediction_id"].to_pylist() == [good.prediction_id]


def test_make_parquet_files__nothing_in_the_journal__makes_none() -> None:
    assert list(make_parquet_files(JOURNAL, journal_of([predict(probabilities=())]))) == []
    header_only = JournalContent(journal_of([predict()]).header, [], 0)
    assert list(make_parquet_files(JOURNAL, header_only)) == []


def test_make_parquet_files__no_header_or_no_records__are_refused() -> None:
    content = journal_of([predict()])
    with pytest.raises(ValueError, match="header"):
        list(make_parquet_files(JOURNAL, JournalContent(None, content.blocks, 1)))
    with pytest.raises(ValueError, match="JSON"):
        list(make_parquet_files(JOURNAL, JournalContent(content.header, [memoryview(b"no json\n")], 0)))
