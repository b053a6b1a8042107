"""What somebody did to the ledger's rows between two looks."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from pipelines.registry.ledger import Ledger
from pipelines.registry.ledger_watch import LedgerWatch


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def append(url: str, *numbers: int) -> None:
    ledger = Ledger(url)
    for number in numbers:
        ledger.append("registered", model="m", version=str(number), evidence={"n": number}, key=f"k{number}")
    ledger.close()


def edit(url: str, statement: str) -> None:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        for name in ("update", "delete"):
            database.execute(f"DROP TRIGGER IF EXISTS perch_ledger_no_{name}")
        database.execute(statement)
    database.close()


def test_find_changes__rows_are_only_added__finds_nothing(url: str) -> None:
    watch = LedgerWatch(url)
    assert watch.find_changes() == [], "no ledger yet"
    for number in (1, 2, 3):
        append(url, number)
        assert watch.find_changes() == []


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE perch_ledger SET evidence = '{}' WHERE sequence = 1", "row 1 (registered m v1): its evidence was"),
        ("DELETE FROM perch_ledger WHERE sequence = 2", "row 2 missing before row 3"),
        ("DELETE FROM perch_ledger WHERE sequence > 1", "row 3 (registered m v3) was the ledger's last and is gone"),
        ("DROP TABLE perch_ledger", "row 3 (registered m v3) was the ledger's last and is gone"),
    ],
)
def test_find_changes__by_hand__are_named_until_they_are_mended(url: str, statement: str, words: str) -> None:
    append(url, 1, 2, 3)
    watch = LedgerWatch(url)
    assert watch.find_changes() == []
    edit(url, statement)
    for _ in range(2):
        assert any(problem.startswith(words) for problem in watch.find_changes())


def test_find_changes__end_is_cut_off_and_written_anew__is_seen_by_who_had_looked_before(url: str) -> None:
    append(url, 1, 2)
    watch = LedgerWatch(url)
    watch.find_changes()
    edit(url, "DELETE FROM perch_ledger WHERE sequence = 2")
    append(url, 3)
    assert LedgerWatch(url).find_changes() == [], "the chain is intact in itself"
    assert watch.find_changes() == ["row 2 (registered m v2) was the ledger's last and is gone or was rewritten"]
