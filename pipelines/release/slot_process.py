"""`python -m pipelines.release.slot_process NAME`: become the service of the release that the plan has for a process.

The supervisor runs this, and again whenever it ends.  What to serve is read each time, so that the supervisor's own
configuration never changes; each start is noted, so that a service that keeps ending is seen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil

from pipelines.core.results import write_json
from pipelines.errors import Refusal
from pipelines.release.envoy import read_route_table
from pipelines.release.local_layout import HOST, LocalLayout, SlotPorts
from pipelines.release.local_plan import Deployment
from pipelines.settings import get_settings

_MARK = "PERCH_SLOT_PROCESS"  # in the environment of everything that a slot's service starts


def main(arguments: list[str]) -> NoReturn:
    """Become the service; 65 when the plan has nothing for this process."""
    (process,) = arguments
    layout = LocalLayout(get_settings().home)
    plan, _ = read_route_table(json.loads(layout.routes_file.read_text(encoding="utf-8")))
    deployment = next((known for known in plan.slots.values() if known.process == process), None)
    if deployment is None:
        refusal = Refusal(f"the process {process}", "has no release to serve", way_out="deploy one")
        print(f"refused: {refusal}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(refusal.exit_code)
    _end_leftovers(layout.home, process)
    _note_start(layout, deployment)
    command = [sys.executable, "-m", "serving", deployment.release.address]
    os.execve(sys.executable, command, service_environment(layout, deployment, layout.ports().slots[process]))  # noqa: S606


def service_environment(layout: LocalLayout, deployment: Deployment, ports: SlotPorts) -> dict[str, str]:
    """The environment of a slot's service: this one's, with what each process must have for itself."""
    settings = {
        "RELEASE_DIGEST": deployment.release.digest,
        "HOST": HOST,
        "PORT": ports.api,
        "METRICS_PORT": ports.metrics,
        "WORKERS": deployment.workers,
        "SPOOL_DIR": layout.home / "serving" / deployment.process / "spool",
    }
    environment = {**os.environ, _MARK: deployment.process}
    return environment | {f"PERCH_SERVING_{name}": str(value) for name, value in settings.items()}


def read_starts(layout: LocalLayout, process: str) -> dict[str, Any]:
    """`digest`, `started_at` and `starts` of a process; empty before its first start."""
    try:
        noted: dict[str, Any] = json.loads(layout.started_file(process).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return noted


def _note_start(layout: LocalLayout, deployment: Deployment) -> None:
    before = read_starts(layout, deployment.process)
    digest = deployment.release.digest
    starts = before["starts"] + 1 if before.get("digest") == digest else 1
    write_json(layout.started_file(deployment.process), {"digest": digest, "started_at": time.time(), "starts": starts})


def _end_leftovers(home: Path, process: str) -> None:
    """End the workers of a service whose first process was killed: they would go on listening on its ports."""
    leftovers = [other for other in psutil.process_iter() if _is_leftover(other, home, process)]
    for other in leftovers:
        other.send_signal(signal.SIGKILL)
    psutil.wait_procs(leftovers, timeout=10)


def _is_leftover(other: psutil.Process, home: Path, process: str) -> bool:
    try:
        environment = other.environ()
    except psutil.Error:
        return False
    return other.pid != os.getpid() and environment.get(_MARK) == process and environment.get("PERCH_HOME") == str(home)


if __name__ == "__main__":
    main(sys.argv[1:])
