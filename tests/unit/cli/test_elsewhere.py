"""Outside a project, a command neither begins a home of its own nor tells what an empty one would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.errors import PerchError, Refusal
from pipelines.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for variable in ("PERCH_HOME", "PERCH_PROJECT_DIR", "PERCH_DATABASE_URL", "PERCH_AIRFLOW_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "demo --faults",
        "up",
        "status",
        "down",
        "slots",
        "approvals",
        "approve 1 --model shapes",
        "predictions",
        "why 01KAHM3Z8V5Q0W4T9X2R7N6C1B",
        "ledger",
        "ledger verify",
        "api-keys list",
        "api-keys add clinic",
        "keys init",
        "serve --model shapes --port 1",
        "quarantine",
        "runs",
        "runs prune",
        "releases",
        "watchdog",
        "rollback",
        "replay r",
        "db current",
    ],
)
def test_command__outside_a_project__is_refused_and_leaves_nothing(command: str, elsewhere: Path) -> None:
    with pytest.raises(Refusal, match="start Perch in the folder of") as refused:
        CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert "PERCH_PROJECT_DIR" in str(refused.value)
    assert not list(elsewhere.iterdir())


def test_command__home_named__is_not_refused_for_want_of_a_project(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_HOME", str(elsewhere / "home"))
    assert "nothing is up" in CliRunner().invoke(app, ["status"], catch_exceptions=False).output
    with pytest.raises(PerchError, match=r"start Perch in the folder of params\.yaml"):  # whose DAGs would it run?
        CliRunner().invoke(app, ["up"], catch_exceptions=False)


def test_home__project_named_from_elsewhere__is_in_that_project(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(elsewhere / "project"))
    assert Settings().require_home() == elsewhere / "project" / ".perch"
