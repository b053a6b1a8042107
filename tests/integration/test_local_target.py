"""The local target with real parts: supervised services behind Envoy, under traffic, with kills."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.core.file_hash import hash_file
from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE, RELEASE_FOLDER, ReleaseManifest, release_name
from pipelines.errors import Refusal
from pipelines.release.artifact_store import open_store
from pipelines.release.bento import build_release
from pipelines.release.keys import create_key
from pipelines.release.local_target import LocalTarget
from pipelines.release.publishing import publish_release
from pipelines.release.service_code import find_service_code
from pipelines.release.supervision import Supervisor
from pipelines.release.targets import ReleaseRef, Routing, Slot, SlotCounters
from pipelines.services.programs import Ports
from pipelines.services.secrets import ensure_demo_key
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings
from tests.integration.traffic import Exchange, Traffic

pytestmark = pytest.mark.services

PROJECT = Path(__file__).parents[2]
READY_LIMIT_S = 90.0  # 3 s on an idle machine
# A few ms pass between Envoy's main thread, which says that a route is in force, and those that use it.
IN_FORCE_S = 0.25


@dataclass(frozen=True)
class Rig:
    settings: Settings
    stack: Stack
    first: ReleaseRef
    second: ReleaseRef
    before_any_release: httpx.Response

    @property
    def target(self) -> LocalTarget:
        """A new one each time: it must know everything from the files."""
        return LocalTarget(self.settings)

    def traffic(self) -> Traffic:
        pixels = np.random.default_rng(1).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
        return Traffic(self.target.client_url(), ensure_demo_key(self.settings), png.getvalue())

    def observe(self, slot: Slot) -> SlotCounters:
        counters = self.target.observe(slot)
        assert counters is not None
        return counters

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

    def settle(self) -> None:
        """The first release stable, the second canary without traffic, both ready."""
        target = self.target
        if target.state().slots.get(Slot.STABLE) == self.second:
            target.route(Routing(100))
            target.promote()
        if Slot.STABLE not in target.state().slots:
            target.deploy(Slot.STABLE, self.first)
        else:
            target.route(Routing())
        target.deploy(Slot.CANARY, self.second)
        target.wait_ready(Slot.STABLE, READY_LIMIT_S)
        target.wait_ready(Slot.CANARY, READY_LIMIT_S)
        target.route(Routing(1))  # once Envoy finds it healthy as well
        target.route(Routing())


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
            yield Rig(settings, stack, first, second, answer)
        finally:
            stack.down()


@pytest.fixture
def settled(rig: Rig) -> Rig:
    rig.settle()
    return rig


def make_release(settings: Settings, stage: Path, version: str) -> ReleaseRef:
    """A signed release of the staged model under another version, in the home's store."""
    manifest = ReleaseManifest.model_validate_json((stage / RELEASE_FOLDER / MANIFEST_FILE).read_text())
    manifest = manifest.model_copy(update={"version": version})
    draft = settings.home / f"draft-{version}"
    build_release(manifest, stage / RELEASE_FOLDER / MODEL_FILE, find_service_code(), draft)
    digest = hash_file(draft)
    file = draft.rename(draft.with_name(release_name(digest)))
    store = open_store(settings)
    from pipelines.release.keys import signing_key

    publish_release(store, file, digest, signing_key(settings)[0])
    return ReleaseRef(manifest.model, version, digest, store.address(file.name))


def share(exchanges: list[Exchange], version: str) -> float:
    return sum(exchange.version == version for exchange in exchanges) / len(exchanges)


def wait_until(condition: Callable[[], bool], limit_s: float = READY_LIMIT_S) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s
        time.sleep(0.02)
    return time.monotonic() - began


def test_local_target__nothing_released__clients_are_told_so(rig: Rig) -> None:
    answer = rig.before_any_release
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.headers["x-request-id"] == "a-question"
    assert answer.json() == {
        "type": "urn:perch:not-ready",
        "title": "The service is starting or stopping",
        "status": 503,
        "detail": "no model has been released",
        "request_id": "a-question",
    }


def test_route__every_weight_under_traffic__is_in_force_at_once_and_fails_no_request(settled: Rig) -> None:
    target, took = settled.target, []
    with settled.traffic() as traffic:
        traffic.wait_for(20)
        for percent, low, high in ((10, 0.01, 0.3), (50, 0.3, 0.7), (100, 1, 1), (0, 0, 0)):
            began = time.monotonic()
            target.route(Routing(percent))
            took.append(time.monotonic() - began)
            assert target.state().routing == Routing(percent)
            time.sleep(IN_FORCE_S)
            exchanges = traffic.wait_for(150)
            assert low <= share(exchanges, "2") <= high, percent
    assert not traffic.failed
    assert max(took) < 1
    print(f"route: {', '.join(f'{1000 * seconds:.0f} ms' for seconds in took)}")


def test_route__mirror__the_canary_gets_copies_and_no_client_gets_its_answers(settled: Rig) -> None:
    before = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        settled.target.route(Routing(mirror=True))
        time.sleep(IN_FORCE_S)
        exchanges = traffic.wait_for(100)
        copies = settled.observe(Slot.CANARY).requests - before.requests
        settled.target.route(Routing())
    assert not traffic.failed
    assert share(exchanges, "1") == 1
    assert copies > 80  # the last ones may be under way
    assert settled.observe(Slot.CANARY).errors == 0


def test_promote__under_traffic__exchanges_the_slots_once_and_fails_no_request(settled: Rig) -> None:
    target, pids = settled.target, (settled.pid("serving-a"), settled.pid("serving-b"))
    with settled.traffic() as traffic:
        target.route(Routing(100))
        traffic.wait_for(20)
        for _ in range(2):  # the second changes nothing
            target.promote()
            time.sleep(IN_FORCE_S)
            assert share(traffic.wait_for(30), "2") == 1
        state = target.state()
        assert (state.slots[Slot.STABLE], state.slots[Slot.CANARY]) == (settled.second, settled.first)
        # Back to what was stable before: it is still warm.
        target.route(Routing(100))
        target.promote()
        time.sleep(IN_FORCE_S)
        assert share(traffic.wait_for(30), "1") == 1
    assert not traffic.failed
    assert target.state().slots[Slot.STABLE] == settled.first
    assert (settled.pid("serving-a"), settled.pid("serving-b")) == pids


def test_canary__killed_at_half_of_the_traffic__costs_what_was_in_flight_and_is_counted(settled: Rig) -> None:
    target = settled.target
    target.route(Routing(50))
    before = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        everything = settled.processes(Slot.CANARY)
        for process in everything:
            process.kill()
        psutil.wait_procs(everything, timeout=10)
        gone_at = time.monotonic()
        after = traffic.wait_for(100)
        down_s = wait_until(lambda: Slot.CANARY in target.state().ready)
        traffic.wait_for(50)
    # The kernel closes a killed process's connections last: until then requests are still in flight to it.
    assert [exchange for exchange in traffic.failed if exchange.sent_at > gone_at] == []
    assert len(traffic.failed) <= traffic.clients
    assert share(after, "1") > 0.9  # stable answered for it
    counters = settled.observe(Slot.CANARY)
    assert counters.crashes == before.crashes + 1
    assert counters.started_at > before.started_at
    print(f"canary killed: {len(traffic.failed)} failed in flight, back after {down_s:.1f} s")


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


KILLED_CALLER = """
import os, signal, sys
from pipelines.release import local_target, supervision
from pipelines.release.targets import ReleaseRef, Slot
from pipelines.settings import get_settings

left = int(sys.argv[1])

def mortal(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

local_target._replace = mortal(local_target._replace)
for name in ("start", "stop"):
    setattr(supervision.Supervisor, name, mortal(getattr(supervision.Supervisor, name)))
release = [ReleaseRef(*sys.argv[3:])] if sys.argv[3:] else []
getattr(local_target.LocalTarget(get_settings()), sys.argv[2])(Slot.STAGING, *release)
"""


@pytest.mark.parametrize("call", ["deploy", "remove"])
def test_local_target__caller_killed_between_any_two_writes__the_same_call_finishes_it(settled: Rig, call: str) -> None:
    target = settled.target
    arguments = list(vars(settled.second).values()) if call == "deploy" else []
    for writes in range(10):
        target.deploy(Slot.STAGING, settled.first)
        child = subprocess.run(
            [sys.executable, "-c", KILLED_CALLER, str(writes), call, *arguments],
            env={**os.environ, "PERCH_HOME": str(settled.settings.home)},
            cwd=PROJECT,
        )
        between = target.state()
        assert between.slots.get(Slot.STAGING) in {settled.first, settled.second, None}
        assert (between.slots[Slot.STABLE], between.routing) == (settled.first, Routing())
        if call == "deploy":
            target.deploy(Slot.STAGING, settled.second)
            assert target.state().slots[Slot.STAGING] == settled.second
        else:
            target.remove(Slot.STAGING)
            assert Slot.STAGING not in target.state().slots
            assert not Supervisor(settled.settings.home).is_up("serving-staging")
        if child.returncode == 0:
            break
    else:
        pytest.fail("the caller was killed each time")
    assert writes > 1
    if call == "deploy":
        target.wait_ready(Slot.STAGING, READY_LIMIT_S)
        served = httpx.get(f"{target.slot_url(Slot.STAGING)}/readyz")
        assert served.headers["x-model-version"] == "2"
    target.remove(Slot.STAGING)


def test_wait_ready__release_changed_after_signing__refuses_with_what_the_service_said(settled: Rig) -> None:
    target = settled.target
    broken = settled.settings.home / "broken"
    broken.mkdir()
    file = Path(shutil.copy(settled.second.address, broken))
    shutil.copy(f"{settled.second.address}.sig", broken)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    tampered = ReleaseRef(settled.second.model, "3", settled.second.digest[::-1], str(file))
    target.deploy(Slot.STAGING, tampered)
    with pytest.raises(Refusal, match="ended while starting"):
        target.wait_ready(Slot.STAGING, READY_LIMIT_S)
    assert Slot.STAGING not in target.state().ready
    target.remove(Slot.STAGING)


def test_local_target__slots_with_traffic__are_neither_replaced_nor_removed(settled: Rig) -> None:
    target = settled.target
    with pytest.raises(Refusal, match="has traffic"):
        target.deploy(Slot.STABLE, settled.second)
    target.route(Routing(10))
    for slot in (Slot.STABLE, Slot.CANARY):
        with pytest.raises(Refusal, match="has traffic"):
            target.remove(slot)
    target.route(Routing())
    target.remove(Slot.CANARY)
    with pytest.raises(Refusal, match="holds no release"):
        target.route(Routing(10))
    target.deploy(Slot.CANARY, settled.second)
    with pytest.raises(Refusal, match="not ready"):
        target.route(Routing(10))
    assert target.state().routing == Routing()


def test_clients__body_that_is_too_large__are_told_so_through_envoy_each_time(settled: Rig) -> None:
    url = f"{settled.target.client_url()}/v1/predict"
    headers = {"X-API-Key": ensure_demo_key(settled.settings), "Content-Type": "image/png"}
    with httpx.Client(timeout=30, headers=headers) as client:
        codes = {client.post(url, content=bytes(11_000_000)).status_code for _ in range(40)}
    assert codes == {413}


def test_route__during_a_deployment__waits_for_nothing(settled: Rig) -> None:
    settled.target.deploy(Slot.CANARY, settled.second)
    settled.target.wait_ready(Slot.CANARY, 60)
    longest_s, moves = 0.0, 0
    with settled.traffic() as traffic:
        traffic.wait_for(10)
        deploying = threading.Thread(target=settled.target.deploy, args=(Slot.STAGING, settled.second))
        removing = threading.Thread(target=settled.target.remove, args=(Slot.STAGING,))
        for work in (deploying, removing):
            work.start()
            while work.is_alive() or moves % 2:
                began = time.monotonic()
                settled.target.route(Routing(canary_percent=50 * (1 - moves % 2)))
                longest_s, moves = max(longest_s, time.monotonic() - began), moves + 1
            work.join()
    assert moves >= 4
    assert longest_s < 2
    assert traffic.failed == []
    assert Slot.STAGING not in settled.target.state().slots
