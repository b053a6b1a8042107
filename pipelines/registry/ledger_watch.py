"""Rows of the ledger that were changed, or taken from its end, while somebody was looking."""

from __future__ import annotations

from pipelines.core.hash_chain import Record, find_breaks, missing_anchors
from pipelines.registry.ledger import Ledger


class LedgerWatch:
    """Remembers the ledger's last row between two looks: a chain whose end was cut off is intact in itself.

    Args:
        url: of the ledger's database.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._last: Record | None = None

    def find_changes(self) -> list[str]:
        """What is wrong with the rows, one sentence each.

        Raises:
            TryLater: the database did not answer.
        """
        ledger = Ledger(self._url)
        try:
            records = ledger.entries()
        finally:
            ledger.close()
        problems = find_breaks(records)
        last = self._last
        if last is not None and missing_anchors(records, [last.row_sha256]):
            name = f"row {last.sequence} ({last.event} {last.model} v{last.version})"
            problems.append(f"{name} was the ledger's last and is gone or was rewritten")
        elif records and not problems:
            self._last = records[-1]
        return problems
