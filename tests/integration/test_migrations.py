"""Migrations of Perch's own tables, up and down, on a real SQLite file and a real PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, text

from pipelines.core.hash_chain import Record, link
from pipelines.errors import Refusal, TryLater
from pipelines.registry import migrations
from pipelines.registry.database import Database
from pipelines.registry.ledger import Ledger
from pipelines.registry.migration import downgrade, read_schema, upgrade
from pipelines.registry.rollout_table import RolloutTable
from pipelines.registry.schema import HEAD, LEDGER, REVISIONS, ROLLOUTS, VERSION_TABLE, find_differences, is_guarded
from pipelines.release.rollback import roll_back
from pipelines.release.targets import Routing
from pipelines.services.stack import _upgrade_own_database
from pipelines.settings import Settings
from tests.integration.postgresql_server import execute
from tests.unit.release.simulated_release import MODEL, Simulation
from tests.unit.release.test_engine import CANARY_10, advance_to

# As Perch made them before there were migrations.
OLD_LEDGER = f"""CREATE TABLE {LEDGER} (sequence INTEGER NOT NULL, occurred_at VARCHAR(40) NOT NULL,
  key VARCHAR(500) NOT NULL, model VARCHAR(250) NOT NULL, version VARCHAR(50) NOT NULL, event VARCHAR(50) NOT NULL,
  evidence TEXT NOT NULL, evidence_sha256 VARCHAR(64) NOT NULL, previous_sha256 VARCHAR(64) NOT NULL,
  row_sha256 VARCHAR(64) NOT NULL,
  PRIMARY KEY (sequence), UNIQUE (key), UNIQUE (previous_sha256), UNIQUE (row_sha256))"""
OLD_ROLLOUTS = f"""CREATE TABLE {ROLLOUTS} (rollout_id VARCHAR(400) NOT NULL, model VARCHAR(250) NOT NULL,
  open_model VARCHAR(250), sequence INTEGER NOT NULL, revision BIGINT NOT NULL, document TEXT NOT NULL,
  lease_owner VARCHAR(250) NOT NULL, lease_expires_at DOUBLE_TYPE NOT NULL, token BIGINT NOT NULL,
  renewals BIGINT NOT NULL, renewed_at DOUBLE_TYPE NOT NULL, PRIMARY KEY (rollout_id), UNIQUE (open_model))"""
DOUBLE = {"sqlite": "DOUBLE", "postgresql": "DOUBLE PRECISION"}
OLD_INDEX = f"CREATE INDEX ix_{ROLLOUTS}_model ON {ROLLOUTS} (model)"
OLD_GUARDS = {
    "sqlite": [
        f"CREATE TRIGGER {LEDGER}_no_{action.lower()} BEFORE {action} ON {LEDGER} "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for action in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        f"CREATE FUNCTION {LEDGER}_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
        f"CREATE TRIGGER {LEDGER}_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {LEDGER} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {LEDGER}_is_append_only()",
    ],
}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("postgresql_url")
        return found
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    yield database
    database.close()


def ask(database: Database, query: str) -> list[Any]:
    with database.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def tables(database: Database) -> set[str]:
    return set(read_schema(database).tables)


def check_current(database: Database) -> None:
    assert read_schema(database).is_current
    with database.engine.connect() as connection:
        assert find_differences(connection) == []
        assert is_guarded(connection)


def make_old(url: str, *statements: str, rows: int = 3) -> list[Record]:
    """A database as an earlier Perch left it, with an intact chain in its ledger."""
    records: list[Record] = []
    for n in range(rows):
        record = link(
            records[-1] if records else None,
            occurred_at=f"2026-11-0{n + 1}T02:00:00.000000+00:00",
            key=f"registered:m:{n}",
            model="m",
            version=str(n),
            event="registered",
            evidence={"n": n},
        )
        records.append(record)
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in (OLD_LEDGER, *OLD_GUARDS[engine.dialect.name], *statements):
            connection.execute(text(statement.replace("DOUBLE_TYPE", DOUBLE[engine.dialect.name])))
        for record in records:
            names = asdict(record)
            values = ", ".join(f":{name}" for name in names)
            connection.execute(text(f"INSERT INTO {LEDGER} ({', '.join(names)}) VALUES ({values})"), names)
    engine.dispose()
    return records


def append(url: str) -> Record:
    return Ledger(url).append("registered", model="m", version="9", evidence={}, key="new")


def test_revisions__as_listed_for_those_who_do_not_import_alembic__are_alembics() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(next(iter(migrations.__path__)))))
    walked = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(walked)) == REVISIONS


def test_upgrade__empty_database__makes_the_tables_that_the_code_uses(database: Database) -> None:
    before, after = upgrade(database)
    assert (before.is_empty, after.revision) == (True, HEAD)
    check_current(database)
    assert upgrade(database) == (after, after)


@pytest.mark.parametrize("change", ["ADD COLUMN surplus INTEGER", "DROP COLUMN evidence"])
def test_find_differences__table_changed_by_hand__are_seen(database: Database, change: str) -> None:
    upgrade(database)
    execute(database.engine.url.render_as_string(hide_password=False), f"ALTER TABLE {LEDGER} {change}")
    with database.engine.connect() as connection:
        assert len(find_differences(connection)) == 1


def test_downgrade__step_by_step_and_up_again__ends_where_it_began(database: Database) -> None:
    upgrade(database)
    expected = {"0001": {LEDGER}, "base": set()}
    for revision in (*reversed(REVISIONS[:-1]), "base"):
        _, after = downgrade(database, revision)
        assert (after.revision or "base", tables(database)) == (revision, expected[revision])
    upgrade(database)
    downgrade(database, "base")
    assert tables(database) == set()
    upgrade(database)
    check_current(database)


@pytest.mark.parametrize("revision", ["0001", "base"])
def test_downgrade__rows_would_be_lost__is_refused_and_changes_nothing(
    url: str, database: Database, revision: str
) -> None:
    row = append(url)
    RolloutTable(url).create("r", "m", {"step": "pending"}, now=1.0)
    with pytest.raises(Refusal, match=f"{ROLLOUTS}: holds 1 rows"):
        downgrade(database, revision)
    check_current(database)
    assert Ledger(url).entries() == [row]
    execute(url, f"DELETE FROM {ROLLOUTS}")
    if revision == "base":
        with pytest.raises(Refusal, match=f"{LEDGER}: holds 1 rows"):
            downgrade(database, revision)
        check_current(database)
    else:
        downgrade(database, revision)
        assert tables(database) == {LEDGER}


@pytest.mark.parametrize("revision", [HEAD, "0815"])
def test_downgrade__not_below_the_present_one__is_refused(database: Database, revision: str) -> None:
    upgrade(database)
    with pytest.raises(Refusal, match="limit: base, 0001"):
        downgrade(database, revision)


@pytest.mark.parametrize("statements", [(), (OLD_ROLLOUTS, OLD_INDEX)], ids=["ledger alone", "both tables"])
def test_upgrade__database_from_before_the_migrations__is_adopted_without_loss(
    url: str, database: Database, statements: tuple[str, ...]
) -> None:
    old = make_old(url, *statements)
    if database.kind == "postgresql":  # others may be using it: not in passing
        for use in (lambda: append(url), lambda: Ledger(url).entries(), lambda: RolloutTable(url).list_rollouts()):
            with pytest.raises(TryLater, match="`perch db upgrade`, once, after a backup"):
                use()
        upgrade(database)
    ledger = Ledger(url)
    assert ledger.entries() == old
    new = append(url)
    assert ledger.entries() == [*old, new]
    assert ledger.verify() == []
    check_current(database)
    for change in (f"UPDATE {LEDGER} SET version = '9'", f"DELETE FROM {LEDGER}"):
        with pytest.raises(Exception, match="append-only"):
            execute(url, change)


def test_upgrade__guards_were_dropped_before_the_migrations__puts_them_back(url: str, database: Database) -> None:
    old = make_old(url)
    for name in ("no_update", "no_delete") if database.kind == "sqlite" else ("is_append_only",):
        on = "" if database.kind == "sqlite" else f" ON {LEDGER}"
        execute(url, f"DROP TRIGGER {LEDGER}_{name}{on}")
    upgrade(database)
    check_current(database)
    assert Ledger(url).entries() == old


def test_upgrade__table_of_the_same_name_and_another_shape__is_refused_and_left(url: str, database: Database) -> None:
    old = make_old(url, f"ALTER TABLE {LEDGER} ADD COLUMN surplus INTEGER")
    with pytest.raises(Refusal, match=r"are not those that Perch made: .*surplus"):
        upgrade(database)
    assert not read_schema(database).revision
    assert tables(database) == {LEDGER}
    assert len(ask(database, f"SELECT * FROM {LEDGER}")) == len(old)


def test_use__database_newer_than_the_code__is_refused_by_all_and_left(url: str, database: Database) -> None:
    row = append(url)
    execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    uses: list[Callable[[], object]] = [
        lambda: append(url),
        lambda: Ledger(url).entries(),
        lambda: RolloutTable(url).list_current(),
        lambda: RolloutTable(url, patient=False).create("r", "m", {}, now=1.0),
    ]
    for use in uses:
        with pytest.raises(TryLater, match=r"is at 9999, which this Perch does not know\n  what to do: use the Perch"):
            use()
    for change in (lambda: upgrade(database), lambda: downgrade(database, "base")):
        with pytest.raises(Refusal, match="9999"):
            change()
    assert ask(database, f"SELECT row_sha256 FROM {LEDGER}") == [(row.row_sha256,)]
    execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '{HEAD}'")
    assert Ledger(url).entries() == [row]


def test_use__table_dropped_by_hand__begins_no_second_ledger(url: str, database: Database) -> None:
    append(url)
    execute(url, f"DROP TABLE {LEDGER}")
    assert Ledger(url).entries() == []
    with pytest.raises(TryLater, match="restore a backup"):
        append(url)
    assert LEDGER not in tables(database)


def test_roll_back__database_newer_than_the_code__moves_the_traffic_all_the_same(url: str, tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, url=url)
    rollout = simulation.begin()
    simulation.answer()
    advance_to(simulation, rollout.rollout_id, CANARY_10)
    assert simulation.target.state().routing != Routing()
    execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    # A process that begins now: one that ran before goes on with the tables that it knows.
    simulation.rollouts, simulation.glance = RolloutTable(url), RolloutTable(url, patient=False)
    outcome = roll_back(simulation.world(), MODEL, reason="by hand", by="on-call")
    assert simulation.target.state().routing == Routing()
    assert not outcome.is_recorded


def forking() -> Any:
    """Forks from a process that runs nothing else: locks that threads of other tests hold would stay held in a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def upgrade_in_a_process(url: str, ready: Any) -> None:
    database = Database(url)
    ready.wait()
    upgrade(database)


def test_upgrade__three_processes_at_once__is_applied_once(url: str, database: Database) -> None:
    old = make_old(url)
    context = forking()
    ready = context.Barrier(3)
    processes = [context.Process(target=upgrade_in_a_process, args=(url, ready)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert ask(database, f"SELECT version_num FROM {VERSION_TABLE}") == [(HEAD,)]
    check_current(database)
    assert Ledger(url).entries() == old


def upgrade_and_die(url: str, at: int) -> None:
    """Upgrade in this process, which is killed before its statement number `at`."""
    database, statements = Database(url), count(1)

    @event.listens_for(database.engine, "before_cursor_execute")
    def _die(*_: object) -> None:
        if next(statements) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    upgrade(database)


def test_upgrade__killed_before_each_statement__is_whole_or_was_never_begun(url: str, tmp_path: Path) -> None:
    context = forking()
    for at in count(1, 1 if url.startswith("sqlite") else 4):
        old = make_old(url)
        process = context.Process(target=upgrade_and_die, args=(url, at))
        process.start()
        process.join(60)
        database = Database(url)
        if process.exitcode == 0:
            check_current(database)
            break
        assert process.exitcode == -signal.SIGKILL
        assert (read_schema(database).revision, tables(database)) == ("", {LEDGER})
        upgrade(database)
        check_current(database)
        assert Ledger(url).entries() == old
        database.close()
        if database.kind == "postgresql":
            execute(url, "DROP SCHEMA public CASCADE")
            execute(url, "CREATE SCHEMA public")
        for file in tmp_path.glob("ledger.db*"):
            file.unlink()
    assert at > 10


@pytest.mark.services
def test_up__database_of_an_older_perch__is_upgraded_where_it_is_this_machines_own(
    tmp_path: Path, postgresql_url: str
) -> None:
    own = Settings(home=tmp_path, database_url="")
    old = make_old(own.ledger_url)
    _upgrade_own_database(own)
    check_current(Database(own.ledger_url))
    assert Ledger(own.ledger_url).entries() == old
    servers = Settings(home=tmp_path, database_url=postgresql_url)
    make_old(servers.ledger_url)
    _upgrade_own_database(servers)
    assert not read_schema(Database(servers.ledger_url)).revision


@pytest.mark.services
def test_use__by_an_account_with_the_least_rights__works_and_cannot_rewrite(postgresql_url: str) -> None:
    upgrade(Database(postgresql_url))
    account = urlsplit(postgresql_url).path.strip("/") + "_app"
    for right in (
        f"CREATE ROLE {account} LOGIN",
        f"GRANT SELECT ON {LEDGER}, {ROLLOUTS}, {VERSION_TABLE} TO {account}",
        f"GRANT INSERT ON {LEDGER}, {ROLLOUTS} TO {account}",
        f"GRANT UPDATE ON {ROLLOUTS} TO {account}",
    ):
        execute(postgresql_url, right)
    url = postgresql_url.replace("//perch@", f"//{account}@")
    row = append(url)
    rollouts = RolloutTable(url)
    found = rollouts.create("r", "m", {"step": "pending"}, now=1.0)
    found = rollouts.take_lease("r", "a", lease_s=9, now=2.0)
    rollouts.save(found, {"step": "shadow"}, is_open=True)
    assert (Ledger(url).entries(), rollouts.list_current()[0].document) == ([row], {"step": "shadow"})
    for change in (f"DELETE FROM {LEDGER}", f"ALTER TABLE {LEDGER} DISABLE TRIGGER ALL", f"DROP TABLE {ROLLOUTS}"):
        with pytest.raises(Exception, match=r"permission denied|must be owner"):
            execute(url, change)


def test_first_write__databases_of_two_homes_in_two_threads__do_not_meet(tmp_path: Path) -> None:
    # Alembic keeps what it migrates in module variables.
    from concurrent.futures import ThreadPoolExecutor

    urls = [f"sqlite:///{tmp_path / str(n)}.db" for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(append, urls))
    assert [Ledger(url).entries() for url in urls] == [[row] for row in rows]
