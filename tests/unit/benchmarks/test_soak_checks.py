import csv
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from benchmarks.soak_checks import Check, Evidence, Incident, Timeline, check_memory, fit_slope
from benchmarks.soak_clients import BROKEN, COLUMNS
from pipelines.core.prediction_ids import first_id_at

BEGAN = datetime(2026, 11, 21, 12, tzinfo=UTC)
KILL, SHUTDOWN, END_S = 25.0, 50.0, 100.0
TIMELINE = Timeline(
    0.0,
    END_S,
    Incident("SIGKILL", BEGAN + timedelta(seconds=KILL), KILL, KILL + 5),
    Incident("SIGTERM", BEGAN + timedelta(seconds=SHUTDOWN), SHUTDOWN, SHUTDOWN + 5),
)
STATUSES = "no status that was not asked for, 503 only while a killed worker is missing"


class Story:
    """A soak in which nothing went wrong: an image each half second, answered after 10 ms, and kept."""

    def __init__(self) -> None:
        self.requests = [[at, "PNG", "server A", 200, 10.0, 0.1, f"r{at}"] for at in np.arange(0, END_S, 0.5)]
        self.predictions = [[self.id_at(row[0]), row[0] + 0.01, row[6]] for row in self.requests]
        self.broken: list[list[object]] = []
        self.kept = [(prediction_id, request_id) for prediction_id, _, request_id in self.predictions]

    @staticmethod
    def id_at(at_s: float) -> str:
        return first_id_at(BEGAN + timedelta(seconds=float(at_s)))

    def checks(self, folder: Path) -> dict[str, Check]:
        for name, rows in (("requests", self.requests), ("predictions", self.predictions), ("broken", self.broken)):
            with (folder / f"{name}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows([COLUMNS[name], *rows])
        kept = folder / "store" / "predictions" / "model=digits" / "day.parquet"
        kept.parent.mkdir(parents=True)
        ids, requests = zip(*self.kept, strict=True)
        parquet.write_table(pa.table({"prediction_id": ids, "request_id": requests}), kept)
        evidence = Evidence(folder, folder / "store", {"PNG": {200}, "text": {415}}, TIMELINE)
        assert evidence.outcomes()
        assert len(evidence.latency_over_time(10.0)) == 10
        return {check.promise.partition(":")[0]: check for check in evidence.check()}


def test_evidence__nothing_went_wrong__holds_everything(tmp_path: Path) -> None:
    checks = Story().checks(tmp_path)
    assert len(checks) == 7
    assert [check for check in checks.values() if not check.held] == []


def _status_not_asked_for(story: Story) -> None:
    story.requests.append([60.0, "text", "server A", 500, 10.0, 0.1, "x"])


def _overloaded_without_a_kill(story: Story) -> None:
    story.requests.append([SHUTDOWN, "PNG", "server A", 503, 10.0, 0.1, "x"])


def _broken_at_shutdown(story: Story) -> None:
    story.broken.append([SHUTDOWN + 1, "PNG", "x", "reset"])


def _answered_but_lost(story: Story) -> None:
    del story.kept[10]


def _lost_before_the_last_half_second(story: Story) -> None:
    lost = Story.id_at(KILL - 0.6)
    story.predictions.append([lost, KILL - 0.59, "x"])


def _kept_twice(story: Story) -> None:
    story.kept.append(story.kept[0])


def _predicted_and_never_answered(story: Story) -> None:
    story.kept.append((Story.id_at(70.2), "x"))


def _slow_at_the_end(story: Story) -> None:
    for row in story.requests[-40:]:
        row[4] = 30.0


def _clients_too_slow(story: Story) -> None:
    for row in story.requests[:20]:
        row[5] = 500.0


@pytest.mark.parametrize(
    ("spoil", "promise"),
    [
        (_status_not_asked_for, STATUSES),
        (_overloaded_without_a_kill, STATUSES),
        (_broken_at_shutdown, "connections break at the kill, and at the shutdown at most 0.02 s of requests"),
        (_answered_but_lost, "every answered prediction is kept"),
        (_lost_before_the_last_half_second, "every answered prediction is kept"),
        (_kept_twice, "no prediction is kept twice"),
        (_predicted_and_never_answered, "every prediction that was made was answered"),
        (_slow_at_the_end, "latency is flat"),
        (_clients_too_slow, "the clients kept their timetable"),
    ],
)
def test_evidence__one_thing_went_wrong__breaks_that_promise_alone(
    spoil: Callable[[Story], None], promise: str, tmp_path: Path
) -> None:
    story = Story()
    spoil(story)
    assert [name for name, check in story.checks(tmp_path).items() if not check.held] == [promise]


def test_evidence__what_a_kill_may_cost__is_allowed(tmp_path: Path) -> None:
    story = Story()
    story.predictions.append([Story.id_at(KILL - 0.3), KILL - 0.2, "answered, not yet on disk"])
    story.kept.append((Story.id_at(KILL - 0.25), "on disk, not yet answered"))
    story.broken.append([KILL + 0.1, "PNG", "on disk, not yet answered", "reset"])
    story.requests.append([KILL - 1, "PNG", "server A", BROKEN, 2000.0, 0.1, "a slow client of the killed worker"])
    story.requests.append([KILL + 1, "PNG", "server A", 503, 10.0, 0.1, "too many for the other worker"])
    assert [check for check in story.checks(tmp_path).values() if not check.held] == []


def test_evidence__turned_away_while_the_capacity_was_looked_for__is_allowed(tmp_path: Path) -> None:
    story = Story()
    story.requests.append([-5.0, "PNG", "capacity", 503, 10.0, 0.1, "too many"])
    assert [check for check in story.checks(tmp_path).values() if not check.held] == []


def test_fit_slope__warm_up_then_flat__is_flat() -> None:
    times = np.arange(100.0)
    slope = fit_slope("server", list(times), list(np.minimum(200, 100 + 5 * times)))
    assert slope is not None
    assert slope.growth_mib == pytest.approx(0, abs=1e-6)
    assert check_memory([slope])[0].held


def test_fit_slope__a_leak_under_noise__is_found() -> None:
    times = np.arange(100.0)
    noise = np.random.default_rng(1).normal(0, 3, 100)
    slope = fit_slope("server", list(times), list(200 + 0.2 * times + noise))
    assert slope is not None
    assert slope.growth_mib == pytest.approx(0.2 * 74, rel=0.3)
    assert not check_memory([slope])[0].held


def test_fit_slope__few_samples__is_none() -> None:
    assert fit_slope("server", [], []) is None
    assert fit_slope("server", [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]) is None
