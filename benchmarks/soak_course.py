"""The course of a soak: servers are started, loaded, hurt and ended; what they did is written down."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.server_processes import ServerProcess, free_port
from benchmarks.serving_release import ServedRelease
from benchmarks.soak_checks import Check, Incident, Timeline
from benchmarks.soak_clients import Clients, Journal, SlowClients

PROJECT = Path(__file__).parents[1]
WORKERS = 2
CAPACITY_CLIENTS = 32
CAPACITY_STEP = 0.95
MAX_TURNED_AWAY = 0.001  # of the requests, at a rate that counts as within the capacity
MAX_BODY_BYTES = 2 * 2**20
KILL_AT, SHUTDOWN_AT = 0.25, 0.5  # of the time
MAX_RETURN_S = 10.0  # from the kill of a worker to its successor's readiness
MAX_DRAIN_S = 30.0  # from SIGTERM to the end of the server
SERVER_NICENESS = 5  # clients on the same cores that come late come in bursts, which nobody asked for
_WARM_S = 5.0
_AFTERMATH_S = 5.0  # how long an incident may be seen in the latencies
_READY = b'"logger":"serving.service","message":"ready'
_WORKER = "_bentoml_impl.worker.service"


@dataclass(frozen=True)
class Sample:
    """Memory at a moment.

    Attributes:
        at_s: on the soak's clock.
        server: its name.
        mib: proportional set size of all its processes.
    """

    at_s: float
    server: str
    mib: float


@dataclass(frozen=True)
class Course:
    """What happened.

    Attributes:
        capacity_per_s: requests of the mix that the server takes from clients who do not wait for each other.
        rate_per_s: at which requests came.
        timeline: when what was done.
        samples: of memory.
        checks: what the processes themselves promised.
    """

    capacity_per_s: float
    rate_per_s: float
    timeline: Timeline
    samples: list[Sample]
    checks: list[Check]

    def stretches(self) -> dict[str, list[Sample]]:
        """Samples between incidents, where the same processes ran."""
        timeline = self.timeline
        bounds = {
            "server A after the kill": ("A", timeline.kill.end_s, timeline.shutdown.start_s),
            "server B": ("B", timeline.shutdown.end_s, timeline.end_s),
        }
        return {
            name: [sample for sample in self.samples if sample.server == server and start <= sample.at_s <= end]
            for name, (server, start, end) in bounds.items()
        }


@dataclass
class _Server:
    process: ServerProcess
    address: str
    log: Path


@dataclass
class Soak:
    """One soak; `run` once.

    Args:
        release: to serve.
        folder: for logs and evidence.
        minutes: of load, without the measurement of the capacity.
        load: of the capacity.
        say: takes a line about what happens.
    """

    release: ServedRelease
    folder: Path
    minutes: float
    load: float
    say: Callable[[str], None]
    _servers: dict[str, _Server] = field(default_factory=dict)
    _addresses: list[str] = field(default_factory=list)
    _samples: list[Sample] = field(default_factory=list)
    _checks: list[Check] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder)
        key = self.release.api_key
        keys = {"good": key, "slow": self.release.slow_key, "wrong": key[:-1] + ("A" if key[-1] != "A" else "B")}
        self.clients = Clients(self._addresses, keys, self.journal, max_body_bytes=MAX_BODY_BYTES)

    async def run(self) -> Course:
        """The whole course; the servers are ended whatever happens."""
        ended = threading.Event()
        try:
            await asyncio.to_thread(self._start, "A")
            await asyncio.to_thread(self._start, "B")  # on cores of its own elsewhere; here before the load begins
            threading.Thread(target=self._sample, args=(ended,), daemon=True).start()
            async with self.clients.open():
                capacity_per_s = await self._measure_capacity()
                rate_per_s = self.load * capacity_per_s
                self.say(f"capacity {capacity_per_s:.0f} requests/s; soaking at {rate_per_s:.0f}")
                timeline = await self._load_and_disturb(rate_per_s)
            await self._end("B")
        finally:
            ended.set()
            self.journal.close()
            for server in self._servers.values():
                await asyncio.to_thread(server.process.stop)
        return Course(capacity_per_s, rate_per_s, timeline, self._samples, self._checks)

    async def _measure_capacity(self) -> float:
        """The highest rate, in steps, at which hardly any request is turned away though no client waits for another."""
        self.clients.phase = "capacity"
        seconds = max(5.0, min(20.0, 3 * self.minutes))
        await self.clients.closed_loop(CAPACITY_CLIENTS, _WARM_S)
        rate_per_s = await self.clients.closed_loop(CAPACITY_CLIENTS, seconds)
        self.say(f"{CAPACITY_CLIENTS} clients who wait for their answers reach {rate_per_s:.0f} requests/s")
        while True:
            rate_per_s *= CAPACITY_STEP
            done, turned_away = self.journal.done, self.journal.turned_away
            await self.clients.open_loop(rate_per_s, self.journal.now() + seconds)
            share = (self.journal.turned_away - turned_away) / (self.journal.done - done)
            self.say(f"{rate_per_s:.0f} requests/s from clients who do not: {share:.2%} turned away")
            if share <= MAX_TURNED_AWAY:
                return rate_per_s

    async def _load_and_disturb(self, rate_per_s: float) -> Timeline:
        self.clients.phase = "server A"
        seconds, began_s = 60 * self.minutes, self.journal.now()
        end_s = began_s + seconds
        slow = SlowClients(self.clients, self.release.api_key, self.journal)
        load = asyncio.gather(self.clients.open_loop(rate_per_s, end_s), slow.run(end_s))
        try:
            await asyncio.sleep(KILL_AT * seconds)
            kill = await self._kill_worker()
            await asyncio.sleep(max(0.0, began_s + SHUTDOWN_AT * seconds - self.journal.now()))
            shutdown = await self._replace()
            await load
        finally:
            load.cancel()
        return Timeline(began_s, end_s, kill, shutdown)

    async def _kill_worker(self) -> Incident:
        server = self._servers["A"]
        workers = workers_of(server.process)
        position = server.log.stat().st_size
        at, killed_s = datetime.now(UTC), self.journal.now()
        workers[0].send_signal(signal.SIGKILL)
        self.say(f"{killed_s:6.0f} s  SIGKILL of worker {workers[0].pid}")
        ready = await asyncio.to_thread(_wait_for_ready, server.log, position, 1, 3 * MAX_RETURN_S)
        back_s = self.journal.now() - killed_s
        count = len(workers_of(server.process))
        found = f"{back_s:.1f} s, {count} workers" if ready else "it did not come back"
        held = ready and back_s <= MAX_RETURN_S and count == len(workers)
        self._checks.append(Check(f"a killed worker is back within {MAX_RETURN_S:g} s", found, held))
        return Incident("SIGKILL", at, killed_s, killed_s + back_s + _AFTERMATH_S)

    async def _replace(self) -> Incident:
        at, started_s = datetime.now(UTC), self.journal.now()
        self.clients.phase = "server B"
        self.say(f"{self.journal.now():6.0f} s  SIGTERM of server A")
        await self._end("A")
        return Incident("SIGTERM", at, started_s, self.journal.now() + _AFTERMATH_S)

    async def _end(self, name: str) -> None:
        process = self._servers[name].process
        family, began_s = process.processes(), self.journal.now()
        process.terminate()
        code = await asyncio.to_thread(process.wait, 2 * MAX_DRAIN_S)
        took_s = self.journal.now() - began_s
        left = sum(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
        held = code in (0, -signal.SIGTERM) and took_s <= MAX_DRAIN_S and not left
        found = f"{took_s:.1f} s, exit code {code}, {left} processes left"
        self._checks.append(Check(f"server {name} ends within {MAX_DRAIN_S:g} s of SIGTERM", found, held))

    def _start(self, name: str) -> None:
        port, log = free_port(), self.folder / f"server-{name}.log"
        environment = self.release.environment(port, workers=WORKERS, max_body_bytes=MAX_BODY_BYTES)
        process = ServerProcess(self.release.command(port), environment, log, niceness=SERVER_NICENESS, folder=PROJECT)
        server = self._servers[name] = _Server(process, f"http://127.0.0.1:{port}", log)
        took_s, _ = process.wait_for_answer(urllib.request.Request(f"{server.address}/readyz"))
        if not _wait_for_ready(log, 0, WORKERS, 60.0):
            raise RuntimeError(f"not all workers of server {name} are ready:\n{process.log_tail()}")
        self.say(f"{self.journal.now():6.0f} s  server {name} answers after {took_s:.1f} s")
        self._addresses.append(server.address)

    def _sample(self, ended: threading.Event) -> None:
        while not ended.wait(max(0.5, min(5.0, self.minutes / 2))):
            for name, server in list(self._servers.items()):
                if (mib := server.process.memory_mib()) > 0:
                    self._samples.append(Sample(self.journal.now(), name, mib))


def workers_of(server: ServerProcess) -> list[psutil.Process]:
    """The living worker processes of a server."""
    found = []
    for process in server.processes():
        try:
            if _WORKER in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _wait_for_ready(log: Path, position: int, workers: int, limit_s: float) -> bool:
    """Wait until so many workers have said in the log, from a position on, that they are ready."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with log.open("rb") as stream:
            stream.seek(position)
            if sum(_READY in line for line in stream) >= workers:
                return True
        time.sleep(0.1)
    return False
