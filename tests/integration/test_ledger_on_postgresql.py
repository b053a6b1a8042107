"""The ledger on a real PostgreSQL: the same order and the same guards as on SQLite."""

import multiprocessing
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from pipelines.registry.ledger import Ledger

pytestmark = pytest.mark.services


def find_binaries() -> Path | None:
    """The newest installation's programs; distributions keep `initdb` off the PATH."""
    on_path = shutil.which("initdb")
    candidates = (
        [Path(on_path).resolve().parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((folder for folder in candidates if (folder / "initdb").is_file()), None)


def drop_privileges() -> dict[str, object]:
    """PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return {}
    try:
        account = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no account postgres")
    return {"user": account.pw_uid, "group": account.pw_gid}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    from sqlalchemy.exc import OperationalError

    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    account = drop_privileges()
    # Not under tmp_path, which only its owner may enter; and a Unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="perch-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o777)
        run = partial(subprocess.run, check=True, cwd=name, stdout=subprocess.DEVNULL, **account)  # type: ignore[call-overload]
        run([binaries / "initdb", "-D", folder / "data", "-U", "perch", "--auth=trust", "-N"])
        server = subprocess.Popen(  # type: ignore[call-overload]
            [binaries / "postgres", "-D", folder / "data", "-k", name, "-c", "listen_addresses=", "-c", "fsync=off"],
            cwd=name,
            stderr=subprocess.DEVNULL,
            **account,
        )
        try:
            url = f"postgresql+psycopg://perch@/postgres?host={name}"
            while True:
                try:
                    execute(url, "SELECT 1")
                    break
                except OperationalError:
                    assert server.poll() is None, "PostgreSQL ended while starting"
                    time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def execute(url: str, statement: str) -> None:
    from sqlalchemy import create_engine, text

    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()


@pytest.fixture
def ledger(url: str) -> Ledger:
    execute(url, "DROP TABLE IF EXISTS perch_ledger")
    return Ledger(url)


def append_many(url: str, writer: int, rows: int) -> None:
    ledger = Ledger(url)
    for n in range(rows):
        ledger.append("traffic", model="m", version=str(writer), evidence={"n": n}, key=f"{writer}:{n}")


def start(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_append__four_processes_at_once__never_fork_the_chain(url: str, ledger: Ledger) -> None:
    # They also meet at the creation of the table.
    writers = [start(append_many, url, writer, 15) for writer in range(4)]
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    assert len(ledger.entries()) == 60
    assert ledger.verify() == []


def test_append__same_key_twice__adds_one_row(ledger: Ledger) -> None:
    assert ledger.entries() == []
    first = ledger.append("registered", model="m", version="1", evidence={"é": 0.1}, key="k")
    assert ledger.append("registered", model="m", version="1", evidence={"é": 0.1}, key="k") == first
    assert ledger.entries() == [first]
    assert ledger.verify() == []


@pytest.mark.parametrize(
    "statement",
    ["UPDATE perch_ledger SET version = '9'", "DELETE FROM perch_ledger", "TRUNCATE perch_ledger"],
)
def test_table__plain_change__is_refused_by_the_database(url: str, ledger: Ledger, statement: str) -> None:
    append_many(url, 0, 2)
    with pytest.raises(Exception, match="append-only"):
        execute(url, statement)
    assert len(ledger.entries()) == 2


def test_verify__trigger_disabled_and_row_edited__names_the_row(url: str, ledger: Ledger) -> None:
    append_many(url, 0, 3)
    execute(
        url, "ALTER TABLE perch_ledger DISABLE TRIGGER ALL; UPDATE perch_ledger SET version = '9' WHERE sequence = 2"
    )
    assert "row 2 (traffic m v9) was changed" in ledger.verify()[0]
