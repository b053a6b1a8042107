"""Perch's tables behind a network that cuts, stalls and refuses, at every moment of a call, on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import create_engine, text

from pipelines.core import patience
from pipelines.core.rollout_rows import RolloutRow
from pipelines.errors import TryLater
from pipelines.registry import ledger as ledger_module
from pipelines.registry.database import Database
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from tests.integration.postgresql_proxy import Fault, Proxy
from tests.integration.postgresql_server import execute

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def url(postgresql_url: str) -> str:
    return postgresql_url


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    proxy = Proxy.before(url)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(proxy: Proxy, url: str) -> str:
    return proxy.url(url)


def count_connections(url: str) -> int:
    """Connections to the server other than the one that asks."""
    engine = create_engine(url)
    query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    with engine.connect() as connection:
        count = int(connection.execute(text(query)).scalar_one())
    engine.dispose()
    return count


def wait_for_no_connection(url: str) -> None:
    deadline = time.monotonic() + 30
    while count_connections(url):
        assert time.monotonic() < deadline, "a connection was left open"
        time.sleep(0.05)


def count_questions(proxy: Proxy, call: Callable[[], object]) -> int:
    proxy.set("none")
    call()
    return proxy.questions


def append(url: str, key: str) -> None:
    Ledger(url).append("traffic", model="m", version="1", evidence={"key": key}, key=key)


@pytest.mark.parametrize("fault", ["lose the question", "lose the answer"])
def test_append__connection_lost_at_any_moment__adds_the_row_once(
    url: str, proxy: Proxy, proxied: str, fault: Fault
) -> None:
    append(proxied, "first")  # makes the table
    questions = count_questions(proxy, lambda: append(proxied, "second"))
    assert questions > 5
    for at in range(1, questions + 1):
        proxy.set(fault, at)
        append(proxied, f"{at}")
    ledger = Ledger(url)
    assert [record.key for record in ledger.entries()] == ["first", "second", *map(str, range(1, questions + 1))]
    assert ledger.verify() == []
    wait_for_no_connection(url)


@pytest.mark.parametrize("fault", ["lose the question", "lose the answer"])
def test_append__connection_lost_while_the_table_is_made__leaves_no_half_of_it(
    url: str, proxy: Proxy, proxied: str, fault: Fault
) -> None:
    questions = count_questions(proxy, lambda: append(proxied, "1"))
    for at in range(1, questions + 1, 3):
        execute(url, "DROP TABLE perch_ledger, perch_rollouts, perch_schema_version")
        proxy.set(fault, at)
        append(proxied, "1")
        assert len(Ledger(url).entries()) == 1
        with pytest.raises(Exception, match="append-only"):
            execute(url, "DELETE FROM perch_ledger")
    wait_for_no_connection(url)


@pytest.mark.parametrize("fault", ["lose the question", "lose the answer"])
@pytest.mark.parametrize("patient", [True, False])
def test_rollout__connection_lost_at_any_moment__is_written_once_or_later(
    url: str, proxy: Proxy, proxied: str, fault: Fault, patient: bool
) -> None:
    direct, table = RolloutTable(url), RolloutTable(proxied, patient=patient)
    direct.create("r", "m", {"step": 0}, now=0.0)

    def save(row: RolloutRow, force: bool) -> RolloutRow:
        return table.save(row, {"step": row.revision}, is_open=True, force=force)

    def read() -> RolloutRow:
        row = direct.read("r")
        assert row is not None
        return row

    for force in (False, True):
        questions = count_questions(proxy, lambda force=force: save(read(), force))  # type: ignore[misc]
        assert questions > 5
        for at in range(1, questions + 1):
            before = read()
            proxy.set(fault, at)
            try:
                after = save(before, force)
                assert after.revision == before.revision + 1
            except TryLater:
                assert not patient
            # A whole write or none; the engine reads the row anew before it goes on.
            kept = read()
            assert kept.document["step"] == kept.revision - 1
            assert kept.revision - before.revision in ((1,) if patient else (0, 1))

    questions = count_questions(proxy, lambda: table.take_lease("r", "a", lease_s=60, now=0))
    token = read().token
    for at in range(1, questions + 1):
        proxy.set(fault, at)
        with contextlib.nullcontext() if patient else contextlib.suppress(TryLater):
            table.take_lease("r", "a", lease_s=60, now=at)
        assert (read().lease_owner, read().token) == ("a", token)

    questions = count_questions(proxy, table.list_rollouts)
    for at in range(1, questions + 1):
        proxy.set(fault, at)
        with contextlib.nullcontext() if patient else contextlib.suppress(TryLater):
            assert [row.rollout_id for row in table.list_rollouts()] == ["r"]
    wait_for_no_connection(url)


def test_rollout__server_stalls__ends_with_try_later_and_keeps_no_lock(url: str, proxy: Proxy, proxied: str) -> None:
    direct = RolloutTable(url)
    direct.create("r", "m", {}, now=0.0)

    def take_lease() -> None:
        RolloutTable(proxied, patient=False).take_lease("r", "a", lease_s=1, now=0)

    questions = count_questions(proxy, take_lease)
    for at in (1, questions // 2, questions):
        proxy.set("stall", at)
        began = time.monotonic()
        with pytest.raises(TryLater):
            take_lease()
        assert time.monotonic() - began < 8
        # The lock of the writer that gave up is free, for another process too.
        direct.take_lease("r", "a", lease_s=1, now=0)
    wait_for_no_connection(url)


def test_rollout__nobody_listens__ends_with_try_later(proxy: Proxy, proxied: str) -> None:
    proxy.close()
    with pytest.raises(TryLater, match="ledger's database"):
        RolloutTable(proxied, patient=False).list_rollouts()


def test_ledger__another_writer_hangs_in_its_transaction__is_waited_for_no_longer_than_the_limit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger(url).append("traffic", model="m", version="1", evidence={}, key="a")
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    monkeypatch.setattr(ledger_module, "Database", lambda url: Database(url, wait_s=2))
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": ledger_module._ADVISORY_LOCK})
        with pytest.raises(TryLater):
            append(url, "b")
    engine.dispose()
    append(url, "b")
    assert Ledger(url).verify() == []
