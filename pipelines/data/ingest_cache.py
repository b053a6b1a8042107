"""What earlier ingestions read, kept on this machine, so that the next reads only what is new.

Layout, below `Settings.ingest_cache_dir`; nothing in it is needed, and all of it may be deleted at any time (what no
ingestion has used for three months is):

- `shards/<name>.parquet`: shards as they went into a run, hard links where the file system allows;
- `index/<source>/<name>.parquet`: key and fingerprint of each image of a shard, as a source listed it;
- `index/<source>/quarantine.parquet`: what a source holds that is no image;
- `shaped/<contract>/<name>.uint8`: the shard's images as a model input (see `pipelines.data.shaped_images`);
- `files/`: sources that were fetched, by content.

Files appear under their names complete or not at all, so that runs may share the cache and be killed.  Every entry is
checked against its digest before it is used; one that does not match is dropped and made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core import image_decoding, image_features
from pipelines.data.reading import UnusableFile
from pipelines.data.shards import METADATA_COLUMNS, ShardEntry, ShardImages, is_intact
from pipelines.data.sources.base import SourceItem

_ABANDONED_AFTER_S = 24 * 3600.0
_UNUSED_AFTER_S = 90 * 24 * 3600.0
_SHA256_KEY = b"shard_sha256"


@dataclass(frozen=True, slots=True)
class CachedRow:
    """Where an image that was read before lies: a cached shard and the row in it."""

    shard: ShardEntry
    row: int


class IngestCache:
    """The cache as one source sees it.

    Args:
        root: `Settings.ingest_cache_dir`.
        source_identity: tells this source from every other.
        reading: everything that changes what reading an image yields, e.g. its limits; the code's version is added.
    """

    def __init__(self, root: Path, source_identity: str, reading: str) -> None:
        text = "\0".join((source_identity, reading, code_version()))
        self._index = root / "index" / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._shards = root / "shards"
        self._root = root
        self._rows: dict[str, tuple[str, CachedRow]] = {}
        self._faults: dict[str, tuple[str, UnusableFile]] = {}
        self._sound: dict[str, bool] = {}
        self._records: tuple[str, list[dict[str, Any]]] = ("", [])
        self._images: tuple[str, ShardImages | None] = ("", None)
        for folder in (self._index, self._shards):
            folder.mkdir(parents=True, exist_ok=True)
        remove_unused(root)
        self._load()

    def find_row(self, item: SourceItem) -> CachedRow | None:
        """The image as it was read before, if the item is unchanged and its shard is sound."""
        fingerprint, row = self._rows.get(item.key, ("", None))
        if row is None or not item.fingerprint or fingerprint != item.fingerprint or not self._is_sound(row.shard):
            return None
        return row

    def find_fault(self, item: SourceItem) -> UnusableFile | None:
        """An unchanged item that was no image before."""
        fingerprint, fault = self._faults.get(item.key, ("", None))
        if fault is None or not item.fingerprint or fingerprint != item.fingerprint:
            return None
        return UnusableFile(fault.record | {"label": item.label}, lasting=True)

    def record_of(self, row: CachedRow) -> dict[str, Any]:
        """The metadata columns of a cached image.  Fast for rows asked for in their order."""
        if self._records[0] != row.shard.name:
            table = pq.read_table(self.shard_file(row.shard), columns=METADATA_COLUMNS)
            self._records = (row.shard.name, table.to_pylist())
        return dict(self._records[1][row.row])

    def image_of(self, row: CachedRow) -> bytes:
        """The encoded bytes of a cached image.  Fast for rows asked for in their order."""
        name, images = self._images
        if images is None or name != row.shard.name:
            images = ShardImages(self.shard_file(row.shard))
            self._images = (row.shard.name, images)
        return images[row.row]

    def shard_file(self, shard: ShardEntry) -> Path:
        """Where a shard lies in the cache."""
        return self._shards / shard.name

    @contextlib.contextmanager
    def new_file(self) -> Iterator[Path]:
        """A path in the cache's file system to write to; whatever is left there is removed."""
        with temporary_file(self._root) as path:
            yield path

    def keep_shard(self, written: Path, shard: ShardEntry, keys: Sequence[str], fingerprints: Sequence[str]) -> None:
        """Take a shard that was just written into the cache, and remember which items it came from."""
        written.replace(self.shard_file(shard))
        self._sound[shard.name] = True
        self.remember(shard, keys, fingerprints)

    def remember(self, shard: ShardEntry, keys: Sequence[str], fingerprints: Sequence[str]) -> None:
        """Note which items a cached shard's images are."""
        table = pa.table({"key": keys, "fingerprint": fingerprints}, schema=_index_schema())
        self._write_index(shard.name, table.replace_schema_metadata({_SHA256_KEY: shard.sha256.encode()}))

    def remember_faults(self, records: Sequence[dict[str, Any]], fingerprints: Sequence[str]) -> None:
        """Note what is no image, so that it is not read again while it is unchanged."""
        table = pa.Table.from_pylist(
            [record | {"fingerprint": mark} for record, mark in zip(records, fingerprints, strict=True)],
            schema=QUARANTINE_SCHEMA.append(pa.field("fingerprint", pa.string())),
        )
        self._write_index(_QUARANTINE_NAME, table)

    def copy_shard(self, shard: ShardEntry, folder: Path) -> None:
        """Put a cached shard into a run's folder."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._index / shard.name)
        link_or_copy(self.shard_file(shard), folder / shard.name)

    def _write_index(self, name: str, table: pa.Table) -> None:
        with self.new_file() as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
            temporary.replace(self._index / name)

    def _load(self) -> None:
        """Read the index; the newest entry of a key wins.  A file that cannot be read is dropped."""
        for file in sorted(self._index.glob("*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                table = pq.read_table(file, page_checksum_verification=True)
                fingerprints = table["fingerprint"].to_pylist()
                if file.name == _QUARANTINE_NAME:
                    records = table.drop_columns(["fingerprint"]).to_pylist()
                    found = zip(fingerprints, records, strict=True)
                    self._faults = {record["key"]: (mark, UnusableFile(record, lasting=True)) for mark, record in found}
                    continue
                shard = ShardEntry(
                    name=file.name, rows=table.num_rows, sha256=table.schema.metadata[_SHA256_KEY].decode()
                )
                keys = table["key"].to_pylist()
            except (OSError, KeyError, TypeError, ValueError):  # pyarrow's errors are ValueErrors
                file.unlink(missing_ok=True)
                continue
            for row, (key, mark) in enumerate(zip(keys, fingerprints, strict=True)):
                self._rows[key] = (mark, CachedRow(shard, row))

    def _is_sound(self, shard: ShardEntry) -> bool:
        """Whether a cached shard still holds what it was named after; checked once per run."""
        if shard.name not in self._sound:
            file = self.shard_file(shard)
            sound = is_intact(file, shard)
            if not sound:
                file.unlink(missing_ok=True)
                (self._index / shard.name).unlink(missing_ok=True)
            self._sound[shard.name] = sound
        return self._sound[shard.name]


_QUARANTINE_NAME = "quarantine.parquet"
QUARANTINE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("n_bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)


def _index_schema() -> pa.Schema:
    return pa.schema([("key", pa.string()), ("fingerprint", pa.string())])


@cache
def code_version() -> str:
    """Changes whenever the same bytes might be decoded, measured or shaped otherwise than before."""
    digest = hashlib.sha256()
    for module in (image_decoding, image_features):
        digest.update(Path(str(module.__file__)).read_bytes())
    for package in ("numpy", "pillow", "pyarrow"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def temporary_file(root: Path) -> Iterator[Path]:
    """A path below `root/temporary` that no other process writes to; removed at the end unless it was moved away."""
    folder = root / "temporary"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def remove_unused(root: Path) -> None:
    """Remove what killed processes left behind, and what no ingestion has used for three months.

    An index file's time is that of its last use; shards and shaped images live as long as an index names them.
    """
    used = set()
    for file in root.glob("index/*/*.parquet"):
        if _is_younger(file, _UNUSED_AFTER_S):
            used.add(file.stem)
        else:
            file.unlink(missing_ok=True)
    for pattern in ("shards/*", "shaped/*/*"):
        for file in root.glob(pattern):
            if file.stem not in used and not _is_younger(file, _ABANDONED_AFTER_S):
                file.unlink(missing_ok=True)
    for file in root.glob("temporary/*"):
        if not _is_younger(file, _ABANDONED_AFTER_S):
            file.unlink(missing_ok=True)


def _is_younger(file: Path, age_s: float) -> bool:
    try:
        return time.time() - file.stat().st_mtime < age_s
    except FileNotFoundError:  # another process was faster
        return False


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where the file system allows no second name."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
