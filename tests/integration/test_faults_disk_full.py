"""What moves traffic, and what is written down of it, on a disk that is full."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.core import patience
from pipelines.errors import TryLater
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from pipelines.release.local_layout import LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES
from pipelines.release.local_plan import Plan as Slots
from pipelines.release.local_target import LocalTarget
from pipelines.release.rollout_state import RolloutState, from_document
from pipelines.release.steps import ROLLED_BACK, Phase, Step
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.release.watchdog import Watchdog
from pipelines.release.world import World
from pipelines.settings import Settings
from tests.conftest import MountSmallDisk
from tests.integration.local_rig import ENVIRONMENT, Rig, serve_locally
from tests.integration.test_rollout import CANARY_30, PARAMS, open_scene
from tests.unit.release.simulated_release import Clock, Simulation

PROJECT = Path(__file__).parents[2]
_PORTS = LocalPorts(1, 2, {process: SlotPorts(3, 4) for process in PROCESSES})


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    file = folder / "filling"
    with file.open("ab", buffering=0) as stream:
        for size in (65_536, 4096, 1):
            try:
                while stream.write(bytes(size)):
                    pass
            except OSError:
                continue
    return file


def test_routes__disk_is_full__are_replaced_from_the_reserve_and_it_is_kept_anew(
    mount_small_disk: MountSmallDisk,
) -> None:
    small_disk = mount_small_disk(1024)
    target = LocalTarget(Settings(project_dir=PROJECT, home=small_disk))
    target.lay_out(_PORTS)
    reserve = small_disk / "release" / "reserve"
    assert reserve.stat().st_size >= 64 * 1024
    release = ReleaseRef("digits", "1", "0" * 64, "/nowhere")
    plan = Slots().deployed(Slot.STABLE, release, 1).deployed(Slot.CANARY, release, 1)
    target._write(plan.routed(Routing(50)))
    filling = fill(small_disk)
    target._write(plan.routed(Routing()))
    assert target._read_plan().routing == Routing()
    assert not reserve.exists()

    # Full once more, and the reserve is spent: it says so, and leaves the old routes whole.
    fill(small_disk)
    with pytest.raises(TryLater, match="free some space"):
        target._write(plan.routed(Routing(10)))
    assert target._read_plan().routing == Routing()

    filling.unlink()
    target._write(plan.routed(Routing(10)))
    assert target._read_plan().routing == Routing(10)
    assert reserve.stat().st_size >= 64 * 1024


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is waited for like a database that is away, which is for a minute."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_ledger_and_rollouts__disk_fills_at_any_write__keep_a_row_whole_or_not_at_all(
    mount_small_disk: MountSmallDisk,
) -> None:
    """With 0 KiB left, 4, and so on until there is room enough: SQLite's files grow by pages."""
    disk = mount_small_disk(2048)
    url = f"sqlite:///{disk / 'ledger.db'}"
    ledger, rollouts = Ledger(url), RolloutTable(url)
    ledger.append("registered", model="m", version="1", evidence={"n": 0}, key="row 0")
    row = rollouts.create("m:2", "m", {"n": 0}, now=0.0)
    refusals: list[str] = []
    for left_kib in range(0, 160, 4):
        filling = fill(disk)
        with filling.open("r+b") as stream:
            stream.truncate(filling.stat().st_size - 1024 * left_kib)
        rows, known = [], None
        try:
            ledger.append("staged", model="m", version="1", evidence={"n": "x" * 9_000}, key=f"row at {left_kib}")
            rows.append(f"row at {left_kib}")
            known = rollouts.save(row, {"n": "y" * 9_000, "at": left_kib}, is_open=True)
        except TryLater as error:
            refusals.append(str(error))
        filling.unlink()
        keys = [record.key for record in ledger.entries()]
        assert (keys[-1] == f"row at {left_kib}") is bool(rows)
        assert ledger.verify() == []
        found = rollouts.read("m:2")
        assert found is not None
        assert found == (known or row)
        row = found
    assert 3 <= len(refusals) < 40, "it was never full, or never had room"
    assert all(re.search("disk|unable to open", refusal) for refusal in refusals), refusals
    with closing(sqlite3.connect(disk / "ledger.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("breached", [True, False], ids=["breached", "healthy"])
def test_rollout__the_databases_disk_is_full__traffic_is_taken_back_first_and_written_down_when_there_is_room(
    mount_small_disk: MountSmallDisk, breached: bool
) -> None:
    disk = mount_small_disk(2048)
    simulation, monotonic, alerts = Simulation(disk), Clock(100.0), []
    world = replace(simulation.world(), rollouts=simulation.glance)
    watchdog = Watchdog(world, lambda title, text: alerts.append(text), monotonic)
    rollout_id = simulation.begin().rollout_id
    simulation.answer()
    engine = simulation.engine()

    def pass_second() -> None:
        simulation.tick()
        monotonic.now += 1

    while simulation.state(rollout_id).step != Step(Phase.CANARY, 10):
        pass_second()
        engine.advance(rollout_id)
        watchdog.check()
    filling = fill(disk)
    with pytest.raises(TryLater):
        engine.advance(rollout_id)
    simulation.target.behave(2, error_rate=0.1 if breached else 0.0)
    seconds = 0
    while simulation.target.state().routing != Routing():
        pass_second()
        watchdog.check()
        seconds += 1
        assert seconds < simulation.params.abandoned_after_s + 3
    assert seconds <= 2 if breached else seconds > 5
    watchdog.check()
    assert len(alerts) == 1
    filling.unlink()
    pass_second()
    watchdog.check()
    final = simulation.state(rollout_id)
    assert (final.step, final.is_finished) == (ROLLED_BACK, True)
    simulation.check_back_on(1)
    assert len(alerts) == 1


@pytest.fixture
def cramped(mount_small_disk: MountSmallDisk, staged_release: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Releases, Envoy and services, with all that they keep on a small disk of their own."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with serve_locally(mount_small_disk(256 * 1024), staged_release) as rig:
        rig.settle()
        yield rig


@pytest.mark.services
@pytest.mark.slow
def test_rollout__disk_of_everything_fills_at_30_percent_and_the_canary_dies__no_request_fails_but_its_own(
    cramped: Rig,
) -> None:
    params = PARAMS.model_copy(update={"abandoned_after_s": 60})  # nobody moves it after 30 %
    with open_scene(cramped, cramped.second, params) as scene, cramped.traffic() as traffic:
        state = scene.run_to(CANARY_30)
        assert state.step == CANARY_30, state.reason
        time.sleep(2)  # a watchdog that cannot read of the step any more takes its traffic for somebody's mistake
        filling = fill(cramped.settings.home)
        filled_at = time.monotonic()
        while len(traffic.since(filled_at)) < 300:
            time.sleep(0.1)
        assert traffic.failed == []
        killed_at = time.monotonic()
        cramped.kill_service(Slot.CANARY)
        scene.wait_for_rollback(15)
        moved_s = time.monotonic() - killed_at
        traffic.wait_for(100)
        filling.unlink()
        deadline = time.monotonic() + 60
        while not (final := _read(scene.world, scene.rollout.rollout_id)).is_finished:
            assert time.monotonic() < deadline, final.step
            time.sleep(0.2)
        traffic.wait_for(100)
    assert moved_s < 5
    assert final.step == ROLLED_BACK
    assert len(scene.alerts) == 1
    in_flight = [one for one in traffic.failed if one.ended_at >= killed_at and one.sent_at <= killed_at + 1]
    assert traffic.failed == in_flight
    assert len(in_flight) <= traffic.clients
    ledger = Ledger(cramped.settings.ledger_url)
    assert ledger.verify() == []
    assert ledger.entries()[-1].event == "rolled_back"
    print(f"disk full, canary killed: weight 0 after {moved_s:.1f} s; {len(in_flight)} requests were under way to it")


def _read(world: World, rollout_id: str) -> RolloutState:
    row = world.rollouts.read(rollout_id)
    assert row is not None
    return from_document(row.document)
