"""`python -m pipelines.release.slot_process NAME`: become the service of the release that the plan has for a process.

The supervisor runs this, and again whenever it ends.  What to serve is read each time, so that the supervisor's own
configuration never changes; each start is noted, so that a service that keeps ending is seen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

import psutil

from pipelines.core.results import write_json
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER, PerchError, Refusal
from pipelines.release.envoy import read_route_table
from pipelines.release.local_layout import HOST, LocalLayout, SlotPorts
from pipelines.release.local_plan import Deployment
from pipelines.settings import get_settings

_SPOOL = "PERCH_SERVING_SPOOL_DIR"
START_LINE = "perch: starting "  # of a log
_STABLE_AFTER_S = 60.0
_MOST_WAIT_S = 30.0
_PATIENCE_S = 5.0
_RETRY_AFTER_S = 5.0


def main(arguments: list[str]) -> NoReturn:
    """Become the service; 65 when the plan has nothing for this process, 75 when the disk is full."""
    (process,) = arguments
    layout = LocalLayout(get_settings().home)
    try:
        command, environment = prepare(layout, process)
    except (OSError, PerchError) as error:
        refused = isinstance(error, Refusal)
        print(f"{'refused' if refused else 'failed'}: {error}", file=sys.stderr, flush=True)  # noqa: T201
        if refused:
            sys.exit(EXIT_REFUSED)
        time.sleep(_RETRY_AFTER_S)  # the supervisor does not wait
        sys.exit(EXIT_TRY_LATER)
    os.execve(sys.executable, command, environment)  # noqa: S606


def prepare(layout: LocalLayout, process: str) -> tuple[list[str], dict[str, str]]:
    """Clear the way for a process's service.

    Returns:
        The command that serves its release, and the environment.

    Raises:
        Refusal: the plan has nothing for it.
        OSError: the start cannot be noted.
    """
    plan, _ = read_route_table(json.loads(layout.routes_file.read_text(encoding="utf-8")))
    deployment = next((known for known in plan.slots.values() if known.process == process), None)
    if deployment is None:
        raise Refusal(f"the process {process}", "has no release to serve", way_out="deploy one")
    environment = service_environment(layout, deployment, layout.ports().slots[process])
    end_leftovers(layout, process)
    time.sleep(_note_start(layout, deployment))
    release = deployment.release
    print(f"{START_LINE}{release.model} v{release.version}", file=sys.stderr, flush=True)  # noqa: T201
    return [sys.executable, "-m", "serving", release.address], environment


def service_environment(layout: LocalLayout, deployment: Deployment, ports: SlotPorts) -> dict[str, str]:
    """The environment of a slot's service: this one's, with what each process must have for itself."""
    settings = {
        "RELEASE_DIGEST": deployment.release.digest,
        "HOST": HOST,
        "PORT": ports.api,
        "METRICS_HOST": HOST,
        "METRICS_PORT": ports.metrics,
        "WORKERS": deployment.workers,
        "SPOOL_DIR": layout.spool_folder(deployment.process),
    }
    return {**os.environ, **{f"PERCH_SERVING_{name}": str(value) for name, value in settings.items()}}


def read_starts(layout: LocalLayout, process: str) -> dict[str, Any]:
    """`digest`, `started_at` and `starts` of a process; empty before its first start."""
    try:
        noted: dict[str, Any] = json.loads(layout.started_file(process).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return noted


def end_leftovers(layout: LocalLayout, process: str) -> None:
    """End the workers of a service whose first process was killed: they would go on listening on its ports.

    They are known by their spool, which no other service of any home has.  They have gone on answering, and may finish
    what they are at.
    """
    spool = str(layout.spool_folder(process))
    leftovers = [other for other in psutil.process_iter() if _has_spool(other, spool)]
    for end, patience_s in ((psutil.Process.terminate, _PATIENCE_S), (psutil.Process.kill, 10.0)):
        for other in leftovers:
            with suppress(psutil.NoSuchProcess):
                end(other)
        _, leftovers = psutil.wait_procs(leftovers, timeout=patience_s)


def _note_start(layout: LocalLayout, deployment: Deployment) -> float:
    """Note a start.

    Returns:
        Seconds to wait before it: a service that ends again and again must not take the others' processor time.
    """
    before, now = read_starts(layout, deployment.process), time.time()
    digest, starts, wait_s = deployment.release.digest, 1, 0.0
    if before.get("digest") == digest:
        starts = before["starts"] + 1
        if now - before["started_at"] < _STABLE_AFTER_S:
            wait_s = min(2.0 ** (starts - 3), _MOST_WAIT_S)  # 0.5 s after the first crash
    write_json(
        layout.started_file(deployment.process), {"digest": digest, "started_at": now + wait_s, "starts": starts}
    )
    return wait_s


def _has_spool(other: psutil.Process, spool: str) -> bool:
    try:
        return other.pid != os.getpid() and other.environ().get(_SPOOL) == spool
    except psutil.Error:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
