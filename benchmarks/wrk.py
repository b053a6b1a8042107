"""Loads a server with `wrk` (https://github.com/wg/wrk) and reads what it reports.

wrk is a closed loop: a connection sends its next request when the last was answered.  So a server that stalls is asked
less often, and the percentiles look better than what clients with a timetable of their own would see ("coordinated
omission").  They compare servers under equal concurrency; the soak measures against a timetable.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("wrk.lua")


@dataclass(frozen=True)
class Load:
    """What wrk measured in one interval.

    Attributes:
        requests: answered, whatever the status.
        duration_s: of the interval.
        p50_ms: latency, median.
        p95_ms: latency.
        p99_ms: latency.
        errors: statuses of 400 and above, and connections that failed, broke or timed out.
    """

    requests: int
    duration_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int

    @property
    def requests_per_s(self) -> float:
        """Answers without an error, per second."""
        return max(0, self.requests - self.errors) / self.duration_s


def command(
    url: str,
    body: Path,
    content_type: str,
    headers: Mapping[str, str],
    *,
    connections: int,
    seconds: float,
    core: int | None = None,
) -> list[str]:
    """The command line of one measurement.

    Args:
        url: to post to.
        body: file that holds the body.
        content_type: of the body.
        headers: more headers.
        connections: open at once, one request in flight on each.
        seconds: how long; wrk knows whole seconds only.
        core: to pin wrk to; None lets it run anywhere.
    """
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    load = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "--latency"]
    more = [text for pair in headers.items() for text in pair]
    return [*pinned, *load, "-s", str(_SCRIPT), url, "--", str(body), content_type, *more]


def parse(output: str) -> Load:
    """Read the line that `wrk.lua` prints.

    Raises:
        ValueError: there is none.
    """
    line = next((line for line in output.splitlines() if line.startswith("WRK ")), None)
    if line is None:
        raise ValueError(f"wrk printed no result: {output.strip()[-500:]!r}")
    numbers = json.loads(line.removeprefix("WRK "))
    return Load(
        requests=numbers["requests"],
        duration_s=numbers["duration_us"] / 1e6,
        p50_ms=numbers["p50_us"] / 1e3,
        p95_ms=numbers["p95_us"] / 1e3,
        p99_ms=numbers["p99_us"] / 1e3,
        errors=sum(numbers[kind] for kind in ("connect", "read", "write", "status", "timeout")),
    )


def run(line: Sequence[str], seconds: float) -> Load:
    """Run a command line of `command`.

    Raises:
        ValueError: wrk failed.
    """
    done = subprocess.run(line, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise ValueError(f"wrk ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return parse(done.stdout)
