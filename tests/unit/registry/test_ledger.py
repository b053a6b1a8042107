"""The ledger on a real SQLite file: order, concurrency, kills, and tampering of every kind."""

import multiprocessing
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.core import patience
from pipelines.core.hash_chain import GENESIS, Record
from pipelines.errors import Refusal, TryLater
from pipelines.registry.ledger import Ledger

FIELDS = ", ".join(Record.__dataclass_fields__)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.db"


@pytest.fixture
def ledger(file: Path) -> Ledger:
    return Ledger(f"sqlite:///{file}")


def fill(ledger: Ledger, rows: int) -> list[Record]:
    return [
        ledger.append("registered", model="digits", version=str(n), evidence={"n": n}, key=f"registered:digits:{n}")
        for n in range(1, rows + 1)
    ]


def tamper(file: Path, *statements: str) -> None:
    """What somebody with the database's password can do: drop the triggers first, then anything."""
    with sqlite3.connect(file) as connection:
        for action in ("update", "delete"):
            connection.execute(f"DROP TRIGGER perch_ledger_no_{action}")
        for statement in statements:
            connection.execute(statement)


def test_append__three_events__make_an_intact_chain(ledger: Ledger) -> None:
    rows = fill(ledger, 3)
    assert ledger.entries() == rows
    assert [row.sequence for row in rows] == [1, 2, 3]
    assert [row.previous_sha256 for row in rows] == [GENESIS, rows[0].row_sha256, rows[1].row_sha256]
    assert ledger.verify() == []


def test_append__same_key_twice__adds_one_row(ledger: Ledger) -> None:
    first = ledger.append("registered", model="m", version="1", evidence={"a": 1}, key="k")
    again = ledger.append("registered", model="m", version="1", evidence={"a": 1}, key="k")
    assert first == again
    assert ledger.entries() == [first]


def test_append__same_key_other_evidence__is_refused(ledger: Ledger) -> None:
    ledger.append("registered", model="m", version="1", evidence={"a": 1}, key="k")
    with pytest.raises(Refusal, match="other evidence"):
        ledger.append("registered", model="m", version="1", evidence={"a": 2}, key="k")
    assert len(ledger.entries()) == 1


def test_entries__no_ledger_yet__are_none_and_no_file_appears(ledger: Ledger, file: Path) -> None:
    assert ledger.entries() == []
    assert ledger.verify() == []
    assert not file.exists()


def test_entries__one_model__leaves_others_out(ledger: Ledger) -> None:
    fill(ledger, 2)
    ledger.append("registered", model="cells", version="1", evidence={}, key="registered:cells:1")
    assert [row.model for row in ledger.entries("cells")] == ["cells"]


@pytest.mark.parametrize(
    "statement", ["UPDATE perch_ledger SET version = '9' WHERE sequence = 2", "DELETE FROM perch_ledger"]
)
def test_table__plain_update_or_delete__is_refused_by_the_database(ledger: Ledger, file: Path, statement: str) -> None:
    fill(ledger, 3)
    with sqlite3.connect(file) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    assert ledger.verify() == []


@pytest.mark.parametrize(
    ("statements", "sign"),
    [
        (["UPDATE perch_ledger SET version = '9' WHERE sequence = 2"], "row 2 .* was changed"),
        (["UPDATE perch_ledger SET evidence = '{}' WHERE sequence = 2"], "row 2 .* evidence was changed"),
        (["UPDATE perch_ledger SET occurred_at = '2020' WHERE sequence = 4"], "row 4 .* was changed"),
        (["DELETE FROM perch_ledger WHERE sequence = 2"], "row 2 missing before row 3"),
        (
            [
                "UPDATE perch_ledger SET sequence = 99 WHERE sequence = 2",
                "UPDATE perch_ledger SET sequence = 2 WHERE sequence = 3",
                "UPDATE perch_ledger SET sequence = 3 WHERE sequence = 99",
            ],
            "row 2 .* was changed",
        ),
        (
            [
                "UPDATE perch_ledger SET sequence = sequence + 100 WHERE sequence > 2",
                f"INSERT INTO perch_ledger ({FIELDS}) SELECT 3, occurred_at, 'forged', model, version, 'approved', "
                "evidence, evidence_sha256, 'y', 'x' FROM perch_ledger WHERE sequence = 2",
                "UPDATE perch_ledger SET sequence = sequence - 99 WHERE sequence > 100",
            ],
            "row 3 .* was changed",
        ),
    ],
    ids=["edited", "evidence", "last row edited", "deleted", "reordered", "inserted"],
)
def test_verify__tampered_table__names_the_row(ledger: Ledger, file: Path, statements: list[str], sign: str) -> None:
    fill(ledger, 4)
    tamper(file, *statements)
    assert any(re.search(sign, problem) for problem in ledger.verify()), ledger.verify()


def _append_many(url: str, writer: int, rows: int) -> None:
    ledger = Ledger(url)
    for n in range(rows):
        ledger.append("traffic", model="m", version=str(writer), evidence={"n": n}, key=f"{writer}:{n}")


def _start(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_append__four_processes_at_once__never_fork_the_chain(ledger: Ledger, file: Path) -> None:
    writers = [_start(_append_many, f"sqlite:///{file}", writer, 15) for writer in range(4)]
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    assert len(ledger.entries()) == 60
    assert ledger.verify() == []


def test_append__writer_killed_any_time__leaves_an_intact_chain(ledger: Ledger, file: Path) -> None:
    process = _start(_append_many, f"sqlite:///{file}", 0, 100_000)
    deadline = time.monotonic() + 30
    while len(ledger.entries()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(10)
    written = len(ledger.entries())
    assert ledger.verify() == []
    fill(ledger, 1)
    assert len(ledger.entries()) == written + 1
    assert ledger.verify() == []


def test_append__file_cannot_be_opened__asks_to_try_later(
    ledger: Ledger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    file.parent.mkdir()
    file.mkdir()
    with pytest.raises(TryLater, match="ledger's database sqlite"):
        fill(ledger, 1)


def test_ledger__unknown_database__is_refused_without_its_password() -> None:
    with pytest.raises(Refusal, match="sqlite or postgresql") as refusal:
        Ledger("mysql://user:secret@host/db")
    assert "secret" not in str(refusal.value)


def test_ledger__unreachable_server__asks_to_try_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    with pytest.raises(TryLater) as error:
        Ledger("postgresql+psycopg://perch:secret@127.0.0.1:1/perch").entries()
    assert "127.0.0.1:1" in str(error.value)
    assert "secret" not in str(error.value)
