"""Faults of a rollout under traffic: a locked database, two releases at once, a canary that answers nobody."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pipelines.errors import PerchError
from pipelines.registry.ledger import Ledger
from pipelines.release.engine import ROLL_BACK, ReleaseEngine, ReleaseRequest, look
from pipelines.release.gates import Gates
from pipelines.release.rollback import roll_back
from pipelines.release.rollout_state import from_document
from pipelines.release.steps import ROLLED_BACK, SHADOW, Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.services.faulty_releases import Fault, faulty_code
from tests.integration.local_rig import Rig
from tests.integration.release_target_behaviour import make_release
from tests.integration.test_rollout import (  # noqa: F401 - a fixture
    CANARY_30,
    EVIDENCE,
    PARAMS,
    Scene,
    open_scene,
    scene,
)

pytestmark = pytest.mark.services

BLOCKS = Fault("blocks", "holds its event loop for 0.6 s at each image", "latency", code="time.sleep(0.6)")
_LOCKED_S = 8.0  # longer than the watchdog waits for the database, and than a rollback may take


def test_watchdog__canary_killed_while_the_database_is_locked__traffic_moves_first_and_the_record_follows(
    scene: Scene,  # noqa: F811 - the fixture
) -> None:
    with scene.rig.traffic() as traffic:
        state = scene.run_to(CANARY_30)
        assert state.step == CANARY_30, state.reason
        writer = sqlite3.connect(scene.rig.settings.home / "ledger.db", isolation_level=None)
        writer.execute("BEGIN EXCLUSIVE")
        locked_at = time.monotonic()
        for process in scene.rig.processes(Slot.CANARY):
            process.kill()
        moved_s = scene.wait_for_rollback(10)
        time.sleep(max(0.0, _LOCKED_S - (time.monotonic() - locked_at)))
        (recorded,) = writer.execute("SELECT count(*) FROM perch_ledger WHERE event = 'rolled_back'").fetchone()
        writer.execute("ROLLBACK")
        writer.close()
        deadline = time.monotonic() + 60
        while True:
            row = scene.world.rollouts.read(scene.rollout.rollout_id)
            assert row is not None
            final = from_document(row.document)
            if final.is_finished:
                break
            assert time.monotonic() < deadline, final.step
            time.sleep(0.2)
        traffic.wait_for(50)
    assert moved_s < 5
    assert recorded == 0
    assert (final.step, final.reason.partition(":")[0]) == (ROLLED_BACK, "crashes")
    assert len(scene.alerts) == 1  # people hear of it once, not at each look
    assert len(traffic.failed) <= traffic.clients  # in flight to what was killed
    actual = scene.rig.target.state()
    assert (actual.routing, actual.slots[Slot.STABLE]) == (Routing(), scene.rig.first)
    assert "champion" not in scene.aliases.aliases or scene.aliases.aliases["champion"] == "1"
    assert [record.event for record in Ledger(scene.rig.settings.ledger_url).entries()][-1] == "rolled_back"
    print(f"canary killed, database locked: weight 0 after {moved_s:.1f} s")


def test_begin__two_releases_of_a_model_at_once__one_begins_and_the_other_is_refused(
    scene: Scene,  # noqa: F811 - the fixture
) -> None:
    roll_back(scene.world, scene.rig.second.model, reason="to begin anew", by="on-call")
    deadline = time.monotonic() + 60
    while not scene.engine("ender").advance(scene.rollout.rollout_id).is_finished:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    third = ReleaseRef(scene.rig.second.model, "3", "3" * 64, scene.rig.second.address)
    fourth = ReleaseRef(third.model, "4", "4" * 64, third.address)
    gate, begun, refused = threading.Barrier(2), [], []

    def begin(release: ReleaseRef) -> None:
        request = ReleaseRequest(release, scene.rig.first, "scheduler", EVIDENCE)
        gate.wait()
        try:
            begun.append(ReleaseEngine(scene.world, f"engine-{release}").begin(request, Plan(PARAMS)))
        except PerchError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(release,)) for release in (third, fourth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(begun), len(refused)) == (1, 1), refused
    is_open = [row.rollout_id for row in scene.world.rollouts.list_rollouts(third.model) if row.is_open]
    assert is_open == [begun[0].rollout_id]
    assert scene.rig.target.state().routing == Routing()


@pytest.mark.slow  # the order of questions that it rests on has a unit test
def test_rollout__canary_blocks_its_event_loop__loses_its_copies_within_five_seconds_of_the_breach(
    settled: Rig,
    staged_release: Path,
) -> None:
    with faulty_code(BLOCKS) as code:
        blocking = make_release(settled.settings, staged_release, "3", code)
    with open_scene(settled, blocking) as scene, settled.traffic() as traffic:  # noqa: F811
        state = scene.run_to(SHADOW)
        assert state.step == SHADOW, state.reason
        mover = threading.Thread(target=lambda: scene.run_to(ROLLED_BACK), daemon=True)
        mover.start()
        world, target = replace(scene.world, judge=Gates()), settled.target
        canary = settled.target.slot_url(Slot.CANARY)
        sound_at = ready_at = began = time.monotonic()
        # By Envoy's routes alone: the whole state waits for the canary that hangs.
        while target._in_force()[0].routing != Routing():
            if look(world, state)[1].verdict != ROLL_BACK:
                sound_at = time.monotonic()
            with suppress(httpx.TransportError):
                httpx.get(f"{canary}/readyz", timeout=0.3)
                ready_at = time.monotonic()
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        moved_at = time.monotonic()
        mover.join(60)
        traffic.wait_for(50)
    row = scene.world.rollouts.read(scene.rollout.rollout_id)
    assert row is not None
    final = from_document(row.document)
    # Whichever sees it first: too many slow answers, or none to the question whether it takes requests.
    assert (final.step, final.reason.partition(":")[0] in {"latency", "crashes"}) == (ROLLED_BACK, True), final.reason
    assert moved_at - sound_at < 5
    assert moved_at - ready_at < 10
    assert traffic.failed == []
    print(
        f"canary blocks its event loop ({final.reason.partition(':')[0]}): no copies {moved_at - sound_at:.1f} s after "
        f"the last look that found no breach, {moved_at - ready_at:.1f} s after it last answered"
    )
