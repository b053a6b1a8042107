"""`perch expectations init`, on the real digits."""

import json
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.expectations import app
from pipelines.core.results import write_json
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params, check_params
from pipelines.settings import Settings, get_settings
from pipelines.stages import data_ingestion


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    (tmp_path / "params.yaml").write_text("dataset: digits\nmodel_name: digits-classification\n")
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(tmp_path))
    monkeypatch.setenv("PERCH_HOME", str(tmp_path / ".perch"))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


def ingest(settings: Settings, run_id: str, created: str, as_of: date, dataset: str = "digits") -> Workspace:
    workspace = Workspace(settings.runs_dir / run_id)
    write_json(workspace.run_file, {"run_id": run_id, "created": created})
    params: Params = check_params(
        {"dataset": dataset, "model_name": "digits-classification", "data_ingestion": {"as_of": as_of}}
    )
    data_ingestion.run(params, workspace)
    return workspace


def refusal_of(*arguments: str) -> Refusal:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, Refusal), result.output
    return result.exception


def test_init__ingested_data_set__drafts_from_its_newest_run_and_says_what_to_review(settings: Settings) -> None:
    ingest(settings, "new", "2026-11-08T02:00:00+00:00", date(2026, 11, 8))
    ingest(settings, "old", "2026-11-01T02:00:00+00:00", date(2026, 11, 1))
    ingest(settings, "other", "2026-11-09T02:00:00+00:00", date(2026, 11, 1), dataset="letters")
    result = CliRunner().invoke(app, ["init", "digits"])
    assert result.exit_code == 0, result.output
    folder = settings.project_dir / "expectations" / "digits"
    assert "Seen 1197;" in (folder / "dataset.json").read_text()
    assert "Review before you commit" in result.output
    total = sum(len(json.loads(file.read_text())["expectations"]) for file in folder.glob("*.json"))
    assert f"{total} of {total} are met" in result.output


def test_init__suites_that_are_there__are_kept_unless_forced(settings: Settings) -> None:
    raw = ingest(settings, "run", "2026-11-01T02:00:00+00:00", date(2026, 11, 1)).raw
    folder = settings.project_dir / "expectations" / "digits"
    folder.mkdir(parents=True)
    (folder / "images.json").write_text("reviewed")
    assert "--force, after keeping a copy, for Git does not have them" in refusal_of("init", "digits").way_out
    git = ["git", "-C", str(settings.project_dir), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "--quiet"], ["add", "expectations"], ["commit", "--quiet", "--message", "suites"]):
        subprocess.run([*git, *arguments], check=True)
    assert "--force, Git has the old" in refusal_of("init", "digits").way_out
    (folder / "images.json").write_text("reviewed again")
    assert "Git does not have them" in refusal_of("init", "digits").way_out
    (folder / "images.json").write_text("reviewed")
    assert (folder / "images.json").read_text() == "reviewed"
    result = CliRunner().invoke(app, ["init", "digits", "--force", "--raw", str(raw)])
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "images.json").read_text())["name"] == "images"


def test_init__data_set_that_no_run_ingested__is_refused_with_the_way_to(settings: Settings) -> None:
    refusal = refusal_of("init", "cells")
    assert "was not ingested" in refusal.value
    assert "perch data_ingestion" in refusal.way_out


@pytest.mark.parametrize("name", ["../digits", "Cells", "", "a b"])
def test_init__name_that_is_no_data_sets__is_refused(settings: Settings, name: str) -> None:
    assert refusal_of("init", name).thing == "the data set's name"


def test_init__folder_without_manifest__is_refused(settings: Settings, tmp_path: Path) -> None:
    assert "manifest.json" in refusal_of("init", "cells", "--raw", str(tmp_path)).value
