"""What the demo shows of a week, where nobody sees a terminal."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.core.locking import hold
from pipelines.errors import Refusal, TryLater
from pipelines.services.airflow_client import TaskState
from pipelines.services.demo import WeekView, print_addresses, render_outcome, run_demo
from pipelines.services.programs import Ports
from pipelines.settings import Settings


@pytest.mark.parametrize("width", [80, 100])
def test_week__seconds_beside_a_long_summary__keep_their_unit(width: int) -> None:
    summary = "accuracy 0.983 [0.952, 0.994], floor 0.85, passed all 27 checks, 3 more not judged"
    week = WeekView("Week 2", "demo__2026-11-08", ("model_evaluation",))
    week.tasks = {"model_evaluation": TaskState("model_evaluation", "success", 1, 1234.5)}
    week.results = {"model_evaluation": {"summary": summary}}
    console = Console(file=io.StringIO(), width=width)
    console.print(week.render())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1].endswith(" 1234.5 s")
    assert max(map(len, lines)) <= width
    shown = "".join(line[25:-10] for line in lines[1:])
    assert shown.replace(" ", "") == summary.replace(" ", "")


def test_outcome__after_both_releases__has_the_aliases_as_they_are_then() -> None:
    weeks = []
    for version in ("1", "2"):
        week = WeekView(f"Week {version}", version, ())
        week.results = {
            "data_ingestion": {"metrics": {"data/images": 1197.0}},
            "model_evaluation": {
                "metrics": {"test/accuracy": 0.983, "test/accuracy_low": 0.952, "test/accuracy_high": 0.994}
            },
            "deploy_to_staging": {"model": "digits-classification", "version": version},
        }
        weeks.append(week)
    console = Console(file=io.StringIO(), width=90)
    console.print(render_outcome(weeks, {"champion": "2", "previous": "1"}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1].startswith("digits-classification v1, previous ")
    assert lines[2].startswith("digits-classification v2, champion ")


@pytest.mark.parametrize("variable", ["runner", "target"])
def test_demo__somebody_has_exported_a_cluster__keeps_to_this_machine(variable: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=f"PERCH_{variable.upper()}: kubernetes"):
        run_demo(Settings(home=tmp_path, **{variable: "kubernetes"}), stay=False)
    assert not list(tmp_path.iterdir())


def test_demo__another_is_at_work_in_the_home__neither_joins_it_nor_starts_anything(tmp_path: Path) -> None:
    with (
        hold(tmp_path / "demo.lock", wait_s=0),
        pytest.raises(TryLater, match=rf"another demo is at work here \(process {os.getpid()}\)"),
    ):
        run_demo(Settings(home=tmp_path), stay=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.lock"]


@pytest.mark.parametrize("ending", [True, False])
def test_addresses__narrow_and_perhaps_ending__are_whole_and_say_when_they_hold(ending: bool, tmp_path: Path) -> None:
    card = f"http://127.0.0.1:5001/#/experiments/1/runs/{'0' * 32}/artifacts/evaluation/model_card.html"
    console = Console(file=io.StringIO(), width=40)
    print_addresses(console, Settings(home=tmp_path), Ports(5001, 8080, 3000), card, ending=ending)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"Card     {card}\n" in text
    assert ("holds again after" in text) == ending
    assert not ending or text.index("holds again") < text.index("MLflow   http")
