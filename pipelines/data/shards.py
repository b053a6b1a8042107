"""Parquet shards of encoded images: their columns, where one ends and the next begins, how they are written and read.

A shard is named by its content and cut where the content says so (content-defined chunking, as in LBFS, Muthitacharoen
et al., SOSP 2001): images that are added change the shards beside them, and all others keep name and bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

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

TARGET_SHARD_BYTES = 32 * 2**20  # what a shard of large images comes to on average; it is held in memory while it grows
_ROW_GROUP_IMAGES = 128  # what must be read to get at one image


class ShardEntry(BaseModel):
    """One shard in the manifest."""

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


def write_shard(records: Sequence[Mapping[str, Any]], images: Sequence[bytes], file: Path) -> ShardEntry:
    """Write one shard; equal rows give equal bytes.

    Args:
        records: the metadata columns of each image.
        images: the encoded bytes of each image.
        file: where to write; the entry's name says what the file should be called.
    """
    table = pa.Table.from_pylist([dict(record) for record in records], schema=METADATA_SCHEMA)
    table = table.append_column(SCHEMA.field("image"), pa.array(images, type=pa.binary()))
    pq.write_table(
        table,
        file,
        row_group_size=_ROW_GROUP_IMAGES,
        version="2.6",
        # Images are compressed already; statistics over them would copy whole images into the footer.
        compression={name: "none" if name == "image" else "zstd" for name in SCHEMA.names},
        use_dictionary=["label", "given_split", "group", "format", "mode"],
        write_statistics=METADATA_COLUMNS,
    )
    digest = file_sha256(file)
    return ShardEntry(name=f"{digest[:16]}.parquet", rows=len(records), sha256=digest)


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


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
