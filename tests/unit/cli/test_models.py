"""`perch models` and `perch ledger`, on a real registry and a real ledger."""

import sqlite3
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from pipelines.cli import ledger as ledger_cli
from pipelines.cli import models as models_cli
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.connection import with_mlflow
from pipelines.registry.registration import register
from pipelines.settings import Settings

MakeRun = Callable[..., Workspace]


def run(app: object, *arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, list(arguments), catch_exceptions=False)  # type: ignore[arg-type]
    return result.exit_code, result.output


def test_models__none_registered__says_how_to_get_one(registry_settings: Settings) -> None:
    code, output = run(models_cli.app)
    assert code == 0
    assert "shapes-classification has no registered version yet" in output


def test_models__two_versions__lists_the_newest_first(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    code, output = run(models_cli.app)
    assert code == 0
    rows = [line.split() for line in output.splitlines() if line.startswith("v") and line[1].isdigit()]
    assert [row[0] for row in rows] == ["v2", "v1"]
    assert rows[0][1:6] == ["candidate", "0.963", "[0.926,", "0.985]", "110"]
    assert rows[0][-1] == "run-2"


def test_models_show__registered_version__prints_its_card(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1"))
    for number in ("1", "v1"):
        code, output = run(models_cli.app, "show", number)
        assert code == 0
        assert "Card of run-1" in output
        assert "It tells circles from squares." in output


@pytest.mark.parametrize(("number", "message"), [("7", "versions: v1"), ("one", "a number, e.g. 3")])
def test_models_show__no_such_version__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, number: str, message: str
) -> None:
    register(registry_settings, registry_params, make_run())
    with pytest.raises(Refusal, match=message):
        run(models_cli.app, "show", number)


def test_ledger__empty__says_so(registry_settings: Settings) -> None:
    assert "The ledger is empty" in run(ledger_cli.app)[1]
    assert run(ledger_cli.app, "verify")[0] == 0


def test_ledger__one_row__is_listed_with_its_evidence(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run())
    code, output = run(ledger_cli.app, "--evidence")
    assert code == 0
    assert "registered" in output
    assert "shapes-classification v1" in output
    assert '"git_sha"' in output
    assert "registered" not in run(ledger_cli.app, "--model", "another")[1].replace("registering", "")


def test_ledger_verify__intact__prints_the_head_that_anchors_it(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    head = register(registry_settings, registry_params, make_run()).ledger_sha256
    code, output = run(ledger_cli.app, "verify")
    assert code == 0
    assert "1 row, chain intact, MLflow agrees" in output
    assert f"head {head} (row 1)" in output
    assert run(ledger_cli.app, "verify", "--head", head[:12])[0] == 0


def test_ledger_verify__noted_head_is_gone__fails(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run())
    code, output = run(ledger_cli.app, "verify", "--offline", "--head", "f" * 64)
    assert code == 1
    assert "cut off or rewritten" in output


def test_ledger_verify__tampered_and_alias_moved__names_both_and_fails(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    with sqlite3.connect(registry_settings.home / "ledger.db") as connection:
        connection.execute("DROP TRIGGER perch_ledger_no_update")
        connection.execute("UPDATE perch_ledger SET evidence = replace(evidence, '110', '111') WHERE sequence = 1")
    with_mlflow(
        registry_settings,
        lambda mlflow: mlflow.client.set_registered_model_alias("shapes-classification", "candidate", "1"),
    )
    code, output = run(ledger_cli.app, "verify")
    assert code == 1
    assert "row 1 (registered shapes-classification v1): its evidence was changed" in output
    assert "alias candidate of shapes-classification points at v1, the ledger's is v2" in output
