"""Predicts what a source lists, part by part, so that a kill at any moment loses minutes and never the rest."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pyarrow as pa

from pipelines.batch_prediction.parts import Parts
from pipelines.batch_prediction.rows import FORMAT, BatchPredictor, ModelIdentity
from pipelines.core.image_limits import ImageLimits
from pipelines.data.ingest_cache import code_version
from pipelines.data.parallel import map_ordered
from pipelines.data.progress import ImageProgress
from pipelines.data.sources.base import Source, SourceItem
from pipelines.errors import Refusal
from pipelines.modeling.inference import OnnxPredictor

_PART_BATCHES = 16  # 2,048 small images, or 300 of 380 px in colour: seconds of work, kilobytes of file

# What a changed key of the binding is called; of the others only the model's own name is worth a word.
_CHANGES = {
    "listing_sha256": "the source",
    "images": "the source",
    "model": "the model",
    "model_version": "the model",
    "onnx_sha256": "the model",
    "max_pixels": "the limits",
    "max_body_bytes": "the limits",
}


@dataclass(frozen=True)
class Predicted:
    """What a batch prediction did.

    Attributes:
        images: rows of the output.
        errors: reason to number of images that could not be predicted, the most frequent first.
        resumed: images that an earlier, interrupted call had done.
    """

    images: int
    errors: dict[str, int]
    resumed: int

    @property
    def summary(self) -> str:
        """One line for a person."""
        unreadable = sum(self.errors.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.errors.items())
        return f"{self.images - unreadable:,} predicted, {unreadable:,} unreadable" + (
            f": {reasons}" if reasons else ""
        )


def predict_source(
    source: Source,
    model_file: Path,
    identity: ModelIdentity,
    out: Path,
    *,
    limits: ImageLimits,
    threads: int,
    name: str,
    say: Callable[[str], object] = print,
) -> Predicted:
    """Write one Parquet file with a row per image, in the order in which the source lists them.

    Called again after a kill it goes on, and the file has the same bytes as without the kill: batches are cut from the
    listing, never from what happens to be ready.  Memory holds `threads` batches, and one record per image listed.

    Args:
        source: the images.
        model_file: ONNX, with its contract.
        identity: of the model.
        out: the file to write; it appears complete.
        limits: what an image may be.
        threads: batches under way at once.
        name: of the source, for messages.
        say: told what a reader should know besides the progress.

    Raises:
        Refusal: nothing is listed or readable, `out` holds something else, or the model cannot be used.
        TryLater: another process writes this file, or the source cannot be reached now; what was done is kept.
    """
    predictor = OnnxPredictor(model_file)
    parts = Parts(out)
    with parts.locked():
        items = source.list_items()
        if not items:
            raise Refusal(name, "holds no file", limit="at least one image")
        readers = max(1, math.ceil(source.concurrent_reads / threads))
        batches = BatchPredictor(source, predictor, identity, limits, readers=readers)
        changed = parts.begin(_binding(source, items, predictor, identity, limits))
        if changed:
            causes = dict.fromkeys(_CHANGES.get(key, "Perch or a package") for key in changed.split(", "))
            say(f"{' and '.join(causes)} changed since {out.name} was begun: starting over")
        cut = _cut(items, predictor.batch_images)
        errors: Counter[str] = Counter()
        left: list[int] = []
        for number, part_batches in enumerate(cut):
            done = parts.find(number, sum(map(len, part_batches)))
            if done is None:
                left.append(number)
            else:
                _count_errors(done, errors)
        waiting = sum(len(batch) for number in left for batch in cut[number])
        resumed = len(items) - waiting
        if resumed:
            say(f"going on: {resumed:,} of {len(items):,} images were done before")
        with ImageProgress("predicting", waiting) as progress:
            work = (batch for number in left for batch in cut[number])
            tables = map_ordered(batches.predict, work, threads=threads, ahead=4 * threads)
            for number in left:
                part = pa.concat_tables(_counted(islice(tables, len(cut[number])), progress))
                parts.write(number, part)
                _count_errors(part, errors)
        if errors.total() == len(items):
            parts.remove()
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in errors.most_common())
            raise Refusal(name, f"holds no readable image: {reasons}", limit="at least one")
        parts.assemble(len(cut), batches.schema)
    return Predicted(len(items), dict(errors.most_common()), resumed)


def _counted(tables: Iterator[pa.Table], progress: ImageProgress) -> Iterator[pa.Table]:
    for table in tables:
        progress.advance(table.num_rows)
        yield table


def _count_errors(part: pa.Table, errors: Counter[str]) -> None:
    errors.update(reason for reason in part["error"].to_pylist() if reason is not None)


def _cut(items: Sequence[SourceItem], batch_images: int) -> list[list[list[SourceItem]]]:
    """Items in batches, and batches in parts."""
    batches = [list(items[start : start + batch_images]) for start in range(0, len(items), batch_images)]
    return [batches[start : start + _PART_BATCHES] for start in range(0, len(batches), _PART_BATCHES)]


def _binding(
    source: Source,
    items: Sequence[SourceItem],
    predictor: OnnxPredictor,
    identity: ModelIdentity,
    limits: ImageLimits,
) -> dict[str, str | int]:
    """Everything that the bytes of a part depend on."""
    listing = hashlib.sha256(source.identity.encode())
    for item in items:
        fields = (item.key, item.location, str(item.n_bytes), item.fingerprint, item.fault)
        listing.update("\0".join(("", *fields)).encode())
    return {
        "format": FORMAT.decode(),
        "listing_sha256": listing.hexdigest(),
        "images": len(items),
        "model": identity.name,
        "model_version": identity.version,
        "onnx_sha256": identity.onnx_sha256,
        "max_pixels": limits.max_pixels,
        "max_body_bytes": limits.max_body_bytes,
        "batch_images": predictor.batch_images,
        "part_batches": _PART_BATCHES,
        "code": code_version(),
        "onnxruntime": version("onnxruntime"),
    }
