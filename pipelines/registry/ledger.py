"""The ledger: an append-only, hash-chained table of what happened to each model version, and on which evidence.

It is the authority over MLflow's aliases, which anybody with write access can move without a trace.  SQLite on a
laptop, PostgreSQL beyond.  Writers take turns by a lock of the database, so that two at once cannot fork the chain,
and triggers refuse an UPDATE or DELETE; who can drop the triggers is found out by the hashes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipelines.core.hash_chain import Record, canonical_json, find_breaks, link
from pipelines.core.patience import be_patient
from pipelines.errors import Refusal
from pipelines.registry.database import Database
from pipelines.registry.schema import LEDGER, metadata
from pipelines.registry.transactions import reading, writing

if TYPE_CHECKING:
    from sqlalchemy import Connection

Event = Literal["registered", "packaged", "staged", "staging_failed", "approved", "traffic", "promoted", "rolled_back"]
T = TypeVar("T")

_ADVISORY_LOCK = 0x7065726368  # "perch"; any number will do, as long as every writer takes the same


class Ledger:
    """The ledger behind one SQLAlchemy URL.

    Raises:
        Refusal: the URL names another kind of database than SQLite or PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self.kind, self.shown_url = self._database.kind, self._database.shown_url
        self._table = metadata().tables[LEDGER]

    def append(
        self, event: Event, *, model: str, version: str, evidence: dict[str, Any], key: str, now: datetime | None = None
    ) -> Record:
        """Record an event once.

        Args:
            event: what happened.
            model: name of the registered model.
            version: its version in the registry.
            evidence: what the event rests on, as a JSON tree.
            key: identifies the event; a second call with the same key adds nothing.
            now: time of the event; the present when None.

        Returns:
            The record, which may be one of an earlier call.

        Raises:
            Refusal: the key is taken by a record with other evidence.
            TryLater: the database did not answer, or was locked all the time, or has another Perch's tables.
        """
        canonical = canonical_json(evidence)

        def write() -> Record:
            with writing(self._database, self._table, _ADVISORY_LOCK) as connection:
                known = self._find(connection, key)
                if known is not None:
                    return known
                occurred_at = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="microseconds")
                record = link(
                    self._last(connection),
                    occurred_at=occurred_at,
                    key=key,
                    model=model,
                    version=version,
                    event=event,
                    evidence=evidence,
                )
                connection.execute(self._table.insert().values(**vars(record)))
                return record

        record = self._patiently(write)
        if record.evidence != canonical:
            raise Refusal(
                f"the ledger's row {record.sequence} ({key})",
                "holds other evidence than is to be recorded now",
                limit="one event, one evidence: the ledger is never rewritten",
                way_out=f"compare them with `perch ledger --model {model} --evidence`; a changed model needs a new run",
            )
        return record

    def entries(self, model: str | None = None) -> list[Record]:
        """All records in their order, or those of one model; none where there is no ledger yet.

        Raises:
            TryLater: the database did not answer.
        """

        def read() -> list[Record]:
            from sqlalchemy import select

            query = select(self._table).order_by(self._table.c.sequence)
            if model is not None:
                query = query.where(self._table.c.model == model)
            with reading(self._database, self._table) as connection:
                if connection is None:
                    return []
                return [Record(**row) for row in connection.execute(query).mappings()]

        return self._patiently(read)

    def verify(self) -> list[str]:
        """Every break of the chain as a sentence; see `hash_chain` for what a chain cannot show.

        Raises:
            TryLater: the database did not answer.
        """
        return find_breaks(self.entries())

    def close(self) -> None:
        """Give the connections back."""
        self._database.close()

    def _find(self, connection: Connection, key: str) -> Record | None:
        from sqlalchemy import select

        row = connection.execute(select(self._table).where(self._table.c.key == key)).mappings().one_or_none()
        return Record(**row) if row else None

    def _last(self, connection: Connection) -> Record | None:
        from sqlalchemy import select

        query = select(self._table).order_by(self._table.c.sequence.desc()).limit(1)
        row = connection.execute(query).mappings().one_or_none()
        return Record(**row) if row else None

    def _patiently(self, operation: Callable[[], T]) -> T:
        from sqlalchemy.exc import OperationalError

        return be_patient(
            operation,
            transient=lambda error: isinstance(error, OperationalError),
            name=f"the ledger's database {self.shown_url}",
        )
