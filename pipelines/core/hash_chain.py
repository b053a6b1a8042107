"""A chain of records in which each holds the hash of the one before, so that the past cannot be edited unseen.

Pure functions over values: where the records are kept is the business of `pipelines.registry.ledger`.

What the chain shows by itself: a record that was edited, inserted, deleted or moved, anywhere before the last one.
What it cannot show: records cut off at the end, or an end that was rewritten together with all its hashes.  For that,
someone must have noted a hash of the chain elsewhere (an anchor); `missing_anchors` compares such notes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GENESIS = "0" * 64  # the predecessor of the first record


def canonical_json(tree: Any) -> str:
    """Render a JSON tree so that equal trees give equal text: keys sorted, no spaces, ASCII.

    Raises:
        ValueError: the tree holds NaN or an infinity, which JSON has no words for.
    """
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, as 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Record:
    """One link of the chain.

    Attributes:
        sequence: 1 for the first record, without gaps.
        occurred_at: UTC, ISO 8601 with microseconds.
        key: what may be recorded only once, e.g. `registered:digits-classification:3`.
        model: name of the registered model.
        version: its version in the registry.
        event: what happened, e.g. `registered`.
        evidence: canonical JSON of what the event rests on.
        evidence_sha256: of `evidence`; this, not the text, enters the record's own hash.
        previous_sha256: `row_sha256` of the record before, `GENESIS` for the first.
        row_sha256: of all fields above except `evidence`.
    """

    sequence: int
    occurred_at: str
    key: str
    model: str
    version: str
    event: str
    evidence: str
    evidence_sha256: str
    previous_sha256: str
    row_sha256: str

    def compute_sha256(self) -> str:
        """What `row_sha256` must be."""
        fields = asdict(self)
        del fields["evidence"], fields["row_sha256"]
        return sha256_text(canonical_json(fields))


def link(
    previous: Record | None, *, occurred_at: str, key: str, model: str, version: str, event: str, evidence: Any
) -> Record:
    """Make the record that follows `previous` (None: the first of a chain)."""
    text = canonical_json(evidence)
    unsigned = Record(
        sequence=previous.sequence + 1 if previous else 1,
        occurred_at=occurred_at,
        key=key,
        model=model,
        version=version,
        event=event,
        evidence=text,
        evidence_sha256=sha256_text(text),
        previous_sha256=previous.row_sha256 if previous else GENESIS,
        row_sha256="",
    )
    return Record(**{**asdict(unsigned), "row_sha256": unsigned.compute_sha256()})


def find_breaks(records: Sequence[Record]) -> list[str]:
    """Check a whole chain, first record first.

    Returns:
        One sentence per problem, in the order of the chain; empty when it is intact.
    """
    problems = []
    previous: Record | None = None
    for record in records:
        row = f"row {record.sequence} ({record.event} {record.model} v{record.version})"
        expected = previous.sequence + 1 if previous else 1
        if record.sequence > expected:
            gap = f"row {expected}" if record.sequence == expected + 1 else f"rows {expected}-{record.sequence - 1}"
            problems.append(f"{gap} missing before {row}")
        elif record.sequence < expected:
            problems.append(f"{row} stands where row {expected} belongs")
        if sha256_text(record.evidence) != record.evidence_sha256:
            problems.append(f"{row}: its evidence was changed; it hashes to another value than was recorded")
        if record.compute_sha256() != record.row_sha256:
            problems.append(f"{row} was changed; it hashes to another value than was recorded")
        before = previous.row_sha256 if previous else GENESIS
        if record.previous_sha256 != before:
            problems.append(
                f"{row} follows a row with hash {record.previous_sha256[:12]}, but the row before it has {before[:12]}"
            )
        previous = record
    return problems


def missing_anchors(records: Iterable[Record], anchors: Iterable[str]) -> list[str]:
    """Those of the hashes noted elsewhere that no record has any more: the chain's end was cut off or rewritten."""
    known = {record.row_sha256 for record in records}
    return [anchor for anchor in anchors if anchor not in known]
