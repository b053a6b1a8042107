"""Parquet shards of encoded images: their columns, where one ends and the next begins, how they are written and read.

A shard is named by its content and cut where the content says so (content-defined chunking, as in LBFS, Muthitacharoen
et al., SOSP 2001): images that are added change the shards beside them, and all others keep name and bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipelines.core.results import write_json

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("given_split", pa.string()),
        ("group", pa.string()),
        ("arrived", pa.date32()),
        ("sha256", pa.string()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("n_bytes", pa.int64()),
        ("mean", pa.float32()),
        ("std", pa.float32()),
        ("p01", pa.float32()),
        ("p99", pa.float32()),
        ("phash", pa.int64()),
        ("image", pa.binary()),
    ]
)
METADATA_SCHEMA = pa.schema([column for column in SCHEMA if column.name != "image"])
METADATA_COLUMNS = METADATA_SCHEMA.names

TARGET_SHARD_BYTES = 64 * 2**20  # what a shard of large images comes to on average
# A row group is held in memory while it is written, and read whole to get at one of its images.
_ROW_GROUP_IMAGES = 128
_ROW_GROUP_BYTES = 8 * 2**20
_PAGE_BYTES = 2**18  # copied and written in turn: small enough to stay in the processor's cache meanwhile
_FOOTER_END_BYTES = 8  # a Parquet file ends in its footer, the footer's length in 4 bytes, and "PAR1"


class ShardEntry(BaseModel):
    """One shard in the manifest; `sha256` is that of its rows and footer (`_ShardDigest`), not of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int
    sha256: str


class Manifest(BaseModel):
    """`data/raw/manifest.json`: what was ingested, and the digest that names this version of the data.

    `data_sha256` covers key, label, split, group, arrival and content of every image in order, and nothing else: it is
    the same however the images are packed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    dataset: str
    source: str
    as_of: str | None
    labels: dict[str, int]
    rows: int
    quarantined: int
    shards: list[ShardEntry]
    data_sha256: str

    def write(self, raw: Path) -> None:
        """Write `manifest.json` into the folder of the shards."""
        tree = self.model_dump()
        tree["schema"] = tree.pop("schema_version")
        write_json(raw / "manifest.json", tree)


def read_manifest(raw: Path) -> Manifest:
    """Read `manifest.json` from the folder of the shards."""
    tree = json.loads((raw / "manifest.json").read_text(encoding="utf-8"))
    tree["schema_version"] = tree.pop("schema")
    return Manifest.model_validate(tree)


class ShardCutter:
    """Decides after which image a shard ends: a function of the images since the last cut, not of their number before.

    An image ends its shard when its hash falls below `1 / shard_images`, or below its share of `TARGET_SHARD_BYTES`
    where that is more; a quarter of the average is the least and twice the average the most that a shard holds.
    """

    def __init__(self, shard_images: int, target_bytes: int = TARGET_SHARD_BYTES) -> None:
        self._images, self._bytes = shard_images, target_bytes
        self._count = self._size = 0

    def overflows(self, n_bytes: int) -> bool:
        """Whether an image must not be added to the present shard any more."""
        return self._count > 0 and self._size + n_bytes > 2 * self._bytes

    def add(self, sha256: str, n_bytes: int) -> bool:
        """Count an image to the present shard; true where it is the shard's last."""
        self._count += 1
        self._size += n_bytes
        chance = max(1 / self._images, n_bytes / self._bytes)
        long_enough = 4 * self._count >= self._images or 4 * self._size >= self._bytes
        chosen = int(sha256[:12], 16) < chance * 16**12
        return (long_enough and chosen) or self._count >= 2 * self._images or self._size >= 2 * self._bytes

    def start_shard(self) -> None:
        """Begin to count anew."""
        self._count = self._size = 0


class _ShardDigest:
    """A digest of all that a shard says, without its images' bytes being hashed a second time.

    It covers every row's columns, the image's own SHA-256 among them, and the file's footer: the writer's version, and
    where everything lies.  Equal digests mean equal bytes; hashing the file itself would cost a tenth of ingesting it.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, metadata: pa.Table) -> None:
        """Cover some rows by their columns, all but the image."""
        for row in metadata.to_pylist():
            self._digest.update((json.dumps(row, sort_keys=True, default=str) + "\n").encode())

    def finish(self, file: Path) -> str:
        """Cover the footer of the finished file.

        Returns:
            The digest, hex.
        """
        with file.open("rb") as stream:
            stream.seek(-_FOOTER_END_BYTES, io.SEEK_END)
            n_bytes = int.from_bytes(stream.read(4), "little")
            stream.seek(-_FOOTER_END_BYTES - n_bytes, io.SEEK_END)
            self._digest.update(stream.read())
        return self._digest.hexdigest()


class ShardWriter:
    """Writes one shard as its images come; equal rows give equal bytes.  Holds one row group in memory.

    Args:
        file: where to write; the entry that `close` returns says what the file should be called.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._digest = file, _ShardDigest()
        self._writer = pq.ParquetWriter(
            file,
            SCHEMA,
            version="2.6",
            data_page_size=_PAGE_BYTES,
            # Images are compressed already; statistics over them would copy whole images into the footer.
            compression={name: "none" if name == "image" else "snappy" for name in SCHEMA.names},
            use_dictionary=["label", "given_split", "group", "format", "mode"],
            write_statistics=METADATA_COLUMNS,
        )
        self._rows = self._pending_bytes = 0
        self._records: list[Mapping[str, Any]] = []
        self._images: list[bytes] = []

    def add(self, record: Mapping[str, Any], image: bytes) -> None:
        """Append an image.

        Args:
            record: the metadata columns.
            image: the encoded bytes.
        """
        if self._images and self._pending_bytes + len(image) > _ROW_GROUP_BYTES:
            self._write_row_group()
        self._records.append(record)
        self._images.append(image)
        self._pending_bytes += len(image)
        if len(self._images) == _ROW_GROUP_IMAGES:
            self._write_row_group()

    def close(self) -> ShardEntry:
        """Finish the file; the digest of its content is its name."""
        if self._images:
            self._write_row_group()
        self._writer.close()
        digest = self._digest.finish(self._file)
        return ShardEntry(name=f"{digest[:16]}.parquet", rows=self._rows, sha256=digest)

    def _write_row_group(self) -> None:
        columns = [
            pa.array([row[name] for row in self._records], METADATA_SCHEMA.field(name).type)
            for name in METADATA_COLUMNS
        ]
        self._digest.add(pa.Table.from_arrays(columns, schema=METADATA_SCHEMA))
        columns.append(_binary_column(self._images))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._rows += len(self._images)
        self._records, self._images, self._pending_bytes = [], [], 0


def _binary_column(images: Sequence[bytes]) -> pa.ChunkedArray:
    """The images as a column that refers to their bytes where they are: a copy would cost as much as the writing."""
    chunks = []
    for image in images:
        ends = np.array([0, len(image)], np.int32)
        chunks.append(pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(ends), pa.py_buffer(image)]))
    return pa.chunked_array(chunks, pa.binary())


class ShardImages:
    """Encoded bytes of a shard's images by row; fast for rows asked for in their order, holds one row group."""

    def __init__(self, file: Path) -> None:
        self._file = pq.ParquetFile(file)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._group, self._images = -1, pa.chunked_array([], pa.binary())

    def __getitem__(self, row: int) -> bytes:
        group = bisect_right(self._starts, row) - 1
        if group != self._group:
            self._group, self._images = group, self._file.read_row_group(group, columns=["image"])["image"]
        image: bytes = self._images[row - self._starts[group]].as_py()
        return image


def is_intact(file: Path, shard: ShardEntry) -> bool:
    """Whether a file is the shard that it is meant to be: each image is hashed, and all else compared by digest."""
    digest = _ShardDigest()
    try:
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                found = [hashlib.sha256(image.as_buffer()).hexdigest() for image in table["image"]]
                if found != table["sha256"].to_pylist():
                    return False
                digest.add(table.drop_columns(["image"]))
        return digest.finish(file) == shard.sha256
    except (OSError, pa.ArrowException, KeyError, AttributeError, ValueError):
        return False


def read_metadata(raw: Path) -> pa.Table:
    """All columns but the images, one row per image, ordered by key."""
    tables = [pq.read_table(raw / shard.name, columns=METADATA_COLUMNS) for shard in read_manifest(raw).shards]
    return pa.concat_tables(tables)


def read_images(raw: Path, keys: Collection[str]) -> dict[str, bytes]:
    """The encoded bytes of the named images; keys that were not ingested are absent."""
    wanted, found = set(keys), {}
    for shard in read_manifest(raw).shards:
        with pq.ParquetFile(raw / shard.name) as file:
            for group in range(file.num_row_groups):
                present = file.read_row_group(group, columns=["key"])["key"].to_pylist()
                if not wanted.isdisjoint(present):
                    images = file.read_row_group(group, columns=["image"])["image"]
                    found.update({key: images[row].as_py() for row, key in enumerate(present) if key in wanted})
    return found


def iterate_images(shard: Path) -> Iterator[bytes]:
    """The encoded bytes of a shard's images in order, holding one row group in memory."""
    with pq.ParquetFile(shard) as file:
        for batch in file.iter_batches(batch_size=_ROW_GROUP_IMAGES, columns=["image"]):
            for image in batch.column(0):
                yield image.as_py()
