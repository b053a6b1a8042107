"""The SQL database that holds the ledger and what lies beside it: SQLite on a laptop, PostgreSQL beyond."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.connection_deadline import Deadline
from pipelines.errors import Refusal

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

SQLITE_WAIT_S = 30.0
_DEADLINE = "perch_deadline"


class Database:
    """An engine whose transactions begin as `perch_begin` says, with connections that live for one call.

    Args:
        url: SQLAlchemy's.
        wait_s: how long SQLite waits for another writer; and PostgreSQL for a connection, and again for all that one
            transaction asks of it, at least 2 s each.

    Raises:
        Refusal: the URL names another kind of database than SQLite or PostgreSQL.
    """

    def __init__(self, url: str, *, wait_s: float = SQLITE_WAIT_S) -> None:
        from sqlalchemy import make_url

        parsed = make_url(url)
        self.kind = parsed.get_backend_name()
        self.shown_url = parsed.render_as_string(hide_password=True)
        if self.kind not in {"sqlite", "postgresql"}:
            raise Refusal(
                f"the ledger's database {self.shown_url}",
                self.kind,
                limit="sqlite or postgresql",
                way_out="set PERCH_DATABASE_URL to one of them, or unset it",
            )
        self.file = Path(parsed.database) if self.kind == "sqlite" and parsed.database else None
        self.engine = _create_engine(url, self.kind, wait_s)
        self._seen: tuple[int, int] | None = None

    @property
    def knows_its_schema(self) -> bool:
        """Whether the tables were found to be those of this Perch, in this very file."""
        return self._seen is not None and self._seen == self._identity()

    def remember_schema(self) -> None:
        """Do not look again: who runs while a server is upgraded goes on, as each migration lets him."""
        self._seen = self._identity()

    def forget_schema(self) -> None:
        """Look again at the next use."""
        self._seen = None

    def _identity(self) -> tuple[int, int] | None:
        if self.file is None:
            return (0, 0)
        try:
            found = self.file.stat()
        except OSError:
            return None
        return (found.st_dev, found.st_ino)

    @property
    def is_missing(self) -> bool:
        """Whether it is a file that is not there; SQLite would create it."""
        return self.file is not None and not self.file.exists()

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def _create_engine(url: str, kind: str, wait_s: float) -> Engine:
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    # One connection per call: a process appends a row or two in its life, and a fork must not inherit connections.
    if kind != "sqlite":
        return _create_postgresql_engine(url, max(2, round(wait_s)))
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": wait_s})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions by itself, and too late
        _write_ahead(connection, wait_s)
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("perch_begin", "BEGIN"))

    return engine


def _write_ahead(connection: Any, wait_s: float) -> None:
    """Switch the file to a write-ahead log, once in its life.

    SQLite waits for other writers with its busy handler, but not here: of two processes that both read a new file's
    header and want to change it, one must give way, so it is told "database is locked" at once.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY  # the low byte, below its extended codes
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _create_postgresql_engine(url: str, limit_s: int) -> Engine:
    """An engine whose transactions end within `limit_s`, whatever the server and the network do."""
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import NullPool

    # A host that is gone answers nothing at all, and the driver would wait for minutes.
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": limit_s})

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        connection = dialect.connect(*arguments, **options)
        record.info[_DEADLINE] = Deadline(connection.fileno(), limit_s)
        return connection

    @event.listens_for(engine, "close")
    def _close(_connection: object, record: Any) -> None:
        deadline = record.info.pop(_DEADLINE, None)
        if deadline is not None:
            deadline.cancel()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # The server's side of the same limit: a client that vanished must not keep the writers' lock.
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {name} = '{limit_s}s'")

    return engine
