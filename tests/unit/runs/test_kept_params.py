"""A refusal of a run whose `params.yaml` was mended meanwhile says that the run does not look at it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.cli.printing import print_error
from pipelines.errors import Refusal
from pipelines.runs.kept_params import describe_kept_params
from pipelines.runs.pipeline import run_step
from pipelines.runs.workspaces import open_workspace
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[3]


@pytest.fixture
def settings(registry_settings: Settings) -> Settings:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy2(PROJECT / name, registry_settings.project_dir)
    shutil.copytree(PROJECT / "expectations", registry_settings.project_dir / "expectations")
    return registry_settings


def edit(settings: Settings, before: str, after: str) -> None:
    file = settings.project_dir / "params.yaml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_refusal__params_yaml_mended_since_the_run_opened__says_what_the_run_keeps(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(settings, "source: digits", "source: scans")
    open_workspace(settings, "typo", {})
    edit(settings, "source: scans", "source: digits")
    opened: list[str] = []
    with pytest.raises(Refusal) as refused:
        run_step(settings, "typo", "data_validation", overrides={}, on_open=lambda: opened.append("typo"))
    assert opened == ["typo"]
    print_error(refused.value)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "run typo keeps data_ingestion.source=scans from its opening" in last
    assert "params.yaml has data_ingestion.source=digits now" in last
    assert "without --run" in last


def test_describe_kept_params__file_as_it_was__says_nothing_of_own_values_and_date(settings: Settings) -> None:
    workspace = open_workspace(settings, "r", {"model_training.epochs": 3, "data_ingestion.as_of": "2026-11-01"})
    assert describe_kept_params(settings, workspace) == ""
    assert describe_kept_params(settings, open_workspace(settings, "dated", {})) == ""


def test_describe_kept_params__file_that_is_broken_now__says_nothing(settings: Settings) -> None:
    workspace = open_workspace(settings, "r", {})
    edit(settings, "source: digits", "source: [digits")
    assert describe_kept_params(settings, workspace) == ""
