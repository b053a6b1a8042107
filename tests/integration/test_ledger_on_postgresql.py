"""The ledger on a real PostgreSQL: the same order and the same guards as on SQLite."""

import multiprocessing
from collections.abc import Callable

import pytest

from pipelines.registry.ledger import Ledger
from tests.integration.postgresql_server import execute

pytestmark = pytest.mark.services


@pytest.fixture
def ledger(postgresql_url: str) -> Ledger:
    return Ledger(postgresql_url)


def append_many(url: str, writer: int, rows: int) -> None:
    ledger = Ledger(url)
    for n in range(rows):
        ledger.append("traffic", model="m", version=str(writer), evidence={"n": n}, key=f"{writer}:{n}")


def start(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_append__four_processes_at_once__never_fork_the_chain(postgresql_url: str, ledger: Ledger) -> None:
    # They also meet at the creation of the table.
    writers = [start(append_many, postgresql_url, writer, 15) for writer in range(4)]
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
def test_table__plain_change__is_refused_by_the_database(postgresql_url: str, ledger: Ledger, statement: str) -> None:
    append_many(postgresql_url, 0, 2)
    with pytest.raises(Exception, match="append-only"):
        execute(postgresql_url, statement)
    assert len(ledger.entries()) == 2


def test_verify__trigger_disabled_and_row_edited__names_the_row(postgresql_url: str, ledger: Ledger) -> None:
    append_many(postgresql_url, 0, 3)
    execute(
        postgresql_url,
        "ALTER TABLE perch_ledger DISABLE TRIGGER ALL; UPDATE perch_ledger SET version = '9' WHERE sequence = 2",
    )
    assert "row 2 (traffic m v9) was changed" in ledger.verify()[0]
