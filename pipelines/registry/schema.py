"""Perch's own tables as they are now; the migrations beside this module are how a database gets there."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData

LEDGER, ROLLOUTS = "perch_ledger", "perch_rollouts"
VERSION_TABLE = "perch_schema_version"  # Alembic's own name would be MLflow's and Airflow's, too, in a shared database
REVISIONS = ("0001", "0002")  # in their order; Alembic is not imported to know them
HEAD = REVISIONS[-1]


@cache
def metadata() -> MetaData:
    """The tables, for queries and to compare a database with."""
    from sqlalchemy import BigInteger, Column, Double, Integer, MetaData, String, Table, Text

    tables = MetaData()
    # Times are text: what was hashed must come back byte for byte from either database.
    Table(
        LEDGER,
        tables,
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
    Table(
        ROLLOUTS,
        tables,
        Column("rollout_id", String(400), primary_key=True),
        Column("model", String(250), nullable=False, index=True),
        Column("open_model", String(250), nullable=True, unique=True),
        Column("sequence", Integer, nullable=False),
        Column("revision", BigInteger, nullable=False),
        Column("document", Text, nullable=False),
        Column("lease_owner", String(250), nullable=False),
        Column("lease_expires_at", Double, nullable=False),
        Column("token", BigInteger, nullable=False),
        Column("renewals", BigInteger, nullable=False),
        Column("renewed_at", Double, nullable=False),
    )
    return tables


def find_differences(connection: Connection) -> list[str]:
    """What of a database's tables is not as `metadata()` says; tables of others are not looked at."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def is_ours(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or name in metadata().tables

    context = MigrationContext.configure(
        connection, opts={"include_name": is_ours, "compare_type": True, "version_table": VERSION_TABLE}
    )
    return [str(difference) for difference in compare_metadata(context, metadata())]


def is_guarded(connection: Connection) -> bool:
    """Whether the database itself refuses to change or delete the ledger's rows."""
    from sqlalchemy import text

    if connection.dialect.name == "sqlite":
        query = f"SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND tbl_name = '{LEDGER}'"  # noqa: S608
        return int(connection.execute(text(query)).scalar_one()) >= len(("UPDATE", "DELETE"))
    query = f"SELECT count(*) FROM pg_trigger WHERE tgrelid = '{LEDGER}'::regclass AND tgenabled <> 'D'"  # noqa: S608
    return int(connection.execute(text(query)).scalar_one()) >= 1
