"""A CSV or Parquet table with one row per image: its path, its class, and what else the table knows."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.sources.base import SourceItem, parse_split
from pipelines.data.sources.stores import FileStore, StoredFile
from pipelines.errors import Refusal
from pipelines.params import TableParams

_ROWS_AT_ONCE = 10_000
_WAY_OUT = "name its columns under data_ingestion.table in params.yaml; null where it has no such column"


class TableSource:
    """The rows of a table.

    Args:
        store: where the table and the images lie; paths are relative to it.
        name: the table's file name, ending in `.csv` or `.parquet`.
        columns: which column means what.
        cache_dir: for a copy of a table that lies elsewhere.
        way_out: what to do where a column is missing.
    """

    def __init__(
        self, store: FileStore, name: str, columns: TableParams, cache_dir: Path, *, way_out: str = _WAY_OUT
    ) -> None:
        self._store, self._name, self._columns, self._cache_dir = store, name, columns, cache_dir
        self._way_out = way_out
        self.identity = f"table {store.identity}/{name}"
        self.concurrent_reads = store.concurrent_reads

    def list_items(self) -> list[SourceItem]:
        """One item per row.  A row without a class, or whose file is not there, has a fault.

        Raises:
            Refusal: the table cannot be read, lacks a column, holds a split, date or path that means nothing, or all
                its files are missing.
        """
        columns = self._columns
        named = (
            columns.path_column,
            columns.label_column,
            columns.split_column,
            columns.group_column,
            columns.arrived_column,
        )
        wanted = [name for name in dict.fromkeys(named) if name is not None]
        items = []
        for number, row in enumerate(self._rows(wanted), start=1):
            where = f"row {number} of {self._name}"
            path = row[columns.path_column]
            if not path:
                raise Refusal(where, f"the column {columns.path_column} is empty", limit="a path in every row")
            label = row[columns.label_column]
            key = posixpath.normpath(self._store.relative(path.replace("\\", "/")))
            items.append(
                SourceItem(
                    key=key,
                    label=label,
                    location=key,
                    given_split=parse_split(row[columns.split_column], where) if columns.split_column else "",
                    group=row[columns.group_column] if columns.group_column else "",
                    arrived=_parse_date(row[columns.arrived_column], where) if columns.arrived_column else None,
                    fault="" if label else f"the column {columns.label_column} is empty",
                )
            )
        return self._with_files(items)

    def read(self, item: SourceItem, max_bytes: int) -> bytes:
        """The bytes of the file that the row names."""
        return self._store.read(item.location, max_bytes)

    def _with_files(self, items: Sequence[SourceItem]) -> list[SourceItem]:
        files = self._store.find([item.location for item in items])
        if files and all(file.fault for file in files):
            self._refuse_missing_files(files)
        return [
            replace(item, n_bytes=file.n_bytes, fingerprint=file.fingerprint, fault=item.fault or file.fault)
            for item, file in zip(items, files, strict=True)
        ]

    def _rows(self, wanted: Sequence[str]) -> Iterator[Mapping[str, str]]:
        """The wanted columns of each row, as text without white space around it; what is missing is empty."""
        file = self._store.local_copy(self._name, self._cache_dir)
        if file.suffix.casefold() == ".parquet":
            try:
                with pq.ParquetFile(file) as table:
                    self._refuse_missing(wanted, table.schema_arrow.names)
                    for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(wanted)):
                        for row in batch.to_pylist():
                            yield {name: "" if row[name] is None else str(row[name]).strip() for name in wanted}
            except (pa.ArrowException, OSError) as error:
                raise Refusal(f"the table {self._name}", f"is no readable Parquet file: {error}") from error
            return
        with file.open(encoding="utf-8-sig", newline="") as stream:
            try:
                reader = csv.DictReader(stream)
                self._refuse_missing(wanted, list(reader.fieldnames or []))
                for row in reader:
                    yield {name: (row[name] or "").strip() for name in wanted}
            except (csv.Error, UnicodeDecodeError) as error:
                raise Refusal(
                    f"the table {self._name}", f"is no readable CSV file: {error}", limit="comma-separated UTF-8"
                ) from error

    def _refuse_missing_files(self, files: Sequence[StoredFile]) -> None:
        """A table none of whose paths leads anywhere has one mistake, not as many as it has rows."""
        raise Refusal(
            f"the table {self._name}",
            f"names {len(files):,} images, and none of them can be opened, e.g. {files[0].path}: {files[0].fault}",
            limit="paths relative to the table's own folder, or absolute ones",
            way_out=f"correct the column {self._columns.path_column}, or put the table beside its images",
        )

    def _refuse_missing(self, wanted: Sequence[str], present: Sequence[str]) -> None:
        if missing := [name for name in wanted if name not in present]:
            raise Refusal(
                f"the table {self._name}",
                f"has no column {', '.join(missing)}; it has {', '.join(present) or 'none'}",
                way_out=self._way_out,
            )


def _parse_date(text: str, where: str) -> date | None:
    """A day from ISO 8601, with or without a time of day; empty is unknown."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).date()
    except ValueError:
        raise Refusal(where, f"gives the date {text!r}", limit="ISO 8601, e.g. 2026-11-01") from None
