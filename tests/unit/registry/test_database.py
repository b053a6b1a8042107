"""A database's connections: what they wait for, and for how long."""

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from pipelines.registry.database import Database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def writer(path: Path) -> Iterator[sqlite3.Connection]:
    """Someone in the midst of a write to a file that has no write-ahead log yet."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        connection.execute("CREATE TABLE kept (row INTEGER)")
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def journal_mode(path: Path, wait_s: float) -> str:
    with Database(f"sqlite:///{path}", wait_s=wait_s).engine.connect() as connection:
        return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())


def test_connect__another_writes_to_a_file_without_a_write_ahead_log__waits_for_him(
    path: Path, writer: sqlite3.Connection
) -> None:
    with ThreadPoolExecutor() as pool:
        mode = pool.submit(journal_mode, path, 30.0)
        time.sleep(0.3)
        assert not mode.done()
        writer.execute("COMMIT")
        assert mode.result() == "wal"


def test_connect__another_writes_for_longer_than_the_limit__says_that_it_is_locked(
    path: Path, writer: sqlite3.Connection
) -> None:
    with pytest.raises(OperationalError, match="database is locked"):
        journal_mode(path, 0.2)
    assert writer.in_transaction
