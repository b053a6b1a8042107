"""Starts, shows and ends the services on one machine, under supervisord; nothing of theirs survives `down`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from pipelines.core.free_ports import any_free_port, is_free
from pipelines.core.locking import hold
from pipelines.core.results import write_json
from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.registry.database import Database
from pipelines.registry.migration import upgrade
from pipelines.registry.mlflow_database import ensure_database
from pipelines.release.local_layout import LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES
from pipelines.release.local_target import LocalTarget
from pipelines.release.supervision import supervisor_proxy, supervisor_socket
from pipelines.services.programs import (
    SERVICES_OF,
    Ports,
    Program,
    airflow_environment,
    airflow_programs,
    common_environment,
    envoy_program,
    mlflow_program,
    slot_programs,
    tool,
    watchdog_program,
)
from pipelines.services.secrets import ensure_demo_key, ensure_passwords
from pipelines.settings import Settings

PREFERRED_PORTS = Ports(mlflow=5001, airflow=8080, serving=3000)
_START_LIMIT_S = 240.0
_STOP_LIMIT_S = 30.0
_PORTS = "ports.json"

Report = Callable[[str], None]


class Stack:
    """The supervised services of one PERCH_HOME."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.require_home() / "services"
        self.working_folder = self.folder / "working"
        self.socket = supervisor_socket(settings.home)
        self.target = LocalTarget(settings)
        self.has_started = False  # whether `up` had anything to start

    def up(self, report: Report, ports: Ports | None = None) -> Ports:
        """Start what is not running and wait until it answers; who comes second waits for the first and joins him.

        Args:
            report: takes one line per step.
            ports: where to listen; by default as `choose_ports` says.

        Raises:
            Refusal: a preferred port is taken and was asked for by environment.
            PerchError: a program ended or did not answer in time; the message holds its log's last lines.
            TryLater: another process has been starting them all the time.
        """
        with self._starting_alone(report):
            if self._is_up():
                self.target.resume()
                return self.ports()
            return self._start_all(report, ports)

    def _start_all(self, report: Report, ports: Ports | None) -> Ports:
        self.has_started = True
        self.down()
        _refuse_missing_tools()
        _upgrade_own_database(self.settings)
        ports = ports or choose_ports()
        programs = [
            mlflow_program(self.settings, ports),
            *airflow_programs(self.settings, ports),
            watchdog_program(self.settings, ports),
        ]
        self.supervise(programs, ports)
        self.open_to_clients(report)
        mlflow, api, *rest = programs
        # Whole or not at all: a kill among MLflow's migrations leaves a database that never opens again.
        ensure_database(self.settings.home / "mlflow" / "mlflow.db")
        self._start(mlflow, report)
        self._migrate_airflow(ports, report)
        self._start(api, report)
        for program in (mlflow, api):
            self._wait_healthy(program)
        # Only now: a scheduler that starts before its API answers fails the tasks it resumes.
        for program in rest:
            self._start(program, report)
        for program in rest:
            self._wait_healthy(program)
        return ports

    def supervise(self, programs: list[Program], ports: Ports) -> None:
        """Start the supervisor over these programs, Envoy and the slots' services; none of them runs yet."""
        self.working_folder.mkdir(parents=True, exist_ok=True)
        ensure_passwords(self.settings)
        ensure_demo_key(self.settings)
        write_json(self.folder / _PORTS, asdict(ports))
        self.target.lay_out(_choose_local_ports(self.settings.home, ports.serving))
        serving = [
            envoy_program(self.settings, ports),
            *slot_programs(self.settings, common_environment(self.settings, ports)),
        ]
        config = self.folder / "supervisord.conf"
        config.touch(mode=0o600)
        config.write_text(render_config(self, [*programs, *serving]), encoding="utf-8")
        subprocess.run(
            [tool("supervisord"), "--configuration", str(config)], check=True, cwd=self.folder, env=self._environment()
        )

    def open_to_clients(self, report: Report, *programs: Program) -> None:
        """Start Envoy and what the slots hold, before the rest: that takes half a minute.

        Args:
            report: takes one line per step.
            programs: of those that are supervised, to be started at the same time.
        """
        started = (envoy_program(self.settings, self.ports()), *programs)
        for program in started:
            self._start(program, report)
        self.target.resume()
        for program in started:
            self._wait_healthy(program)

    def down(self) -> bool:
        """End every service and whatever they left; True when there was something to end."""
        supervisor = self._supervisor()
        found = supervisor is not None
        if supervisor is not None:
            pid = supervisor.supervisor.getPID()
            supervisor.supervisor.shutdown()
            _wait_until(lambda: not psutil.pid_exists(pid), _STOP_LIMIT_S)
        # A supervisor that was killed leaves its children behind.
        strays = list(self._strays())
        for process in strays:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(strays, timeout=10)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.socket.unlink(missing_ok=True)
        return found or bool(strays)

    def _is_up(self) -> bool:
        """Whether every program runs; a slot's service that does not is the release engine's business."""
        supervisor = self._supervisor()
        return supervisor is not None and all(
            info["statename"] == "RUNNING"
            for info in supervisor.supervisor.getAllProcessInfo()
            if info["name"] not in PROCESSES
        )

    @contextmanager
    def _starting_alone(self, report: Report) -> Iterator[None]:
        """Keep two starts apart: the second would take what the first has not finished for broken, and end it."""
        lock = self.folder / "starting.lock"
        with ExitStack() as held:
            try:
                held.enter_context(hold(lock, wait_s=0))
            except TryLater:
                report("waiting for another start of the same services")
                held.enter_context(hold(lock, wait_s=_START_LIMIT_S))
            yield

    def status(self) -> dict[str, str]:
        """Program name to supervisor's state (RUNNING, STARTING, BACKOFF, …); empty when nothing is up.

        What was never started, and a slot's service that was ended on purpose, is left out.
        """
        supervisor = self._supervisor()
        if supervisor is None:
            return {}
        return {
            info["name"]: info["statename"]
            for info in supervisor.supervisor.getAllProcessInfo()
            if info["start"] and not (info["name"] in PROCESSES and info["statename"] == "STOPPED")
        }

    @property
    def has_slots_alone(self) -> bool:
        """Whether the services of the slots run without the others: `perch slots`, and no `perch up` of this home."""
        return not (self.folder / _PORTS).is_file()

    def ports(self) -> Ports:
        """The ports chosen by the last `up`."""
        return Ports(**json.loads((self.folder / _PORTS).read_text(encoding="utf-8")))

    def log_tail(self, program: str, lines: int = 15) -> str:
        """The last lines of a program's log."""
        file = self.folder / f"{program}.log"
        return "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) if file.is_file() else "(no log)"

    def memory_bytes(self) -> int:
        """Proportional set size of everything the supervisor started, in bytes: pages shared by forks count once."""
        supervisor = self._supervisor()
        if supervisor is None:
            return 0
        root = psutil.Process(supervisor.supervisor.getPID())
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    def _start(self, program: Program, report: Report) -> None:
        report(f"starting {program.name}")
        self._require_supervisor().supervisor.startProcess(program.name, False)

    def _wait_healthy(self, program: Program) -> None:
        first_pid = 0

        def ready() -> bool:
            nonlocal first_pid
            process = self._require_supervisor().supervisor.getProcessInfo(program.name)
            first_pid = first_pid or process["pid"]
            # The supervisor starts again what ends, so a new process id means that the first one ended.
            if process["statename"] not in {"STARTING", "RUNNING"} or process["pid"] != first_pid:
                raise PerchError(
                    f"{program.name} ended while starting; the end of its log:\n{self.log_tail(program.name)}\n"
                    f"  what to do: mend that, then `perch up` again"
                )
            return process["statename"] == "RUNNING" and (not program.health_url or _answers(program.health_url))

        if not _wait_until(ready, _START_LIMIT_S):
            raise TryLater(
                f"{program.name}: not ready after {_START_LIMIT_S:.0f} s\n"
                f"{self.log_tail(program.name)}\n"
                f"  what to do: look at {self.folder}/{program.name}.log, then `perch up` again"
            )

    def _migrate_airflow(self, ports: Ports, report: Report) -> None:
        environment = {**os.environ, **airflow_environment(self.settings, ports)}
        log = self.folder / "airflow-migrate.log"
        report("preparing Airflow's database")
        with log.open("w", encoding="utf-8") as output:
            code = subprocess.run(
                [tool("airflow"), "db", "migrate"],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            raise PerchError(f"airflow db migrate ended with {code}:\n{self.log_tail('airflow-migrate')}")

    def is_answering(self) -> bool:
        """Whether the supervisor takes orders."""
        return self._supervisor() is not None

    def _supervisor(self) -> Any | None:
        if not self.socket.exists():
            return None
        proxy = supervisor_proxy(self.socket)
        try:
            proxy.supervisor.getPID()
        except (OSError, xmlrpc.client.Error):
            return None
        return proxy

    def _require_supervisor(self) -> Any:
        supervisor = self._supervisor()
        if supervisor is None:
            raise PerchError(f"supervisord is gone\n  what to do: look at {self.folder}/supervisord.log")
        return supervisor

    def _environment(self) -> dict[str, str]:
        home = str(self.settings.home)
        return {**os.environ, "PERCH_HOME": home, SERVICES_OF: home}

    def _strays(self) -> Iterator[psutil.Process]:
        """What of ours still runs: by its environment, or, where a server has written its title over it, its folder."""
        own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        for process in psutil.process_iter():
            try:
                if process.pid not in own and (
                    process.environ().get(SERVICES_OF) == str(self.settings.home)
                    or process.cwd() == str(self.working_folder.resolve())
                ):
                    yield process
            except psutil.Error:
                continue


def render_config(stack: Stack, programs: list[Program]) -> str:
    """Supervisord's configuration; `%` would be expanded, so it is doubled."""
    lines = [
        "[supervisord]",
        f"logfile={stack.folder / 'supervisord.log'}",
        f"pidfile={stack.folder / 'supervisord.pid'}",
        "nodaemon=false",
        "[unix_http_server]",
        f"file={stack.socket}",
        "chmod=0700",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for program in programs:
        environment = ",".join(f"{key}={_quote(value)}" for key, value in sorted(program.environment.items()))
        options = {
            "command": shlex.join(program.command),
            "environment": environment,
            "directory": str(stack.working_folder),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": "2",
            "startretries": "5",
            # Servers here start children of their own; all of them must go.
            "stopasgroup": "true",
            "killasgroup": "true",
            "stopwaitsecs": "15",
            "redirect_stderr": "true",
            "stdout_logfile": str(stack.folder / f"{program.name}.log"),
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "2",
        } | program.supervision
        lines += [f"[program:{program.name}]", *(f"{name}={value}" for name, value in options.items())]
    return "\n".join(line.replace("%", "%%") for line in lines) + "\n"


def _quote(value: str) -> str:
    """A value as supervisord's own lexer reads it, which knows two kinds of quotes and no escapes."""
    return f"'{value}'" if '"' in value else f'"{value}"'


def choose_ports() -> Ports:
    """Ports asked for by environment, which must be free, else the usual ones, else any free ones."""
    chosen: dict[str, int] = {}
    for name, preferred in asdict(PREFERRED_PORTS).items():
        variable = f"PERCH_{name.upper()}_PORT"
        asked = os.environ.get(variable)  # empty is unset, as for every other variable
        if not asked:
            chosen[name] = preferred if is_free(preferred) else any_free_port()
        elif not (asked.isascii() and asked.isdigit() and 0 < int(asked) < 65536):
            raise Refusal(
                variable,
                f"{asked!r} is no port",
                limit="a number from 1 to 65535",
                way_out="correct it, or unset it to have one chosen",
            )
        elif not is_free(int(asked)):
            raise Refusal(
                f"port {asked} for {name}",
                "is taken by another program",
                limit="a free TCP port",
                way_out=f"free it, or set {variable} to another, or unset it to have one chosen",
            )
        else:
            chosen[name] = int(asked)
    return Ports(**chosen)


def _choose_local_ports(home: Path, clients: int) -> LocalPorts:
    """Ports for Envoy's own pages and the slots' services; clients need not know them.

    They stay free until a service is started hours later only outside the range from which the kernel takes ports for
    outgoing connections (32768 and up on Linux).  Where the search begins depends on the home, so that two homes seldom
    look at the same ports.
    """
    first = 20_000 + int(sha256(str(home).encode()).hexdigest(), 16) % 11_000
    free = (port for port in range(first, 32_768) if port != clients and is_free(port))
    return LocalPorts(
        clients=clients,
        admin=next(free),
        slots={process: SlotPorts(api=next(free), metrics=next(free)) for process in PROCESSES},
    )


def _upgrade_own_database(settings: Settings) -> None:
    """Bring the ledger's file to this Perch; a server's database waits for `perch db upgrade`."""
    database = Database(settings.ledger_url)
    try:
        if database.file is not None:
            upgrade(database)
    finally:
        database.close()


def _refuse_missing_tools() -> None:
    for name in ("supervisord", "airflow", "mlflow", "envoy"):
        if shutil.which(name, path=str(Path(sys.executable).parent)) is None:
            raise Refusal(
                f"the program {name}", "is not in this environment", way_out="`make env` installs the lock file"
            )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - always http on the loopback
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
