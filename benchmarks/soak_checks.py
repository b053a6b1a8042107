"""What the soak promises, held against what its clients, its memory samples and the kept predictions say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from benchmarks.soak_clients import BROKEN, COLUMNS, GIVEN_UP, REFUSED
from pipelines.core.prediction_ids import first_id_at

MAX_MEMORY_GROWTH = 0.05  # of a stretch's median, by the regression line over what follows its warm-up
MAX_LATENCY_RATIO = 1.5  # p95 of the last third over the first
MAX_LAG_MS = 100.0  # p99 of how late a request was sent: more, and the clients did not keep their timetable
MAX_CUT_OFF_S = 0.02  # of requests that SIGTERM may meet between the kernel and the server, which never sees them
LOSS_WINDOW = timedelta(seconds=0.5)  # before a SIGKILL: what was predicted in it may be lost
STRETCH_WARM_UP = 0.25  # share of a stretch that is not judged: allocators and caches fill

_OUTCOMES = {BROKEN: "connection broken", REFUSED: "refused", GIVEN_UP: "not sent, too many waited"}


@dataclass(frozen=True)
class Check:
    """One promise, and whether it held.

    Attributes:
        promise: in words.
        found: what was found.
        held: whether that is good enough.
    """

    promise: str
    found: str
    held: bool


@dataclass(frozen=True)
class Incident:
    """Something done to the server.

    Attributes:
        name: e.g. `SIGKILL`.
        at: when, by the clock on the wall.
        start_s: when, on the soak's clock.
        end_s: when its effects should be over.
    """

    name: str
    at: datetime
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """When what was done.

    Attributes:
        began_s: the open loop's first request, on the soak's clock.
        end_s: its last.
        kill: a worker got SIGKILL: connections may break, the last half second may be lost, and until it is back the
            load is more than the rest can take, which may say so.
        shutdown: the first server got SIGTERM.
    """

    began_s: float
    end_s: float
    kill: Incident
    shutdown: Incident


@dataclass(frozen=True)
class Slope:
    """The regression line over a stretch of memory samples.

    Attributes:
        name: which processes, between which incidents.
        median_mib: of the samples after the warm-up.
        growth_mib: from the line's beginning to its end.
    """

    name: str
    median_mib: float
    growth_mib: float

    @property
    def growth(self) -> float:
        """Relative to the median."""
        return self.growth_mib / self.median_mib


def fit_slope(name: str, times_s: Sequence[float], memory_mib: Sequence[float]) -> Slope | None:
    """Least squares over a stretch without its warm-up; None where fewer than five samples are left."""
    times, memory = np.asarray(times_s, float), np.asarray(memory_mib, float)
    if len(times):
        judged = times >= times[0] + STRETCH_WARM_UP * (times[-1] - times[0])
        times, memory = times[judged], memory[judged]
    if len(times) < 5:
        return None
    mib_per_s = float(np.polyfit(times, memory, 1)[0])
    return Slope(name, float(np.median(memory)), mib_per_s * float(times[-1] - times[0]))


def check_memory(slopes: Iterable[Slope]) -> list[Check]:
    """Memory is flat in every stretch."""
    return [
        Check(
            f"memory is flat: {slope.name}, at most {MAX_MEMORY_GROWTH:.0%} more",
            f"{slope.median_mib:.0f} MiB, {slope.growth_mib:+.1f} MiB ({slope.growth:+.1%})",
            slope.growth <= MAX_MEMORY_GROWTH,
        )
        for slope in slopes
    ]


class Evidence:
    """The clients' files and the kept predictions, as tables.

    Args:
        folder: with the CSV files of `soak_clients.Journal`.
        predictions: folder that the servers kept predictions in.
        allowed: statuses by kind of request.
        timeline: when what was done.
    """

    def __init__(
        self, folder: Path, predictions: Path, allowed: Mapping[str, Iterable[int]], timeline: Timeline
    ) -> None:
        self._timeline = timeline
        self._database = database = duckdb.connect()
        database.execute("SET TimeZone = 'UTC'")
        for name, columns in COLUMNS.items():
            database.execute(f"CREATE TABLE {name} ({', '.join(map(' '.join, columns.items()))})")
            database.execute(f"COPY {name} FROM '{folder / name}.csv' (HEADER)")
        database.execute("CREATE TABLE kept (prediction_id VARCHAR, request_id VARCHAR)")
        if files := [str(file) for file in (predictions / "predictions").rglob("*.parquet")]:
            database.execute("INSERT INTO kept SELECT prediction_id, request_id FROM read_parquet(?)", [files])
        database.execute("CREATE TABLE allowed (kind VARCHAR, status INTEGER)")
        pairs = [(kind, status) for kind, statuses in allowed.items() for status in statuses]
        database.executemany("INSERT INTO allowed VALUES (?, ?)", pairs)

    def check(self) -> list[Check]:
        """All promises that requests and predictions can prove."""
        return [
            self._statuses(),
            self._breakages(),
            self._kept(),
            self._kept_once(),
            self._answered(),
            self._latency(),
            self._timetable(),
        ]

    def outcomes(self) -> list[tuple[str, int, int, float, float]]:
        """Kind, status, count, p50 and p95 of the latency in ms, without the measurement of the capacity."""
        return self._rows(
            "SELECT kind, status, count(*), quantile_cont(latency_ms, 0.5), quantile_cont(latency_ms, 0.95) "
            "FROM requests WHERE phase <> 'capacity' GROUP BY ALL ORDER BY count(*) DESC"
        )

    def latency_over_time(self, interval_s: float) -> list[tuple[float, float, float, float]]:
        """Of single images: time, p50, p95 and maximum in ms per interval."""
        return self._rows(
            "SELECT floor(due_s / ?) * ? AS since_s, quantile_cont(latency_ms, 0.5), "
            "quantile_cont(latency_ms, 0.95), max(latency_ms) FROM requests "
            "WHERE kind = 'PNG' AND phase <> 'capacity' GROUP BY since_s ORDER BY since_s",
            [interval_s, interval_s],
        )

    def _statuses(self) -> Check:
        # A slow client does not send again, so that the kill of its worker is all it sees.
        kill = self._timeline.kill
        unasked = "FROM requests ANTI JOIN allowed USING (kind, status) WHERE"
        at_kill = "(status IN (?, 503) AND due_s + latency_ms / 1000 BETWEEN ? AND ?)"
        window = [BROKEN, kill.start_s, kill.end_s]
        rows = self._rows(  # the capacity is found by asking for too much
            f"SELECT kind, status, count(*) {unasked} NOT {at_kill} AND NOT (status = 503 AND phase = 'capacity') "
            "GROUP BY ALL ORDER BY ALL",
            window,
        )
        overloaded = self._number(f"SELECT count(*) {unasked} status = 503 AND {at_kill}", window)
        total = self._number("SELECT count(*) FROM requests")
        found = "; ".join(f"{count} x {kind}: {_OUTCOMES.get(status, status)}" for kind, status, count in rows)
        return Check(
            "no status that was not asked for, 503 only while a killed worker is missing",
            f"{found or f'{total:,} requests'}; {overloaded:,.0f} times 503 at the kill",
            not rows and total > 0,
        )

    def _breakages(self) -> Check:
        timeline = self._timeline
        kill, shutdown = timeline.kill, timeline.shutdown
        counts = dict(
            self._rows(
                "SELECT CASE WHEN at_s BETWEEN ? AND ? THEN 'kill' WHEN at_s BETWEEN ? AND ? THEN 'shutdown' "
                "ELSE 'other' END AS during, count(*) FROM broken GROUP BY during",
                [kill.start_s, kill.end_s, shutdown.start_s, shutdown.end_s],
            )
        )
        at_kill, at_shutdown, other = (counts.get(name, 0) for name in ("kill", "shutdown", "other"))
        found = f"{at_kill} at the kill, {at_shutdown} at the shutdown, {other} elsewhere"
        soaked = self._number("SELECT count(*) FROM requests WHERE phase <> 'capacity'")
        limit = MAX_CUT_OFF_S * soaked / (timeline.end_s - timeline.began_s)
        promise = f"connections break at the kill, and at the shutdown at most {MAX_CUT_OFF_S:g} s of requests"
        return Check(promise, found, at_shutdown <= limit and not other)

    def _kept(self) -> Check:
        at = self._timeline.kill.at
        # Ids sort by the time of their prediction, and the server's clock is ours.
        window = [first_id_at(at - LOSS_WINDOW), first_id_at(at)]
        lost, spared = (
            self._number(
                "SELECT count(*) FROM predictions ANTI JOIN kept USING (prediction_id) "
                f"WHERE prediction_id {condition} ? AND ?",
                window,
            )
            for condition in ("NOT BETWEEN", "BETWEEN")
        )
        total = self._number("SELECT count(*) FROM predictions")
        seconds = LOSS_WINDOW.total_seconds()
        found = f"{total:,} answered, {lost} lost, and {spared} of the last {seconds:g} s before the kill"
        return Check("every answered prediction is kept", found, not lost and total > 0)

    def _kept_once(self) -> Check:
        total, twice = self._rows("SELECT count(*), count(*) - count(DISTINCT prediction_id) FROM kept")[0]
        return Check("no prediction is kept twice", f"{total:,} rows, {twice} too many", not twice)

    def _answered(self) -> Check:
        kill = self._timeline.kill
        killed, lost = self._rows(
            "SELECT count(*) FILTER (at_s BETWEEN $start AND $end), "
            "count(*) FILTER (at_s IS NULL OR at_s NOT BETWEEN $start AND $end) "
            "FROM (SELECT * FROM kept ANTI JOIN predictions USING (prediction_id)) LEFT JOIN broken USING (request_id)",
            {"start": kill.start_s, "end": kill.end_s},
        )[0]
        found = f"{lost} answers missing, and {killed} that the killed worker did not get out"
        return Check("every prediction that was made was answered", found, not lost)

    def _latency(self) -> Check:
        timeline = self._timeline
        third_s = (timeline.end_s - timeline.began_s) / 3
        thirds = ((timeline.began_s, timeline.began_s + third_s), (timeline.end_s - third_s, timeline.end_s))
        incidents = [edge for one in (timeline.kill, timeline.shutdown) for edge in (one.start_s - 1, one.end_s)]
        first, last = (
            self._number(
                "SELECT quantile_cont(latency_ms, 0.95) FROM requests WHERE kind = 'PNG' AND phase <> 'capacity' "
                "AND due_s BETWEEN ? AND ? AND due_s NOT BETWEEN ? AND ? AND due_s NOT BETWEEN ? AND ?",
                [*third, *incidents],
            )
            for third in thirds
        )
        return Check(
            f"latency is flat: p95 of the last third at most {MAX_LATENCY_RATIO:g} times the first",
            f"{first:.1f} ms, then {last:.1f} ms",
            0 < last <= MAX_LATENCY_RATIO * first,
        )

    def _timetable(self) -> Check:
        timeline = self._timeline
        lag_ms = self._number(
            "SELECT quantile_cont(lag_ms, 0.99) FROM requests WHERE phase <> 'capacity' "
            "AND due_s NOT BETWEEN ? AND ? AND due_s NOT BETWEEN ? AND ?",
            [edge for one in (timeline.kill, timeline.shutdown) for edge in (one.start_s, one.end_s)],
        )
        promise = f"the clients kept their timetable: p99 at most {MAX_LAG_MS:g} ms late"
        return Check(promise, f"{lag_ms:.1f} ms", lag_ms <= MAX_LAG_MS)

    def _rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        return self._database.execute(query, values or None).fetchall()

    def _number(self, query: str, values: Sequence[Any] = ()) -> float:
        number = self._rows(query, values)[0][0]
        return 0.0 if number is None else number
