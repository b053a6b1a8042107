"""Brings a database's tables to what this Perch knows, once, whoever comes first; and back, where no row is lost.

A SQLite file is its user's own and is brought up to date by whatever uses it next.  A PostgreSQL server is used by
several processes at a time, old and new: the first one fills it, and from then on only `perch db upgrade` changes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import Refusal, TryLater
from pipelines.registry.database import Database
from pipelines.registry.schema import HEAD, REVISIONS, VERSION_TABLE, find_differences, is_guarded, metadata

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy import Connection

MIGRATION_LIMIT_S = 600.0  # for the commands; whoever migrates in passing has the limits of his own connection

_ADVISORY_LOCK = 0x706572636A  # the number after the rollouts'
_LOCK_TIMEOUT_S = 10
_one_at_a_time = threading.Lock()  # Alembic keeps what it is doing in its modules


class WrongSchemaError(TryLater):
    """The database's tables are not those of this Perch; another Perch, or `perch db upgrade`, can go on."""


@dataclass(frozen=True)
class Schema:
    """What a database holds.

    Attributes:
        revision: of the last migration that was applied; empty where none was.
        tables: those of Perch that are there.
    """

    revision: str
    tables: frozenset[str]

    @property
    def is_current(self) -> bool:
        """Whether its tables are those that this Perch reads and writes."""
        return self.revision == HEAD

    @property
    def is_empty(self) -> bool:
        """Whether nothing of Perch's was ever there."""
        return not self.revision and not self.tables

    @property
    def is_newer(self) -> bool:
        """Whether a migration was applied that this Perch does not know."""
        return bool(self.revision) and self.revision not in REVISIONS

    def __str__(self) -> str:
        """Its revision, for a person."""
        if self.revision:
            return self.revision
        return "empty" if self.is_empty else f"from before the migrations ({', '.join(sorted(self.tables))})"


def read_schema(database: Database) -> Schema:
    """Look at a database; a file that is not there stays so."""
    if database.is_missing:
        return Schema("", frozenset())
    with database.engine.connect() as connection:
        return _read(connection)


def ensure_schema(database: Database, *, create: bool) -> bool:
    """See that the tables are those of this Perch; bring a SQLite file, or an empty database, to them.

    Args:
        database: what is about to be used.
        create: make the tables in an empty database.

    Returns:
        Whether they are there.

    Raises:
        WrongSchemaError: they are others, and not to be changed in passing.
    """
    if database.is_missing and not create:
        return False
    if database.knows_its_schema:
        return True
    if create and database.file is not None:
        database.file.parent.mkdir(parents=True, exist_ok=True)
    schema = read_schema(database)
    if schema.is_empty and not create:
        return False
    if not schema.is_current:
        if schema.is_newer:
            raise WrongSchemaError(f"{_newer(database, schema)}\n  what to do: {_NEWER_WAY_OUT}")
        if database.kind != "sqlite" and not schema.is_empty:
            raise WrongSchemaError(
                f"the ledger's database {database.shown_url}: is at {schema}, and this Perch needs {HEAD}\n"
                "  what to do: `perch db upgrade`, once, after a backup"
            )
        upgrade(database)
    database.remember_schema()
    return True


def upgrade(database: Database) -> tuple[Schema, Schema]:
    """Apply what is missing, all of it or nothing; nothing where another process did it meanwhile.

    Returns:
        Before and after.

    Raises:
        Refusal: it is newer than this Perch, or its tables are not those that Perch made.
    """
    from alembic import command

    if database.file is not None:
        database.file.parent.mkdir(parents=True, exist_ok=True)
    with _migrating(database) as connection:
        before = _read(connection)
        if before.is_newer:
            raise Refusal(_newer(database, before), f"newest known {HEAD}", way_out=_NEWER_WAY_OUT)
        if before.is_current:
            return before, before
        command.upgrade(_config(connection), "head")
        if not before.revision and before.tables:
            _refuse_other_tables(database, connection)
        if not is_guarded(connection):
            raise Refusal(
                f"the ledger in {database.shown_url}",
                "would lose the triggers that guard its rows",
                way_out="nothing was changed; a migration of Perch has to put them back, so report it",
            )
        return before, _read(connection)


def downgrade(database: Database, revision: str) -> tuple[Schema, Schema]:
    """Take migrations back, down to a revision, all of them or none.

    Args:
        database: to be changed.
        revision: one of `REVISIONS` before the present one, or `base`.

    Returns:
        Before and after.

    Raises:
        Refusal: there is no such revision below the present one, or rows would be lost.
    """
    from alembic import command

    if database.is_missing:  # SQLite would make the file
        _refuse_unless_below(database, read_schema(database), revision)
    with _migrating(database) as connection:
        before = _read(connection)
        if before.is_newer:
            raise Refusal(_newer(database, before), f"newest known {HEAD}", way_out=_NEWER_WAY_OUT)
        _refuse_unless_below(database, before, revision)
        command.downgrade(_config(connection), revision)
        return before, _read(connection)


@contextmanager
def _migrating(database: Database) -> Iterator[Connection]:
    """A transaction that no other one who migrates this database is in."""
    from sqlalchemy import text

    with _one_at_a_time, database.engine.connect() as plain:
        connection = plain.execution_options(perch_begin="BEGIN IMMEDIATE")
        with connection.begin():
            if database.kind == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _ADVISORY_LOCK})
                # Whoever waits for a table makes all others wait behind him.
                connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'"))
            yield connection


def _read(connection: Connection) -> Schema:
    from sqlalchemy import inspect, text

    there = inspect(connection).get_table_names()
    revision = ""
    if VERSION_TABLE in there:
        query = f"SELECT version_num FROM {VERSION_TABLE}"  # noqa: S608
        revision = connection.execute(text(query)).scalar_one_or_none() or ""
    return Schema(revision, frozenset(metadata().tables) & set(there))


def _refuse_unless_below(database: Database, present: Schema, revision: str) -> None:
    below = ("base", *REVISIONS[: REVISIONS.index(present.revision)]) if present.revision else ()
    if revision not in below:
        raise Refusal(
            f"the revision {revision}",
            f"is not below {present}, where {database.shown_url} is",
            limit=", ".join(below) or "none",
            way_out="`perch db current` shows where it is",
        )


def _refuse_other_tables(database: Database, connection: Connection) -> None:
    if differences := find_differences(connection):
        raise Refusal(
            f"the tables in {database.shown_url}",
            f"are not those that Perch made: {differences[0]}",
            limit="the ledger's and the rollouts' tables as they were before the migrations",
            way_out="nothing was changed; give Perch a database, or a schema of one, of its own",
        )


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _newer(database: Database, schema: Schema) -> str:
    return f"the ledger's database {database.shown_url}: is at {schema.revision}, which this Perch does not know"


_NEWER_WAY_OUT = "use the Perch that upgraded it, or one after that; nothing was changed"
