"""Half an hour of good, bad and slow clients at 70 % of capacity, a worker killed, the server ended: `make soak`.

    python -m benchmarks.soak [--minutes 30] [--load 0.7]

The release is served as shipped, with two workers.  The capacity is the highest rate of the same mix at which less than
one request in a thousand is turned away, coming at fixed times as they do in the soak, so that a stall shows.  After a
quarter of the time one worker gets SIGKILL; after half of it the first server gets SIGTERM, and the clients, who are
told nothing, go to a second one where nobody listens any more.  At the end every answered prediction is looked for in
what was kept, and the other way round.  Ends with 1 when a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.serving_model import prepare_model
from benchmarks.serving_release import prepare_release
from benchmarks.soak_checks import Check, Evidence, check_memory, fit_slope
from benchmarks.soak_clients import SLOW_KINDS
from benchmarks.soak_course import WORKERS, Course, Soak
from pipelines.params import load_params
from pipelines.settings import get_settings


def main() -> None:
    """Soak, judge, print and draw."""
    arguments = _parse_arguments()
    settings = get_settings()
    out: Path = arguments.out or settings.home / "benchmarks" / "soak"
    out.mkdir(parents=True, exist_ok=True)
    progress = Console(stderr=True, soft_wrap=True, highlight=False)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="perch-soak-") as temporary:
        folder = Path(temporary)
        params = load_params(settings.project_dir / "params.yaml")
        release = prepare_release(settings, prepare_model(settings, params.model_name, folder), folder)
        soak = Soak(release, folder, arguments.minutes, arguments.load, progress.print)
        course = uvloop.run(soak.run())
        allowed = {kind.name: kind.allowed for kind in (*soak.clients.kinds, *SLOW_KINDS)}
        evidence = Evidence(folder, release.predictions, allowed, course.timeline)
        checks = [*course.checks, *evidence.check(), *_check_memory(course)]
        console.print(_outcomes(evidence))
        console.print(_verdicts(course, checks))
        _draw(out / "soak.png", course, evidence)
    report = {"course": asdict(course), "checks": [asdict(check) for check in checks]}
    (out / "soak.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    console.print(f"numbers and figure: {out}", highlight=False)
    if not all(check.held for check in checks):
        sys.exit(1)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of load")
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity")
    parser.add_argument("--out", type=Path, help="folder of the results; .perch/benchmarks/soak by default")
    return parser.parse_args()


def _check_memory(course: Course) -> list[Check]:
    slopes = (
        fit_slope(name, [sample.at_s for sample in samples], [sample.mib for sample in samples])
        for name, samples in course.stretches().items()
    )
    return check_memory(slope for slope in slopes if slope)


def _outcomes(evidence: Evidence) -> Table:
    table = Table(box=None, title="what the clients got (0: no answer, by design)", title_justify="left")
    for column in ("request", "status", "times", "p50 ms", "p95 ms"):
        table.add_column(column, justify="left" if column == "request" else "right")
    for kind, status, count, p50_ms, p95_ms in evidence.outcomes():
        table.add_row(kind, str(status), f"{count:,}", f"{p50_ms:.1f}", f"{p95_ms:.1f}")
    return table


def _verdicts(course: Course, checks: list[Check]) -> Table:
    title = f"{course.rate_per_s:.0f} requests/s; {WORKERS} workers beside the clients take {course.capacity_per_s:.0f}"
    table = Table("", "promise", "found", box=None, title=title, title_justify="left")
    for check in checks:
        table.add_row("[green]held[/]" if check.held else "[red]BROKEN[/]", check.promise, check.found)
    return table


def _draw(file: Path, course: Course, evidence: Evidence) -> None:
    """Latency and memory over time, with the incidents."""
    from matplotlib.figure import Figure

    timeline = course.timeline
    figure = Figure(figsize=(11, 6), layout="constrained")
    latency, memory = figure.subplots(2, 1, sharex=True)
    rows = evidence.latency_over_time(max(1.0, (timeline.end_s - timeline.began_s) / 300))
    for label, column, colour in (("slowest", 3, "#b0b7bf"), ("p95", 2, "#e08a1e"), ("p50", 1, "#1b6ca8")):
        latency.plot([row[0] for row in rows], [row[column] for row in rows], label=label, color=colour, linewidth=1)
    latency.set_yscale("log")
    latency.set_ylabel("latency of one image, ms")
    for server, colour in (("A", "#1b6ca8"), ("B", "#2a9d5c")):
        samples = [sample for sample in course.samples if sample.server == server]
        at_s, mib = [sample.at_s for sample in samples], [sample.mib for sample in samples]
        memory.plot(at_s, mib, label=f"server {server}", color=colour)
    memory.set_ylim(bottom=0)
    memory.set_ylabel("memory (PSS), MiB")
    memory.set_xlabel("seconds")
    for axes in (latency, memory):
        for incident in (timeline.kill, timeline.shutdown):
            axes.axvspan(incident.start_s, incident.end_s, color="#d1495b", alpha=0.15)
            axes.annotate(
                incident.name, (incident.start_s, 0.97), xycoords=("data", "axes fraction"), fontsize=8, va="top"
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper right", ncols=3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
