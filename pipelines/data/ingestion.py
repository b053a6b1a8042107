"""From a source to shards: what is listed, what is read again, what goes to quarantine, and when it is too much."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.contract import InputContract
from pipelines.data.ingest_cache import QUARANTINE_SCHEMA, CachedRow, IngestCache
from pipelines.data.parallel import map_ordered
from pipelines.data.progress import ImageProgress
from pipelines.data.quarantine import Record, count_reasons, describe_files, name_reasons, name_some
from pipelines.data.reading import ImageReader, ReadImage, UnusableFile
from pipelines.data.shaped_images import ShapedImages
from pipelines.data.shards import Manifest, ShardCutter, ShardEntry, ShardWriter
from pipelines.data.sources.base import Source, SourceItem
from pipelines.data.sources.opening import without_secrets
from pipelines.errors import Refusal
from pipelines.params import DataIngestionParams

_Outcome = ReadImage | UnusableFile | CachedRow


@dataclass(frozen=True)
class Ingested:
    """What an ingestion did: its manifest, how many images it had to read, how many it put aside for which reason."""

    manifest: Manifest
    images_read: int
    quarantined: dict[str, int]


def ingest(
    source: Source,
    params: DataIngestionParams,
    contract: InputContract,
    *,
    dataset: str,
    raw: Path,
    quarantine_file: Path,
    cache_dir: Path,
    threads: int,
) -> Ingested:
    """Read a source into shards, a manifest and a quarantine table.

    Args:
        source: what to read.
        params: limits and columns.
        contract: the shape to keep for `data_preprocessing` as the images are decoded anyway; no output depends on it.
        dataset: the data set's name, for the manifest.
        raw: folder for the shards and the manifest; emptied first.
        quarantine_file: Parquet table of what is no sound image.
        cache_dir: where earlier ingestions left what they read.
        threads: how many images are decoded at once.

    Raises:
        Refusal: the source holds nothing to train on, or too much of it is broken.
        TryLater: the source cannot be reached now; what was read so far is kept and not read again.
    """
    items = list_items(source, params)
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    reading = f"{params.max_image_pixels} {params.max_image_bytes}"
    cache = IngestCache(cache_dir, source.identity, reading)
    reader = ImageReader(
        source,
        max_pixels=params.max_image_pixels,
        max_bytes=params.max_image_bytes,
        contract=contract,
        decodes=threads,
    )
    unusable: list[tuple[SourceItem, UnusableFile]] = []
    packer = _ShardPacker(cache, ShapedImages(cache_dir, contract), ShardCutter(params.shard_images), raw)
    readers = max(threads, source.concurrent_reads)
    images_read = 0

    def read_unless_known(item_and_known: tuple[SourceItem, CachedRow | UnusableFile | None]) -> _Outcome:
        item, known = item_and_known
        return known or reader.read(item)

    with ImageProgress("reading", len(items)) as progress, packer:
        looked_up = ((item, cache.find_row(item) or cache.find_fault(item)) for item in items)
        outcomes = map_ordered(read_unless_known, looked_up, threads=readers, ahead=8 * readers)
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, UnusableFile):
                unusable.append((item, outcome))
            else:
                images_read += isinstance(outcome, ReadImage)
                packer.add(item, outcome)
            progress.advance()
        packer.finish()
    _write_quarantine(unusable, quarantine_file, cache)
    faults = [fault.record for _, fault in unusable]
    _refuse_too_much_quarantine(faults, len(items), params.max_quarantined_share, quarantine_file)
    _refuse_lost_classes(items, packer.labels, quarantine_file)
    manifest = Manifest(
        dataset=dataset,
        source=without_secrets(params.source),
        as_of=params.as_of.isoformat() if params.as_of else None,
        labels=dict(sorted(packer.labels.items())),
        rows=packer.labels.total(),
        quarantined=len(unusable),
        shards=packer.shards,
        data_sha256=packer.data_sha256,
    )
    manifest.write(raw)
    return Ingested(manifest, images_read, count_reasons(faults))


def list_items(source: Source, params: DataIngestionParams) -> list[SourceItem]:
    """What of a source is to be read: what had arrived by the date, in the order of its keys, with its groups.

    Raises:
        Refusal: nothing is left, two items share a key, or all share one class.
    """
    listed = source.list_items()
    items = [item for item in listed if params.as_of is None or item.arrived is None or item.arrived <= params.as_of]
    name = f"the source {without_secrets(params.source)}"
    if not items and listed:
        first = min(item.arrived for item in listed if item.arrived)
        raise Refusal(
            name,
            f"holds no image that had arrived by {params.as_of}",
            limit=f"the first arrived on {first}",
            way_out="choose a later data_ingestion.as_of, or null for everything",
        )
    if not items:
        raise Refusal(name, "holds no images", way_out="correct data_ingestion.source in params.yaml")
    items.sort(key=lambda item: item.key)
    repeated = [after.key for before, after in pairwise(items) if before.key == after.key]
    if repeated:
        raise Refusal(
            name,
            f"names {len(repeated)} images more than once: {name_some(repeated)}",
            limit="one row per image",
            way_out="remove the repeated rows",
        )
    labels = {item.label for item in items if item.label}
    if len(labels) < 2:
        raise Refusal(
            name,
            f"holds one class only: {', '.join(labels)}" if labels else "names no class for any image",
            limit="two classes or more",
            way_out="a classifier needs images of at least two classes, one sub-folder each",
        )
    if params.group_pattern is not None:
        pattern = re.compile(params.group_pattern)
        items = [item if item.group else replace(item, group=_group_of(item.key, pattern)) for item in items]
    return items


class _ShardPacker:
    """Packs outcomes into shards as they come, taking over from the cache every shard that would come out the same.

    A shard is written from the first image on that makes it another than a cached one; until then it is only counted.
    """

    def __init__(self, cache: IngestCache, shaped: ShapedImages, cutter: ShardCutter, raw: Path) -> None:
        self._cache, self._shaped, self._cutter, self._raw = cache, shaped, cutter, raw
        self._keys: list[str] = []
        self._fingerprints: list[str] = []
        self._unwritten: list[tuple[dict[str, Any], CachedRow]] = []
        self._shard_file: _ShardFile | None = None
        self._resources = ExitStack()
        self._digest = hashlib.sha256()
        self.shards: list[ShardEntry] = []
        self.labels: Counter[str] = Counter()

    def __enter__(self) -> _ShardPacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def data_sha256(self) -> str:
        """`Manifest.data_sha256` of all rows so far."""
        return self._digest.hexdigest()

    def add(self, item: SourceItem, outcome: ReadImage | CachedRow) -> None:
        """Take the next image, in the order of keys."""
        record, changed = (outcome.record, True) if isinstance(outcome, ReadImage) else self._recall(item, outcome)
        if self._cutter.overflows(record["n_bytes"]):
            self._end_shard()
        if isinstance(outcome, ReadImage):
            self._write().add(record, outcome.image, outcome.shaped)
        else:
            expected = CachedRow(outcome.shard, len(self._unwritten))
            if self._shard_file is None and (changed or outcome != expected or self._belongs_elsewhere(outcome)):
                self._write()
            if self._shard_file is None:
                self._unwritten.append((record, outcome))
            else:
                self._write_cached(self._shard_file, record, outcome)
        self._keys.append(item.key)
        self._fingerprints.append(item.fingerprint)
        self.labels[record["label"]] += 1
        identity = [str(record[name] or "") for name in ("key", "label", "given_split", "group", "arrived", "sha256")]
        self._digest.update(("\0".join(identity) + "\n").encode())
        if self._cutter.add(record["sha256"], record["n_bytes"]):
            self._end_shard()

    def finish(self) -> None:
        """End the last shard."""
        if self._keys:
            self._end_shard()

    def _end_shard(self) -> None:
        """Link the shard from the cache where it is there, else finish writing it."""
        if self._shard_file is None and len(self._unwritten) == self._unwritten[0][1].shard.rows:
            shard = self._unwritten[0][1].shard
        else:
            shard = self._write().keep(self._keys, self._fingerprints)
        self._cache.copy_shard(shard, self._raw)
        self.shards.append(shard)
        self._resources.close()
        self._shard_file = None
        self._keys, self._fingerprints, self._unwritten = [], [], []
        self._cutter.start_shard()

    def _recall(self, item: SourceItem, row: CachedRow) -> tuple[dict[str, Any], bool]:
        """The columns of an image that was read before, as the source lists it now, and whether that changed them."""
        before = self._cache.record_of(row)
        listed = {"label": item.label, "given_split": item.given_split, "group": item.group, "arrived": item.arrived}
        record = before | listed
        return record, record != before

    def _belongs_elsewhere(self, row: CachedRow) -> bool:
        """Whether a row comes from another cached shard than those before it."""
        return bool(self._unwritten) and self._unwritten[0][1].shard != row.shard

    def _write(self) -> _ShardFile:
        """The file of the present shard, begun where it was only counted so far."""
        if self._shard_file is None:
            self._shard_file = _ShardFile(self._cache, self._shaped, self._resources)
            for record, row in self._unwritten:
                self._write_cached(self._shard_file, record, row)
            self._unwritten = []
        return self._shard_file

    def _write_cached(self, file: _ShardFile, record: dict[str, Any], row: CachedRow) -> None:
        shaped = self._shaped.open(row.shard)
        file.add(record, self._cache.image_of(row), None if shaped is None else shaped[row.row])


class _ShardFile:
    """A shard being written, and beside it the file of its shaped images; gone with `resources` unless kept."""

    def __init__(self, cache: IngestCache, shaped: ShapedImages, resources: ExitStack) -> None:
        self._cache = cache
        self._path = resources.enter_context(cache.new_file())
        self._images = ShardWriter(self._path)
        self._shaped = resources.enter_context(shaped.new_file())

    def add(self, record: dict[str, Any], image: bytes, shaped: npt.NDArray[np.uint8] | None) -> None:
        """Append an image, and its pixels as the model will see them where they are at hand."""
        self._images.add(record, image)
        self._shaped.add(shaped)

    def keep(self, keys: Sequence[str], fingerprints: Sequence[str]) -> ShardEntry:
        """Finish both files and put them into the cache."""
        shard = self._images.close()
        self._cache.keep_shard(self._path, shard, keys, fingerprints)
        self._shaped.keep(shard)
        return shard


def _write_quarantine(unusable: Sequence[tuple[SourceItem, UnusableFile]], file: Path, cache: IngestCache) -> None:
    file.unlink(missing_ok=True)
    pq.write_table(pa.Table.from_pylist([fault.record for _, fault in unusable], schema=QUARANTINE_SCHEMA), file)
    lasting = [(item, fault) for item, fault in unusable if fault.lasting]
    cache.remember_faults([fault.record for _, fault in lasting], [item.fingerprint for item, _ in lasting])


def _refuse_too_much_quarantine(faults: Sequence[Record], total: int, max_share: float, file: Path) -> None:
    share = len(faults) / total
    if share <= max_share:
        return
    raise Refusal(
        "the images that cannot be used",
        f"{len(faults):,} of {total:,} ({share:.1%}): {name_reasons(count_reasons(faults))}; {describe_files(faults)}",
        limit=f"{max_share:.1%}, data_ingestion.max_quarantined_share",
        way_out=f"`perch quarantine` lists them all, from {file}; mend or remove them, or raise the limit",
    )


def _refuse_lost_classes(items: Sequence[SourceItem], labels: Counter[str], file: Path) -> None:
    listed = Counter(item.label for item in items if item.label)
    if lost := [f"{label} ({listed[label]} files)" for label in sorted(listed) if not labels[label]]:
        raise Refusal(
            "the images that can be used",
            f"are none of class {', '.join(lost)}",
            limit="at least one image per class",
            way_out=f"`perch quarantine` says why, from {file}; mend these files, or remove the class",
        )


def _group_of(key: str, pattern: re.Pattern[str]) -> str:
    match = pattern.search(key)
    return (match.group(1) or "") if match else ""
