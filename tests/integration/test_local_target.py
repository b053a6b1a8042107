"""The local target with real parts: supervised services behind Envoy, under traffic, with kills."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.release.keys import create_key
from pipelines.release.local_target import LocalTarget
from pipelines.release.supervision import Supervisor
from pipelines.release.targets import Routing, Slot
from pipelines.services.programs import Ports
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings
from tests.integration.release_target_behaviour import *  # noqa: F403 - each of its tests
from tests.integration.release_target_behaviour import PROJECT, TargetRig, flip_a_bit, make_release, wait_until

pytestmark = pytest.mark.services


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


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, staged_release: Path) -> Iterator[Rig]:
    settings = Settings(project_dir=PROJECT, home=tmp_path_factory.mktemp("perch-home"))
    create_key(settings)
    first, second = (make_release(settings, staged_release, version) for version in ("1", "2"))
    stack = Stack(settings)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PERCH_SERVING_WORKERS", "1")
        try:
            stack.supervise([], Ports(mlflow=0, airflow=0, serving=any_free_port()))
            stack.open_to_clients(print)
            answer = httpx.get(f"{stack.target.client_url()}/v1/model", headers={"X-Request-ID": "a-question"})
            yield Rig(settings, first, second, answer, stack)
        finally:
            stack.down()


@pytest.fixture
def settled(rig: Rig) -> Rig:
    rig.settle()
    return rig


@pytest.mark.slow
def test_canary__its_first_process_killed__the_workers_left_over_are_ended_before_it_starts_again(settled: Rig) -> None:
    target = settled.target
    target.route(Routing(50))
    before = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        first, *workers = settled.processes(Slot.CANARY)
        assert workers
        first.kill()
        psutil.wait_procs(workers, timeout=20)
        assert not any(worker.is_running() for worker in workers)
        wait_until(lambda: Slot.CANARY in target.state().ready)
        traffic.wait_for(50)
    assert len(traffic.failed) <= traffic.clients  # a request may meet the closing of its connection
    assert settled.observe(Slot.CANARY).crashes == before.crashes + 1


def test_envoy__killed__comes_back_with_the_same_routes(settled: Rig) -> None:
    target = settled.target
    target.route(Routing(50))
    before = target.state()
    with settled.traffic() as traffic:
        traffic.wait_for(30)
        killed_at = time.monotonic()
        psutil.Process(settled.pid("envoy")).kill()
        target.route(Routing(50, mirror=True))  # waits for it
        back_s = time.monotonic() - killed_at
        traffic.wait_for(30)
        assert not [exchange for exchange in traffic.wait_for(100) if exchange.status != 200]
    assert target.state().slots == before.slots
    assert target.state().routing == Routing(50, mirror=True)
    print(f"Envoy killed: back after {back_s:.1f} s")
