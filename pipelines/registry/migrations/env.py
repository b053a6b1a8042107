"""What Alembic runs for each of its commands; never imported.

`pipelines.registry.migration` passes the connection, inside a transaction that holds the lock of all who migrate.
Without it Alembic was called by itself, as `alembic revision --autogenerate -m "…"` to begin a new migration.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from pipelines.registry.database import Database
from pipelines.registry.schema import VERSION_TABLE, metadata
from pipelines.settings import get_settings


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata(),
        version_table=VERSION_TABLE,
        include_name=lambda name, kind, _parents: kind != "table" or name in metadata().tables,
        transactional_ddl=True,  # Alembic believes that SQLite's is not
    )
    with context.begin_transaction():
        context.run_migrations()


if (passed := context.config.attributes.get("connection")) is not None:
    _run(passed)
else:
    with Database(get_settings().ledger_url).engine.connect() as own:
        _run(own)
