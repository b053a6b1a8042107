"""The release target of one machine: services under the supervisor, traffic divided by Envoy.

One file holds slots and routes and is replaced by a rename (`local_plan`, `envoy`).  Every change is: end what is in
the way, rename the file, bring the processes in line with it.  A caller killed anywhere leaves the old plan or the new
one, and the same call again finishes the work.  Dividing traffic and looking at it need Envoy alone, not the
supervisor.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.errors import Refusal, TryLater
from pipelines.release.envoy import (
    bootstrap,
    read_config_dump,
    read_healthy_clusters,
    read_route_table,
    route_table,
)
from pipelines.release.http_exchange import fetch
from pipelines.release.local_layout import ENVOY, HOST, LocalLayout, LocalPorts
from pipelines.release.local_plan import PROCESSES, Deployment, Plan
from pipelines.release.slot_metrics import fetch_metrics, read_counts
from pipelines.release.slot_process import START_LINE, end_leftovers, read_starts
from pipelines.release.supervision import Supervisor
from pipelines.release.targets import ReleaseRef, Routing, Slot, SlotCounters, TargetState
from pipelines.settings import Settings

_IN_FORCE_LIMIT_S = 15.0  # Envoy is back 1 s after a kill, and takes a new file within 60 ms
_NUDGE_S = 2.0
_ROUTABLE_LIMIT_S = 10.0
_CHANGE_LIMIT_S = 30.0  # Envoy may have to come back first
_DEPLOYMENT_LIMIT_S = 120.0  # it ends a service first
_ASK_LIMIT_S = 3.0
_READY_LIMIT_S = 2.0  # a rollback takes less than 5 s, and may begin while somebody waits for this answer
_RESERVE_BYTES = 256 * 1024  # a route table has some 20 KB
_LOG_LINES = 15
_MOST_STARTS = 5  # of a service that was not ready in between: some 20 s


class LocalTarget:
    """A `ReleaseTarget` on this machine.

    Args:
        settings: whose home holds the services.
    """

    def __init__(self, settings: Settings) -> None:
        self._layout = LocalLayout(settings.home)
        self._supervisor = Supervisor(settings.home)

    # What `perch up` does.

    def lay_out(self, ports: LocalPorts) -> None:
        """Write Envoy's configuration before it starts; slots and routes of an earlier time stay as they were."""
        self._layout.write_ports(ports)
        self._layout.routes_folder.mkdir(parents=True, exist_ok=True)
        _replace(self._layout.bootstrap_file, bootstrap(self._layout, ports))
        if not self._layout.routes_file.exists():
            _replace(self._layout.routes_file, route_table(Plan(), 1))
        _keep_reserve(self._layout.reserve_file)

    def resume(self) -> None:
        """Start the services that the plan has, end those that it has not; returns before they are ready."""
        with self._moving_services():
            self._align(self._read_plan())

    # ReleaseTarget

    def state(self) -> TargetState:
        """What Envoy has in force, and which services take requests."""
        plan, _ = self._in_force()
        return TargetState(
            slots={slot: deployment.release for slot, deployment in plan.slots.items()},
            ready=self._find_ready(plan),
            routing=plan.routing,
        )

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        """Put a release into a slot; its service verifies it before it unpacks or loads anything of it."""
        with self._moving_services():
            plan = self._read_plan()
            there = plan.slots.get(slot)
            if there is None or there.release != release:
                workers = _count_workers(slot)
                process = plan.deployed(slot, release, workers).slots[slot].process
                # A service that finishes what it is answering takes its time, and traffic may have to move meanwhile.
                self._stop(process)
                self._layout.started_file(process).unlink(missing_ok=True)
                with self._changing() as plan:
                    changed = plan.deployed(slot, release, workers)
                    if changed.slots[slot].process != process:
                        raise TryLater(f"the slot {slot} became another service meanwhile\n  what to do: try again")
                    plan = self._write(changed)
            self._align(plan)

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        """Wait until the slot's service takes requests; one that cannot reach its store is given time."""
        deadline = time.monotonic() + timeout_s
        while True:
            deployment = self._deployment(slot)
            if self._is_ready(deployment):
                return
            # The supervisor starts again what ends, but not what was refused.
            starts = read_starts(self._layout, deployment.process).get("starts", 0)
            if not self._supervisor.is_up(deployment.process) or starts > _MOST_STARTS:
                raise Refusal(
                    f"the service in the slot {slot}",
                    f"ended while starting; the last lines of its log:\n{self._log_tail(deployment.process)}",
                    way_out=f"mend that; the log is {self._layout.log_file(deployment.process)}",
                )
            if time.monotonic() > deadline:
                raise TryLater(
                    f"the service in the slot {slot}: not ready after {timeout_s:g} s\n"
                    f"{self._log_tail(deployment.process)}\n"
                    f"  what to do: look at {self._layout.log_file(deployment.process)}"
                )
            time.sleep(0.1)

    def route(self, routing: Routing) -> None:
        """Divide traffic, in force within some 50 ms; only a slot without traffic must show that it is ready."""
        with self._changing() as plan:
            changed = plan.routed(routing)
            self._require_routable(plan, changed)
            self._put_in_force(changed)

    def promote(self) -> None:
        """Exchange the roles of canary and stable by one rename; the processes do not notice."""
        with self._changing() as plan:
            changed = plan.promoted()
            self._require_routable(plan, changed)
            self._put_in_force(changed)

    def observe(self, slot: Slot) -> SlotCounters | None:
        """What the slot's service says at its /metrics; None when it does not answer or serves another release."""
        plan = self._read_plan()
        deployment = plan.slots.get(slot)
        if deployment is None:
            return None
        before = read_starts(self._layout, deployment.process)
        try:
            counts = read_counts(fetch_metrics(self._layout.ports().slots[deployment.process].metrics, _ASK_LIMIT_S))
        except (OSError, ValueError):
            return None
        started = read_starts(self._layout, deployment.process)
        if not started or started != before or counts.release != deployment.release.digest:
            return None
        return SlotCounters(
            taken_at=time.time(),
            started_at=started["started_at"],
            requests=counts.requests,
            errors=counts.errors,
            crashes=started["starts"] - 1 + max(0, counts.worker_starts - deployment.workers),
            latency_buckets=counts.latency_buckets,
            labels=counts.labels,
            client_errors=counts.client_errors,
            probes=counts.probes,
        )

    def remove(self, slot: Slot) -> None:
        """End what is in a slot; it finishes what it is answering."""
        with self._moving_services():
            with self._changing() as plan:
                if slot in plan.slots:
                    plan = self._write(plan.removed(slot))
            self._align(plan)

    def client_url(self) -> str:
        """Envoy's address."""
        return f"http://{HOST}:{self._layout.ports().clients}"

    def slot_url(self, slot: Slot) -> str:
        """The address of a slot's service itself.

        Raises:
            Refusal: nothing is in the slot.
        """
        return f"http://{HOST}:{self._layout.ports().slots[self._deployment(slot).process].api}"

    # The plan.

    def _read(self) -> tuple[Plan, int]:
        try:
            return read_route_table(json.loads(self._layout.routes_file.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise TryLater(f"{self._layout.routes_file} is not there\n  what to do: `perch up`") from error

    def _read_plan(self) -> Plan:
        return self._read()[0]

    def _deployment(self, slot: Slot) -> Deployment:
        deployment = self._read_plan().slots.get(slot)
        if deployment is None:
            raise Refusal(f"the slot {slot}", "holds no release", way_out="deploy one")
        return deployment

    def _write(self, plan: Plan) -> Plan:
        """Replace the file, unless it says the same already."""
        before, version = self._read()
        if plan != before:
            self._replace_routes(plan, version + 1)
        return plan

    def _replace_routes(self, plan: Plan, version: int) -> None:
        """Replace the file, on a full disk by what is kept in reserve: a rollback must not need anybody to tidy up."""
        tree, reserve = route_table(plan, version), self._layout.reserve_file
        try:
            try:
                _replace(self._layout.routes_file, tree)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT} or not reserve.exists():
                    raise
                reserve.unlink(missing_ok=True)
                _replace(self._layout.routes_file, tree)
                return
        except OSError as error:
            raise TryLater(
                f"{self._layout.routes_file} cannot be written: {error.strerror}\n"
                "  what to do: free some space, and try again; traffic goes where it went"
            ) from error
        _keep_reserve(reserve)

    @contextmanager
    def _changing(self) -> Iterator[Plan]:
        """One change of the plan at a time: milliseconds, for traffic that must move waits for nothing else."""
        with self._alone(self._layout.lock_file, _CHANGE_LIMIT_S):
            yield self._read_plan()

    @contextmanager
    def _moving_services(self) -> Iterator[None]:
        """One deployment at a time: seconds, while a service ends or starts."""
        with self._alone(self._layout.deployments_lock_file, _DEPLOYMENT_LIMIT_S):
            yield

    @contextmanager
    def _alone(self, file: Path, limit_s: float) -> Iterator[None]:
        """Hold a lock, which the kernel takes from who is killed."""
        self._layout.folder.mkdir(parents=True, exist_ok=True)
        with file.open("w") as lock:
            deadline = time.monotonic() + limit_s
            while not _try_lock(lock.fileno()):
                if time.monotonic() > deadline:
                    raise TryLater("another change to the slots is under way\n  what to do: try again")
                time.sleep(0.02)
            yield

    def _align(self, plan: Plan) -> None:
        """Bring the processes in line with the plan."""
        wanted = {deployment.process for deployment in plan.slots.values()}
        for process in PROCESSES:
            if process not in wanted:
                self._stop(process)
            elif not self._supervisor.is_up(process):
                # Started by us, not after a crash: it counts its starts from one.
                self._layout.started_file(process).unlink(missing_ok=True)
                self._supervisor.start(process)

    def _stop(self, process: str) -> None:
        self._supervisor.stop(process)
        end_leftovers(self._layout, process)

    # Traffic.

    def _put_in_force(self, plan: Plan) -> None:
        """Write the plan and wait until Envoy has it."""
        self._write(plan)
        deadline = time.monotonic() + _IN_FORCE_LIMIT_S
        nudge = time.monotonic() + _NUDGE_S
        while True:
            _, version = self._read()
            with suppress(TryLater):
                if self._in_force()[1] == version:
                    return
            now = time.monotonic()
            if now > deadline:
                raise TryLater(
                    f"Envoy does not take {self._layout.routes_file}\n"
                    f"  what to do: `perch status`; look at {self._layout.log_file(ENVOY)}; try again"
                )
            if now > nudge:  # a notice of the kernel got lost, or Envoy started between two reads
                self._replace_routes(plan, version + 1)
                nudge = now + _NUDGE_S
            time.sleep(0.005)

    def _require_routable(self, before: Plan, plan: Plan) -> None:
        """Refuse to send traffic where none was and no service is ready; wait for Envoy to find it healthy too."""
        for slot, deployment in plan.slots.items():
            had = next((old for old, known in before.slots.items() if known.process == deployment.process), slot)
            if not plan.has_traffic(slot) or before.has_traffic(had):
                continue
            if not self._is_ready(deployment):
                raise Refusal(
                    f"the slot {slot}",
                    "is not ready",
                    limit="a service that takes requests",
                    way_out=f"`perch status`; look at {self._layout.log_file(deployment.process)}",
                )
            if not self._becomes_healthy(deployment.process):
                raise TryLater(
                    f"Envoy does not find the slot {slot} healthy, which answers\n"
                    f"  what to do: try again; look at {self._layout.log_file(ENVOY)}"
                )

    def _in_force(self) -> tuple[Plan, int]:
        found = read_config_dump(self._ask_envoy("/config_dump?resource=dynamic_route_configs"))
        if found is None:
            raise TryLater("Envoy has no routes yet\n  what to do: try again")
        return found

    def _becomes_healthy(self, process: str) -> bool:
        deadline = time.monotonic() + _ROUTABLE_LIMIT_S
        while process not in read_healthy_clusters(self._ask_envoy("/clusters?format=json")):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _ask_envoy(self, path: str) -> Any:
        try:
            return json.loads(fetch(f"http://{HOST}:{self._layout.ports().admin}{path}", _ASK_LIMIT_S))
        except (OSError, ValueError) as error:
            raise TryLater(
                f"Envoy does not answer: {error}\n  what to do: `perch status`; look at {self._layout.log_file(ENVOY)}"
            ) from error

    # Services.

    def _find_ready(self, plan: Plan) -> frozenset[Slot]:
        """Slots whose service takes requests, all asked at once: one that hangs does not hold up the others."""
        slots = tuple(plan.slots)
        with ThreadPoolExecutor(max_workers=len(Slot)) as pool:
            answers = pool.map(self._is_ready, (plan.slots[slot] for slot in slots))
        return frozenset(slot for slot, is_ready in zip(slots, answers, strict=True) if is_ready)

    def _is_ready(self, deployment: Deployment) -> bool:
        """Whether the service takes requests, and is that of this deployment rather than of the one before."""
        if read_starts(self._layout, deployment.process).get("digest") != deployment.release.digest:
            return False
        try:
            fetch(f"http://{HOST}:{self._layout.ports().slots[deployment.process].api}/readyz", _READY_LIMIT_S)
        except OSError:
            return False
        return True

    def _log_tail(self, process: str) -> str:
        """The last lines since the last start."""
        file = self._layout.log_file(process)
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "(no log)"
        return "\n".join(text.rpartition(START_LINE)[2].splitlines()[-_LOG_LINES:])


def _count_workers(slot: Slot) -> int:
    """Worker processes of a slot's service: as `PERCH_SERVING_WORKERS` says, else one per core; staging needs one."""
    if slot is Slot.STAGING:
        return 1
    asked = os.environ.get("PERCH_SERVING_WORKERS", "")
    return (int(asked) if asked.isdigit() else 0) or len(os.sched_getaffinity(0))


def _replace(path: os.PathLike[str], tree: Any) -> None:
    """Replace a file by a rename, and have it on the disk first: after a power cut the old one is there or the new."""
    draft = f"{os.fspath(path)}.new"
    with open(draft, "w", encoding="utf-8") as stream:  # noqa: PTH123
        json.dump(tree, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)  # noqa: PTH105


def _keep_reserve(file: Path) -> None:
    """Hold some space of the disk; where there is none left, none is held."""
    if file.exists():
        return
    try:
        with file.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, _RESERVE_BYTES)
    except OSError:
        file.unlink(missing_ok=True)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
