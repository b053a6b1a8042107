"""From a journal's JSON lines to Parquet files, by day; the rows stay in C++, away from the interpreter's lock."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from pipelines.core.prediction_layout import FEEDBACK, feedback_path, predictions_path
from pipelines.core.request_origins import CLIENT
from serving.prediction_journal import JournalContent
from serving.prediction_records import JournalHeader

if TYPE_CHECKING:
    import pyarrow as pa

_EPOCH = date(1970, 1, 1)
_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class ParquetFile:
    """A file to be shipped.

    Attributes:
        path: relative to the tree's root.
        content: its bytes.
        rows: records in it.
    """

    path: str
    content: bytes
    rows: int


def make_parquet_files(journal_id: str, content: JournalContent) -> Iterator[ParquetFile]:
    """The Parquet files of a journal, one per UTC day; the same journal gives the same paths and rows each time.

    Args:
        journal_id: name of the journal, which ends the files' names.
        content: what was read of it.

    Raises:
        ValueError: the journal has no header, or its lines are no records (`pyarrow.ArrowInvalid` is one).
    """
    header = content.header
    if header is None:
        raise ValueError("the journal's header cannot be read")
    if not content.blocks:
        return
    import pyarrow.compute as pc

    rows = _read_rows(content, header.kind)
    table = (_feedback_table if header.kind == FEEDBACK else _predictions_table)(rows, header)
    table = table.sort_by("prediction_id")
    days = pc.divide(pc.cast(table["time"], "int64"), _DAY_US)
    for day_number in pc.unique(days).to_pylist():
        part = table.filter(pc.equal(days, day_number))
        day = _EPOCH + timedelta(days=day_number)
        first, last = part["prediction_id"][0].as_py(), part["prediction_id"][-1].as_py()
        if header.kind == FEEDBACK:
            path = feedback_path(day, first, last, journal_id)
        else:
            path = predictions_path(header.model, header.version, day, first, last, journal_id)
        yield ParquetFile(path, _write(part), part.num_rows)


def prepare() -> None:
    """Import what making files needs: under traffic, holding the interpreter's lock for it would make answers wait."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.json
    import pyarrow.parquet

    # At the first Python value that it converts, pyarrow looks once whether there is pandas, and imports it: 0.3 s and
    # 40 MB for nothing.  A release has none; where it happens to be installed, a worker is to be the same.
    without_pandas = _WithoutPandas()
    sys.meta_path.insert(0, without_pandas)
    try:
        pa.scalar(0)
    finally:
        sys.meta_path.remove(without_pandas)


class _WithoutPandas:
    """A finder to which there is no pandas."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def _read_rows(content: JournalContent, kind: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import json

    text, moment = pa.string(), pa.timestamp("us", tz="UTC")
    if kind == FEEDBACK:
        fields = {"time": moment, **dict.fromkeys(("prediction_id", "true_label", "caller", "request_id"), text)}
    else:
        fields = {
            **dict.fromkeys(("prediction_id", "request_id", "endpoint", "label"), text),
            **dict.fromkeys(("image_sha256", "format", "mode", "caller", "origin"), text),
            "time": moment,
            **dict.fromkeys(("width_px", "height_px", "n_bytes"), pa.int64()),
            **dict.fromkeys(("confidence", "duration_ms"), pa.float64()),
            "probabilities": pa.list_(pa.float32()),
        }
    data = b"".join(content.blocks)
    return json.read_json(
        pa.BufferReader(data),
        # One block: a record must not be cut in two, and one thread leaves the other cores to the predictions.
        read_options=json.ReadOptions(use_threads=False, block_size=max(len(data), 1)),
        parse_options=json.ParseOptions(explicit_schema=pa.schema(fields.items()), unexpected_field_behavior="ignore"),
    ).combine_chunks()


def _predictions_table(rows: pa.Table, header: JournalHeader) -> pa.Table:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    n_labels = len(header.labels)
    lengths = pc.fill_null(pc.list_value_length(rows["probabilities"]), -1)
    rows = rows.filter(pc.equal(lengths, n_labels)).combine_chunks()
    n_rows = rows.num_rows
    items = _flatten(rows["probabilities"], pa.float32())
    keys = pa.DictionaryArray.from_arrays(
        np.tile(np.arange(n_labels, dtype=np.int32), n_rows), pa.array(header.labels, pa.string())
    ).cast(pa.string())
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int32) * n_labels)

    def same(value: str) -> pa.Array:
        return pa.repeat(pa.scalar(value, pa.string()), n_rows)

    columns: dict[str, Any] = {
        "prediction_id": rows["prediction_id"],
        "time": rows["time"],
        "request_id": rows["request_id"],
        "model": same(header.model),
        "model_version": same(header.version),
        "onnx_sha256": same(header.onnx_sha256),
        "endpoint": rows["endpoint"],
        "label": rows["label"],
        "confidence": rows["confidence"].cast(pa.float32()),
        "probabilities": pa.MapArray.from_arrays(offsets, keys, items),
        "image_sha256": rows["image_sha256"],
        "format": rows["format"],
        "mode": rows["mode"],
        "width_px": rows["width_px"].cast(pa.int32()),
        "height_px": rows["height_px"].cast(pa.int32()),
        "n_bytes": rows["n_bytes"],
        "caller": rows["caller"],
        "duration_ms": rows["duration_ms"].cast(pa.float32()),
        "origin": pc.fill_null(rows["origin"], CLIENT),  # a journal of the version before has none
    }
    return pa.table(columns)


def _feedback_table(rows: pa.Table, _header: JournalHeader) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "prediction_id": rows["prediction_id"],
            "true_label": rows["true_label"],
            "time": rows["time"],
            "caller": rows["caller"],
            "request_id": rows["request_id"],
        }
    )


def _flatten(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    chunks = [chunk.flatten() for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], kind)


def _write(table: pa.Table) -> bytes:
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="zstd", store_schema=False)
    return stream.getvalue()
