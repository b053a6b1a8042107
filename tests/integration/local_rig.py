"""The local target with real parts: services under a supervisor behind Envoy, and ways to kill them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.release.keys import create_key
from pipelines.release.local_target import LocalTarget
from pipelines.release.supervision import Supervisor
from pipelines.release.targets import Slot
from pipelines.services.programs import Ports
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings
from tests.integration.release_target_behaviour import PROJECT, TargetRig, flip_a_bit, make_release

# Of services, wherever one is started.
ENVIRONMENT = {"PERCH_SERVING_WORKERS": "1", "PERCH_SERVING_FLUSH_INTERVAL_S": "1"}


@dataclass(frozen=True)
class Rig(TargetRig):
    stack: Stack

    @property
    def target(self) -> LocalTarget:
        return LocalTarget(self.settings)

    def identities(self) -> tuple[object, ...]:
        return self.pid("serving-a"), self.pid("serving-b")

    def kill_service(self, slot: Slot) -> None:
        everything = self.processes(slot)
        for process in everything:
            process.kill()
        psutil.wait_procs(everything, timeout=10)

    def is_running(self, process: str) -> bool:
        return Supervisor(self.settings.home).is_up(process)

    def put_tampered(self) -> str:
        return str(flip_a_bit(Path(self.second.address), self.settings.home / "broken"))

    @property
    def mortal_writes(self) -> str:
        return """
from pipelines.release import local_target, supervision
local_target._replace = mortal(local_target._replace)
for name in ("start", "stop"):
    setattr(supervision.Supervisor, name, mortal(getattr(supervision.Supervisor, name)))
"""

    @property
    def environment(self) -> dict[str, str]:
        return {"PERCH_HOME": str(self.settings.home)}

    def pid(self, program: str) -> int:
        pid: int = Supervisor(self.settings.home).info(program)["pid"]
        return pid

    def processes(self, slot: Slot) -> list[psutil.Process]:
        """A slot's service: what the supervisor started, then its workers."""
        url = self.target.slot_url(slot)
        ports = json.loads((self.settings.home / "release" / "ports.json").read_text())["slots"]
        (program,) = [name for name, port in ports.items() if url.endswith(f":{port['api']}")]
        first = psutil.Process(self.pid(program))
        return [first, *first.children(recursive=True)]


@contextmanager
def serve_locally(home: Path, stage: Path) -> Iterator[Rig]:
    """Two releases of a staged model, of which none is released yet, and the supervisor and Envoy."""
    settings = Settings(project_dir=PROJECT, home=home)
    create_key(settings)
    first, second = (make_release(settings, stage, version) for version in ("1", "2"))
    stack = Stack(settings)
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in ENVIRONMENT.items():
                environment.setenv(name, value)
            stack.supervise([], Ports(mlflow=0, airflow=0, serving=any_free_port()))
            stack.open_to_clients(print)
        answer = httpx.get(f"{stack.target.client_url()}/v1/model", headers={"X-Request-ID": "a-question"})
        yield Rig(settings, first, second, answer, stack)
    finally:
        stack.down()
