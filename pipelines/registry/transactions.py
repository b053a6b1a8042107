"""Transactions of the ledger and of the rollouts, in a database whose tables are those of this Perch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.registry.database import Database
from pipelines.registry.migration import WrongSchemaError, ensure_schema
from pipelines.registry.schema import HEAD

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table


@contextmanager
def writing(database: Database, table: Table, advisory_lock: int) -> Iterator[Connection]:
    """A transaction that no other writer of the table is in; the table exists inside it.

    Args:
        database: holds the table, or will.
        table: to be written.
        advisory_lock: PostgreSQL's, the same for every writer of the table; SQLite has one for the whole file.

    Raises:
        WrongSchemaError: the tables are those of another Perch, or somebody dropped this one.
    """
    from sqlalchemy import inspect, text

    ensure_schema(database, create=True)
    with database.engine.connect() as plain:
        connection = plain.execution_options(perch_begin="BEGIN IMMEDIATE")
        with connection.begin():
            if database.kind == "postgresql":
                # Under READ COMMITTED each statement after this one sees what the lock's last holder committed.
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": advisory_lock})
            if not inspect(connection).has_table(table.name):
                database.forget_schema()
                raise WrongSchemaError(
                    f"the ledger's database {database.shown_url}: is at {HEAD}, and its table {table.name} is gone\n"
                    "  what to do: restore a backup; Perch does not begin a new ledger where one was"
                )
            yield connection


@contextmanager
def reading(database: Database, table: Table) -> Iterator[Connection | None]:
    """A connection to read the table with; None where it is not there.

    Raises:
        WrongSchemaError: the tables are those of another Perch.
    """
    from sqlalchemy import inspect

    if not ensure_schema(database, create=False):
        yield None
        return
    with database.engine.connect() as connection:
        yield connection if inspect(connection).has_table(table.name) else None
