"""A share of a run's tuning trials in a process of its own: how it says no."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core.results import write_json
from pipelines.errors import EXIT_REFUSED, PerchError
from pipelines.runs.trials import run_share
from pipelines.runs.workspaces import workspace_of
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[3]


def test_run_share__its_process_refuses__is_a_refusal_for_the_scheduler(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(project_dir=PROJECT, home=tmp_path, tuning_url="sqlite:///nowhere.db")
    workspace = workspace_of(settings, "r")
    write_json(workspace.run_file, {"run_id": "r"})
    with pytest.raises(PerchError, match="share 0 of the trials of r ended with exit code 65") as caught:
        run_share(settings, "r", 0, 2)
    assert caught.value.exit_code == EXIT_REFUSED
    assert "PERCH_TUNING_URL: is empty" in capfd.readouterr().err  # to it: its environment is this one
