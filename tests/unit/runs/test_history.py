"""`perch runs` says how each run ended and what it changed, at 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.core.workspace import Workspace
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER
from pipelines.runs.history import read_run, runs_list
from pipelines.runs.workspaces import workspace_of
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[3]
STEPS = ("data_ingestion", "data_validation", "model_evaluation", "model_registration")


def make(home: Path, run_id: str, minute: int, *, dataset: str = "scans", epochs: int = 20) -> Workspace:
    workspace = workspace_of(Settings(home=home, _env_file=None), run_id)
    (workspace.root / "results").mkdir(parents=True)
    (workspace.root / "refusals").mkdir()
    run = {"run_id": run_id, "created": f"2026-11-01T02:{minute:02}:00+00:00", "git_sha": "3e9d1c2aaaa"}
    workspace.run_file.write_text(json.dumps(run))
    params = f"dataset: {dataset}\nmodel_name: {dataset}-classification\nmodel_training: {{epochs: {epochs}}}\n"
    workspace.params_file.write_text(params)
    return workspace


def shown(home: Path) -> str:
    written = io.StringIO()
    Console(width=80, file=written).print(runs_list(Settings(project_dir=PROJECT, home=home, _env_file=None)))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


@pytest.mark.parametrize(
    ("done", "refusal", "status"),
    [
        ([], None, "opened, no step done"),
        (STEPS[:2], None, "data_validation done"),
        (STEPS, None, "registered as v3"),
        (STEPS[:1], ("data_validation", EXIT_REFUSED), "data_validation refused"),
        (STEPS[:3], ("model_registration", EXIT_TRY_LATER), "model_registration failed, and may work later"),
    ],
)
def test_read_run__steps_that_ended__say_how_far_it_came(
    tmp_path: Path, done: list[str], refusal: tuple[str, int] | None, status: str
) -> None:
    workspace = make(tmp_path, "r1", 0)
    for step in done:
        workspace.result_file(step).write_text('{"version": "3"}')
    workspace.result_file("model_evaluation").unlink(missing_ok=True)
    if refusal:
        workspace.refusal_file(refusal[0]).write_text(json.dumps({"exit_code": refusal[1]}))
    assert read_run(workspace, STEPS).status == status


def test_runs_list__runs_of_two_data_sets__compares_each_with_the_last_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, "manual__2026-11-01T02:00:00.123456+00:00__first", 0)
    make(tmp_path, "other", 1, dataset="cells", epochs=7)
    metrics = {"test/accuracy": 0.9876, "test/accuracy_low": 0.9512, "test/accuracy_high": 0.9987}
    second = make(tmp_path, "second", 2, epochs=3)
    second.result_file("model_evaluation").write_text(json.dumps({"metrics": metrics}))
    assert shown(tmp_path).splitlines() == [
        "cells · cells-classification",
        "  other  2026-11-01 02:01 UTC  code 3e9d1c2",
        "      opened, no step done",
        "",
        "scans · scans-classification",
        "  manual__2026-11-01T02:00:00.123456+00:00__first  2026-11-01 02:00 UTC  code",
        "  3e9d1c2",
        "      opened, no step done",
        "  second  2026-11-01 02:02 UTC  code 3e9d1c2",
        "      model_evaluation done · test accuracy 0.988 [0.951, 0.999]",
        "      changed since manual__2026-11-01T02:00:00.123456+00:00__first:",
        "      model_training.epochs 20 → 3",
    ]


def test_runs_list__no_runs__says_how_to_make_one(tmp_path: Path) -> None:
    assert "perch run" in shown(tmp_path)
