"""`perch db` on a real SQLite file."""

import sqlite3

import pytest
from typer.testing import CliRunner

from pipelines.cli.db import app
from pipelines.errors import Refusal
from pipelines.registry.schema import HEAD
from pipelines.settings import Settings


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


def test_db__from_no_file_to_the_newest_and_back__says_where_it_is(registry_settings: Settings) -> None:
    file = registry_settings.home / "ledger.db"
    code, output = run("current")
    assert (code, file.exists()) == (1, False)
    assert f"sqlite:///{file} is at empty" in output
    assert "`perch db upgrade` makes the tables" in output

    assert run("upgrade") == (0, f"sqlite:///{file}: empty > {HEAD}\n")
    assert run("upgrade") == (0, f"sqlite:///{file} is at {HEAD} already\n")
    assert run("current") == (0, f"sqlite:///{file} is at {HEAD}\n")

    assert run("downgrade", "0001") == (0, f"sqlite:///{file}: {HEAD} > 0001\n")
    code, output = run("current")
    assert code == 1
    assert f"is at 0001\nThis Perch needs {HEAD}: `perch db upgrade`." in output


def test_downgrade__no_file__is_refused_and_makes_none(registry_settings: Settings) -> None:
    file = registry_settings.home / "ledger.db"
    with pytest.raises(Refusal, match="is not below empty"):
        run("downgrade", "base")
    assert not file.exists()


def test_db__newer_database__is_shown_and_not_touched(registry_settings: Settings) -> None:
    run("upgrade")
    with sqlite3.connect(registry_settings.home / "ledger.db") as connection:
        connection.execute("UPDATE perch_schema_version SET version_num = '9999'")
    code, output = run("current")
    assert code == 1
    assert f"This Perch knows nothing after {HEAD}" in output
    for arguments in (("upgrade",), ("downgrade", "base")):
        with pytest.raises(Refusal, match="9999"):
            run(*arguments)
