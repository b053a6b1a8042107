"""What every release target has to do with real services under traffic, with kills; each target's tests import these.

A module that imports the tests below gives a fixture `rig`, and thereby says which target they are held against.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.core.file_hash import hash_file
from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE, RELEASE_FOLDER, ReleaseManifest, release_name
from pipelines.errors import Refusal
from pipelines.release.artifact_store import open_store
from pipelines.release.bento import build_release
from pipelines.release.keys import signing_key
from pipelines.release.publishing import publish_release
from pipelines.release.service_code import ServiceCode, find_service_code
from pipelines.release.targets import ReleaseRef, ReleaseTarget, Routing, Slot, SlotCounters
from pipelines.services.secrets import ensure_demo_key
from pipelines.settings import Settings
from tests.integration.traffic import Exchange, Traffic

PROJECT = Path(__file__).parents[2]
READY_LIMIT_S = 90.0  # 3 s on an idle machine
# A few ms pass between Envoy's main thread, which says that a route is in force, and those that use it.
IN_FORCE_S = 0.25


@dataclass(frozen=True)
class TargetRig(ABC):
    """A target with two releases to play with.

    Attributes:
        settings: of the target.
        first: a release.
        second: the same model under another version.
        before_any_release: what a client was told before there was one.
    """

    settings: Settings
    first: ReleaseRef
    second: ReleaseRef
    before_any_release: httpx.Response

    @property
    @abstractmethod
    def target(self) -> ReleaseTarget:
        """A new one each time: it must know everything from its record."""

    @abstractmethod
    def identities(self) -> tuple[object, ...]:
        """What runs in production, so that it is seen when it is started anew."""

    @abstractmethod
    def kill_service(self, slot: Slot) -> None:
        """Kill all processes of a slot's service, and return when they are gone."""

    @abstractmethod
    def is_running(self, process: str) -> bool:
        """Whether anything of a process, e.g. `serving-staging`, runs."""

    @abstractmethod
    def put_tampered(self) -> str:
        """The address of the second release with one bit flipped, beside its signature."""

    @property
    @abstractmethod
    def mortal_writes(self) -> str:
        """Python that makes each write of the target count, by the function `mortal`."""

    @property
    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """By which another process finds the target."""

    def observe(self, slot: Slot) -> SlotCounters:
        counters = self.target.observe(slot)
        assert counters is not None
        return counters

    def traffic(self) -> Traffic:
        pixels = np.random.default_rng(1).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
        return Traffic(self.target.client_url(), ensure_demo_key(self.settings), png.getvalue())

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


def make_release(settings: Settings, stage: Path, version: str, code: ServiceCode | None = None) -> ReleaseRef:
    """A signed release of the staged model under another version, in the home's store; by default with our code."""
    manifest = ReleaseManifest.model_validate_json((stage / RELEASE_FOLDER / MANIFEST_FILE).read_text())
    manifest = manifest.model_copy(update={"version": version})
    draft = settings.home / f"draft-{version}"
    build_release(manifest, stage / RELEASE_FOLDER / MODEL_FILE, code or find_service_code(), draft)
    digest = hash_file(draft)
    file = draft.rename(draft.with_name(release_name(digest)))
    store = open_store(settings)
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


KILLED_CALLER = """
import os, signal, sys
from pipelines.release.chosen_target import open_target
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

{mortal_writes}
release = [ReleaseRef(*sys.argv[3:])] if sys.argv[3:] else []
getattr(open_target(get_settings()), sys.argv[2])(Slot.STAGING, *release)
"""


def test_target__nothing_released__clients_are_told_so(rig: TargetRig) -> None:
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


def test_route__every_weight_under_traffic__is_in_force_at_once_and_fails_no_request(settled: TargetRig) -> None:
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
    assert max(took) < 5  # what a rollback may take; here it is some 50 ms
    print(f"route: {', '.join(f'{1000 * seconds:.0f} ms' for seconds in took)}")


def test_route__mirror__the_canary_gets_copies_and_no_client_gets_its_answers(settled: TargetRig) -> None:
    before = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        settled.target.route(Routing(mirror=True))
        time.sleep(IN_FORCE_S)
        exchanges = traffic.wait_for(100)
        wait_until(lambda: settled.observe(Slot.CANARY).requests - before.requests >= 100)  # the last are under way
        settled.target.route(Routing())
    assert not traffic.failed
    assert share(exchanges, "1") == 1
    assert settled.observe(Slot.CANARY).errors == 0


def test_promote__under_traffic__exchanges_the_slots_once_and_fails_no_request(settled: TargetRig) -> None:
    target, services = settled.target, settled.identities()
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
    assert settled.identities() == services


def test_canary__killed_at_half_of_the_traffic__costs_what_was_in_flight_and_is_counted(settled: TargetRig) -> None:
    target = settled.target
    target.route(Routing(50))
    before = settled.observe(Slot.CANARY)
    with settled.traffic() as traffic:
        traffic.wait_for(50)
        settled.kill_service(Slot.CANARY)
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
    print(f"canary killed: {len(traffic.failed)} failed in flight, back after {down_s:.1f} s")


@pytest.mark.parametrize("call", ["deploy", "remove"])
def test_target__caller_killed_between_any_two_writes__the_same_call_finishes_it(settled: TargetRig, call: str) -> None:
    target = settled.target
    arguments = list(vars(settled.second).values()) if call == "deploy" else []
    caller = KILLED_CALLER.replace("{mortal_writes}", settled.mortal_writes)
    for writes in range(10):
        target.deploy(Slot.STAGING, settled.first)
        child = subprocess.run(
            [sys.executable, "-c", caller, str(writes), call, *arguments],
            env={**os.environ, **settled.environment},
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
            assert not settled.is_running("serving-staging")
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


def test_wait_ready__release_changed_after_signing__refuses_with_what_the_service_said(settled: TargetRig) -> None:
    target = settled.target
    tampered = ReleaseRef(settled.second.model, "3", settled.second.digest[::-1], settled.put_tampered())
    target.deploy(Slot.STAGING, tampered)
    with pytest.raises(Refusal, match="ended while starting"):
        target.wait_ready(Slot.STAGING, READY_LIMIT_S)
    assert Slot.STAGING not in target.state().ready
    target.remove(Slot.STAGING)


def test_target__slots_with_traffic__are_neither_replaced_nor_removed(settled: TargetRig) -> None:
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


def test_clients__body_that_is_too_large__are_told_so_through_envoy_each_time(settled: TargetRig) -> None:
    url = f"{settled.target.client_url()}/v1/predict"
    headers = {"X-API-Key": ensure_demo_key(settled.settings), "Content-Type": "image/png"}
    with httpx.Client(timeout=30, headers=headers) as client:
        codes = {client.post(url, content=bytes(11_000_000)).status_code for _ in range(15)}
    assert codes == {413}


def test_route__during_a_deployment__waits_for_nothing(settled: TargetRig) -> None:
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
    assert longest_s < 5  # what a rollback may take
    assert traffic.failed == []
    assert Slot.STAGING not in settled.target.state().slots


def flip_a_bit(file: Path, folder: Path) -> Path:
    """A copy of a release in another folder with one bit flipped, beside its signature."""
    folder.mkdir(exist_ok=True)
    shutil.copy(f"{file}.sig", folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file.name).write_bytes(content)
    return folder / file.name
