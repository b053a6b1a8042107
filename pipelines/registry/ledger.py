"""The ledger: an append-only, hash-chained table of what happened to each model version, and on which evidence.

It is the authority over MLflow's aliases, which anybody with write access can move without a trace.  SQLite on a
laptop, PostgreSQL beyond.  Writers take turns by a lock of the database, so that two at once cannot fork the chain,
and triggers refuse an UPDATE or DELETE; who can drop the triggers is found out by the hashes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipelines.core.hash_chain import Record, canonical_json, find_breaks, link
from pipelines.errors import Refusal
from pipelines.registry.database import Database
from pipelines.registry.patience import be_patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Executable, Table

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
        self._engine = self._database.engine
        self.kind, self.shown_url = self._database.kind, self._database.shown_url
        self._table = _define_table()

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
            TryLater: the database did not answer, or was locked all the time.
        """
        canonical = canonical_json(evidence)

        def write() -> Record:
            with self._writing() as connection:
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
            from sqlalchemy import inspect, select

            if self._database.is_missing:
                return []
            query = select(self._table).order_by(self._table.c.sequence)
            if model is not None:
                query = query.where(self._table.c.model == model)
            with self._engine.connect() as connection:
                if not inspect(connection).has_table(self._table.name):
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

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that no other writer is in; the table exists inside it."""
        from sqlalchemy import inspect, text

        if self._database.file is not None:
            self._database.file.parent.mkdir(parents=True, exist_ok=True)
        with self._engine.connect() as plain:
            connection = plain.execution_options(perch_begin="BEGIN IMMEDIATE")
            with connection.begin():
                if self.kind == "postgresql":
                    # Under READ COMMITTED each statement after this one sees what the lock's last holder committed.
                    connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _ADVISORY_LOCK})
                if not inspect(connection).has_table(self._table.name):
                    for statement in _schema_statements(self._table, self.kind):
                        connection.execute(statement)
                yield connection

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


def _define_table() -> Table:
    from sqlalchemy import Column, Integer, MetaData, String, Table, Text

    # Times are text: what was hashed must come back byte for byte from either database.
    return Table(
        "perch_ledger",
        MetaData(),
        Column("sequence", Integer, primary_key=True, autoincrement=False),
        Column("occurred_at", String(40), nullable=False),
        Column("key", String(500), nullable=False, unique=True),
        Column("model", String(250), nullable=False),
        Column("version", String(50), nullable=False),
        Column("event", String(50), nullable=False),
        Column("evidence", Text, nullable=False),
        Column("evidence_sha256", String(64), nullable=False),
        Column("previous_sha256", String(64), nullable=False, unique=True),  # a fork would name one row twice
        Column("row_sha256", String(64), nullable=False, unique=True),
    )


def _schema_statements(table: Table, kind: str) -> list[Executable]:
    """Statements that make the table and the triggers that guard it."""
    from sqlalchemy import text
    from sqlalchemy.schema import CreateTable

    if kind == "sqlite":
        triggers = [
            f"CREATE TRIGGER {table.name}_no_{action.lower()} BEFORE {action} ON {table.name} "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            for action in ("UPDATE", "DELETE")
        ]
    else:
        function = f"{table.name}_is_append_only"
        triggers = [
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
            f"CREATE TRIGGER {function} BEFORE UPDATE OR DELETE OR TRUNCATE ON {table.name} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {function}()",
        ]
    return [CreateTable(table), *map(text, triggers)]
