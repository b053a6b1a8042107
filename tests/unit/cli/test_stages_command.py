"""What `--set` takes, and how it says no; what `perch run` says before and after its steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import stages
from pipelines.cli.main import app
from pipelines.cli.stages import parse_overrides
from pipelines.errors import Refusal
from pipelines.settings import get_settings

PROJECT = Path(__file__).parents[3]


def test_parse_overrides__pairs_and_json__are_merged_as_yaml_values() -> None:
    pairs = ["model_training.epochs=3", "data_ingestion.as_of=2026-11-08", "data_ingestion.source=a=b"]
    assert parse_overrides(pairs, '{"seed": 1, "model_training.epochs": 9}') == {
        "seed": 1,
        "model_training.epochs": 3,
        "data_ingestion.as_of": date(2026, 11, 8),
        "data_ingestion.source": "a=b",
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("seed", "KEY=VALUE"),
        ("seed=[1", r"--set seed: the value '\[1' cannot be read"),
        (
            "data_ingestion.as_of=2026-13-01",
            r"--set data_ingestion\.as_of: the value '2026-13-01' cannot be read: month",
        ),
    ],
)
def test_parse_overrides__pair_that_cannot_be_read__is_refused(pair: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        parse_overrides([pair], "{}")


@pytest.fixture
def home_with_airflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PERCH_HOME", str(tmp_path))
    monkeypatch.setenv("PERCH_AIRFLOW_URI", "http://airflow.test")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.mark.parametrize(
    ("model", "says"), [("digits-classification", True), ("another-classification", False)], ids=["own", "--set"]
)
@pytest.mark.usefixtures("home_with_airflow")
def test_run__has_registered_a_version__ends_with_how_it_goes_live(
    monkeypatch: pytest.MonkeyPatch, model: str, says: bool
) -> None:
    # The steps take a minute and are tried elsewhere; here it is about what follows them.
    outcome = {"version": "3", "model": model}
    monkeypatch.setattr(stages, "_run_step", lambda *_, **__: outcome)
    result = CliRunner().invoke(app, ["run"])
    assert result.exit_code == 0, result.output
    assert ("next: in Airflow trigger the DAG model_release at http://airflow.test/" in result.output) is says
    assert ("perch approve 3`" in result.output) is says


def test_run__refused_before_it_opens__announces_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy2(PROJECT / name, tmp_path)
    with (tmp_path / "params.yaml").open("a") as params:
        params.write("unknown_key: 1\n")
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(tmp_path))
    monkeypatch.setenv("PERCH_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    try:
        result = CliRunner().invoke(app, ["run", "--run", "typo"])
    finally:
        get_settings.cache_clear()
    assert isinstance(result.exception, Refusal)
    assert "unknown_key" in str(result.exception)
    assert "run typo" not in result.output
