"""An alias changed by hand, and a row edited in the database: whoever is on call hears of it within a minute.

Over a real MLflow server, with the real watchdog and a notice sent by Apprise to an address that listens here.
"""

from __future__ import annotations

import json
import os
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.core.workspace import Workspace
from pipelines.notices import send_notice
from pipelines.params import Params
from pipelines.registry.aliases import RegistryAliases, find_alias_contradictions
from pipelines.registry.connection import with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.ledger_watch import LedgerWatch
from pipelines.registry.registration import register
from pipelines.registry.staged_version import record_staging
from pipelines.release.audit import Audit
from pipelines.settings import Settings, get_settings
from tests.integration.test_registry_over_mlflow import Server, server, settings

__all__ = ["server", "settings"]
pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
MakeRun = Callable[..., Workspace]
MODEL = "shapes-classification"
CHANGED, MENDED = "The ledger or an alias was changed by hand", "Ledger and aliases agree again"


@dataclass
class Inbox:
    """An address for notices, and what arrived there."""

    notices: queue.Queue[tuple[str, str]] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        notices = self.notices

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                notice = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                notices.put((notice["title"], notice["message"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """As Apprise writes it."""
        return f"json://127.0.0.1:{self.server.server_port}/"

    def wait_for(self, title: str, words: str, limit_s: float) -> float:
        """Seconds until a notice has come that says this; others before it are passed over."""
        began = time.monotonic()
        while (left_s := began + limit_s - time.monotonic()) > 0:
            try:
                heading, text = self.notices.get(timeout=left_s)
            except queue.Empty:
                break
            if heading == title and words in text:
                return time.monotonic() - began
        pytest.fail(f"no notice {title!r} with {words!r} within {limit_s:g} s")


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    inbox = Inbox()
    monkeypatch.setenv("PERCH_NOTICE_URLS", inbox.url)
    yield inbox
    inbox.server.shutdown()


@pytest.fixture
def released(
    settings: Settings,
    registry_params: Params,
    make_run: MakeRun,
    inbox: Inbox,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Settings]:
    """Two registered versions: the first serves, the second has passed in staging."""
    monkeypatch.setenv("PERCH_MLFLOW_URI", settings.mlflow_uri)
    get_settings.cache_clear()
    ledger = Ledger(settings.ledger_url)
    for number in (1, 2):
        run = register(settings, registry_params, make_run(f"run-{number}", seed=number))
        record_staging(
            settings,
            MODEL,
            str(run.version),
            f"{number}" * 64,
            run_id=run.run_id,
            smoke_tests=12,
            golden_images=100,
            failed=(),
            candidate_alias="candidate",
        )
    ledger.append("promoted", model=MODEL, version="1", evidence={"champion": "1", "previous": None}, key="promoted:1")
    ledger.close()
    RegistryAliases(settings).move(MODEL, {"champion": "1"})
    yield settings
    get_settings.cache_clear()


def point(settings: Settings, alias: str, version: str) -> None:
    """As anybody may by MLflow's page or API."""
    with_mlflow(settings, lambda mlflow: mlflow.client.set_registered_model_alias(MODEL, alias, version))


def edit(settings: Settings, *statements: str) -> None:
    """As somebody who can open the database and take its triggers away."""
    with sqlite3.connect(settings.ledger_url.removeprefix("sqlite:///")) as database:
        for name in ("update", "delete"):
            database.execute(f"DROP TRIGGER IF EXISTS perch_ledger_no_{name}")
        for statement in statements:
            database.execute(statement)
    database.close()


FORGED = "UPDATE perch_ledger SET evidence = replace(evidence, '0.963', '0.999') WHERE sequence = 1"
FORGED_BACK = "UPDATE perch_ledger SET evidence = replace(evidence, '0.999', '0.963') WHERE sequence = 1"
CUT_OFF = "DELETE FROM perch_ledger WHERE event = 'promoted'"


def test_audit__aliases_and_rows_changed_by_hand__are_told_while_mlflow_answers_and_while_it_is_away(
    released: Settings,
    inbox: Inbox,
    server: Server,
) -> None:
    stop = threading.Event()
    for audit in (
        Audit(lambda: find_alias_contradictions(released, "candidate"), send_notice),
        Audit(LedgerWatch(released.ledger_url).find_changes, send_notice, looks=1),
    ):
        threading.Thread(target=audit.run, args=(stop, 0.3), daemon=True).start()
    try:
        time.sleep(1.5)
        assert inbox.notices.empty(), "all agrees"
        point(released, "champion", "2")
        inbox.wait_for(CHANGED, f"alias champion of {MODEL} points at v2, the ledger's is v1", 60)
        point(released, "champion", "1")
        inbox.wait_for(MENDED, "alias champion", 60)
        point(released, "candidate", "1")
        inbox.wait_for(CHANGED, f"alias candidate of {MODEL} points at v1, the ledger's is v2", 60)
        server.kill()
        edit(released, FORGED)
        inbox.wait_for(CHANGED, f"row 1 (registered {MODEL} v1): its evidence was changed", 60)
        edit(released, FORGED_BACK)
        inbox.wait_for(MENDED, "row 1", 60)
        edit(released, CUT_OFF)
        inbox.wait_for(CHANGED, "is gone", 60)
    finally:
        stop.set()


@pytest.mark.slow
def test_watchdog__with_its_own_intervals__tells_of_an_alias_and_of_a_row_within_a_minute(
    released: Settings, inbox: Inbox, tmp_path: Path
) -> None:
    """The process that `perch up` starts, as it starts it."""
    log = tmp_path / "watchdog.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "pipelines", "watchdog"]
        process = subprocess.Popen(command, env=os.environ, stdout=output, stderr=subprocess.STDOUT)
    took = {}
    try:
        time.sleep(30)  # it has looked at least once; now at any moment between two looks
        assert inbox.notices.empty(), "all agrees"
        point(released, "champion", "2")
        took["alias"] = inbox.wait_for(CHANGED, "alias champion", 60)
        edit(released, FORGED)
        took["row"] = inbox.wait_for(CHANGED, "its evidence was changed", 60)
        edit(released, FORGED_BACK, CUT_OFF)
        took["end"] = inbox.wait_for(CHANGED, "is gone", 60)
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    print(f"seconds until the notice: {took}")
