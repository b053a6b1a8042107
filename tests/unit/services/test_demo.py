"""What the demo shows of a week, where nobody sees a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.services.airflow_client import TaskState
from pipelines.services.demo import WeekView


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
    assert "".join(line[26:-11].strip() for line in lines[1:]).replace(" ", "") in summary.replace(" ", "")
