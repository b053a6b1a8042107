"""What `serving.py` makes of its measurements: medians, ratios, targets, a table, a figure and the raw numbers."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import wrk
from benchmarks.serving_contenders import FLOOR, MLFLOW, PERCH

BOTH_CORES = f"{PERCH}, all cores"

# The targets of `make bench-serving`.
MIN_OF_FLOOR = 0.6
MIN_OF_MLFLOW = 3.0
MIN_BOTH_CORES_PER_S = 1000.0
MAX_BOTH_CORES_P95_MS = 50.0
MAX_START_S = 3.0

_MEASURED = ("bentoml", "fastapi", "litserve", "mlflow", "onnxruntime", "starlette", "torch", "uvicorn", "uvloop")


@dataclass(frozen=True)
class Measurement:
    """One server in one round.

    Attributes:
        start_s: from the start of its process to its first answer of 200 to a prediction.
        memory_mib: proportional set size of all its processes, after the load.
        cpu_ms: processor time of all its processes for one request.
        load: what wrk saw.
    """

    start_s: float
    memory_mib: float
    cpu_ms: float
    load: wrk.Load


Results = Mapping[str, Sequence[Measurement]]
"""By the server's name, one measurement for each round."""


@dataclass(frozen=True)
class Target:
    """One promise, and whether it held.

    Attributes:
        promise: in words.
        found: the number.
        held: whether it is good enough.
    """

    promise: str
    found: str
    held: bool


def median(rounds: Sequence[Measurement], read: Callable[[Measurement], float]) -> float:
    """The median of one number over the rounds."""
    return statistics.median(read(measurement) for measurement in rounds)


def rate_ratio(rounds: Sequence[Measurement], baseline: Sequence[Measurement]) -> float:
    """Requests per second over the baseline's: the median of the rounds' ratios, so that what slows a round cancels."""
    pairs = zip(rounds, baseline, strict=True)
    return statistics.median(one.load.requests_per_s / other.load.requests_per_s for one, other in pairs)


def judge(results: Results) -> list[Target]:
    """Hold the numbers against the targets; those whose servers were not measured are left out."""
    targets = []
    perch, floor = results.get(PERCH), results.get(FLOOR)
    frameworks = {name: rounds for name, rounds in results.items() if name != FLOOR and not name.startswith(PERCH)}
    if perch and frameworks:
        best = max(frameworks, key=lambda name: median(frameworks[name], _rate))
        ratio = rate_ratio(perch, frameworks[best])
        targets.append(Target("the fastest of the frameworks", f"{ratio:.2f} times {best}", ratio > 1))
    if perch and floor:
        ratio = rate_ratio(perch, floor)
        targets.append(Target(f"at least {MIN_OF_FLOOR} of the floor", f"{ratio:.2f}", ratio >= MIN_OF_FLOOR))
    if perch and MLFLOW in results:
        ratio = rate_ratio(perch, results[MLFLOW])
        promise = f"at least {MIN_OF_MLFLOW:g} times {MLFLOW}"
        targets.append(Target(promise, f"{ratio:.1f} times", ratio >= MIN_OF_MLFLOW))
    if both := results.get(BOTH_CORES):
        rate, p95_ms, start_s = (median(both, read) for read in (_rate, lambda one: one.load.p95_ms, _start))
        errors = sum(measurement.load.errors for rounds in (both, perch or ()) for measurement in rounds)
        targets += [
            Target(
                f"on all cores at least {MIN_BOTH_CORES_PER_S:g} requests/s",
                f"{rate:.0f}",
                rate >= MIN_BOTH_CORES_PER_S,
            ),
            Target(f"at p95 below {MAX_BOTH_CORES_P95_MS:g} ms", f"{p95_ms:.1f} ms", p95_ms < MAX_BOTH_CORES_P95_MS),
            Target("without an error", str(errors), errors == 0),
            Target(
                f"from its start to the first answer at most {MAX_START_S:g} s",
                f"{start_s:.2f} s",
                start_s <= MAX_START_S,
            ),
        ]
    return targets


def table(results: Results, payloads: Mapping[str, str]) -> Table:
    """Medians of everything, the fastest first.

    Args:
        results: what was measured.
        payloads: what each server was sent, in words.
    """
    shown = Table(box=None, title="medians over the rounds; ratios within a round", title_justify="left")
    shown.add_column("server", no_wrap=True)
    shown.add_column("sent", no_wrap=True)
    columns = ("requests/s", "/ floor", "p50 ms", "p95 ms", "p99 ms", "errors", "CPU ms", "start s", "MiB")
    for column in columns:
        shown.add_column(column, justify="right")
    floor = results.get(FLOOR)
    for name in sorted(results, key=lambda name: -median(results[name], _rate)):
        rounds = results[name]
        shown.add_row(
            f"[bold]{name}[/]" if name.startswith(PERCH) else name,
            payloads[name],
            f"{median(rounds, _rate):,.0f}",
            f"{rate_ratio(rounds, floor):.2f}" if floor else "",
            *(f"{median(rounds, read):.1f}" for read in (_p50, _p95, _p99)),
            str(sum(measurement.load.errors for measurement in rounds)),
            f"{median(rounds, lambda one: one.cpu_ms):.2f}",
            f"{median(rounds, _start):.1f}",
            f"{median(rounds, lambda one: one.memory_mib):.0f}",
        )
    return shown


def write_json(file: Path, arguments: Mapping[str, Any], results: Results, targets: Sequence[Target]) -> None:
    """Every number of every round, with the versions of what was measured."""
    content = {
        "arguments": {name: str(value) for name, value in arguments.items()},
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _MEASURED},
        "rounds": {name: [asdict(measurement) for measurement in rounds] for name, rounds in results.items()},
        "targets": [asdict(target) for target in targets],
    }
    file.write_text(json.dumps(content, indent=2) + "\n")


def draw(file: Path, results: Results) -> None:
    """Requests per second of every round, and the spread of the latencies."""
    from matplotlib.figure import Figure

    names = sorted(results, key=lambda name: median(results[name], _rate))
    rows = range(len(names))
    figure = Figure(figsize=(11, 0.5 * len(names) + 1.6), layout="constrained")
    rates, latencies = figure.subplots(1, 2, sharey=True)
    colours = ["#1b6ca8" if name.startswith(PERCH) else "#444444" if name == FLOOR else "#b0b7bf" for name in names]
    rates.barh(rows, [median(results[name], _rate) for name in names], color=colours)
    for row, name in enumerate(names):
        each = [measurement.load.requests_per_s for measurement in results[name]]
        rates.plot(each, [row] * len(each), "|", color="black", markersize=9)
        p50, p95, p99 = (median(results[name], read) for read in (_p50, _p95, _p99))
        latencies.plot([p50, p99], [row, row], color=colours[row], linewidth=4, solid_capstyle="round")
        latencies.plot([p95], [row], "o", color="black", markersize=4)
    rates.set_yticks(rows, names)
    rates.set_xlabel("requests per second; a tick for each round")
    latencies.set_xlabel("latency in ms: p50 to p99, dot at p95")
    latencies.set_xscale("log")
    for axes in (rates, latencies):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)


def _rate(measurement: Measurement) -> float:
    return measurement.load.requests_per_s


def _start(measurement: Measurement) -> float:
    return measurement.start_s


def _p50(measurement: Measurement) -> float:
    return measurement.load.p50_ms


def _p95(measurement: Measurement) -> float:
    return measurement.load.p95_ms


def _p99(measurement: Measurement) -> float:
    return measurement.load.p99_ms
