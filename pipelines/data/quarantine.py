"""What could not be read, in words: for a refusal, for the log of a run that passed, and for `perch quarantine`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMED_IN_A_MESSAGE = 5

Record = Mapping[str, Any]


def read_quarantine(file: Path) -> list[dict[str, Any]]:
    """The rows of a quarantine table, in the order in which the source lists them."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


def count_reasons(records: Sequence[Record]) -> dict[str, int]:
    """How many files there are for each reason, the commonest first."""
    return dict(Counter(str(record["reason"]) for record in records).most_common())


def name_reasons(counts: Mapping[str, int]) -> str:
    """Counts of reasons in words, e.g. `3 corrupt, 1 truncated`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def describe_files(records: Sequence[Record]) -> str:
    """The first few files, each with its reason."""
    return name_some([f"{record['key']} ({record['reason']}: {record['detail']})" for record in records])


def name_some(names: Sequence[str]) -> str:
    """The first few of a long list."""
    rest = len(names) - _NAMED_IN_A_MESSAGE
    return "; ".join(names[:_NAMED_IN_A_MESSAGE]) + (f"; and {rest:,} more" if rest > 0 else "")
