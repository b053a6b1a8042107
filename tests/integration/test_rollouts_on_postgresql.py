"""Rollouts on a real PostgreSQL: the same guards as on SQLite, also with several engines at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipelines.core.rollout_rows import StaleRolloutError
from pipelines.errors import Refusal, TryLater
from pipelines.registry.rollout_table import RolloutTable
from pipelines.release.rollback import roll_back
from pipelines.release.steps import PROMOTED, ROLLED_BACK
from tests.unit.release.simulated_release import MODEL, QUICK, Simulation

pytestmark = pytest.mark.services


@pytest.fixture
def simulation(postgresql_url: str, tmp_path: Path) -> Simulation:
    return Simulation(tmp_path, url=postgresql_url, params=QUICK.model_copy(update={"min_step_s": 1.0}))


def test_rollout__whole__is_promoted_and_taken_back(simulation: Simulation) -> None:
    rollout = simulation.begin()
    simulation.answer()
    assert simulation.run(rollout.rollout_id).step == PROMOTED
    simulation.check_promoted(2, previous=1)
    assert roll_back(simulation.world(), MODEL, reason="by hand", by="on-call").is_recorded
    simulation.check_back_on(1)


def test_rollout__four_engines_at_once__take_each_step_once(simulation: Simulation) -> None:
    rollout = simulation.begin()
    simulation.answer()
    refusals: list[TryLater] = []
    deadline = time.monotonic() + 60

    def go_on() -> None:
        engine = simulation.engine()
        while time.monotonic() < deadline:
            try:
                if engine.advance(rollout.rollout_id).is_finished:
                    return
            except TryLater as error:
                refusals.append(error)

    threads = [threading.Thread(target=go_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        simulation.tick(0.3, 300)
        threads[0].join(0.02)
    state = simulation.state(rollout.rollout_id)
    assert state.step == PROMOTED, state.reason
    assert [passage.step for passage in state.passages] == [
        "pending", "shadow", "canary@10", "canary@50", "canary@100", "promoted",
    ]  # fmt: skip
    assert simulation.events().count("traffic v2") == 4
    simulation.check_promoted(2, previous=1)
    assert refusals, "they met"


def test_rollout__rollback_while_an_engine_moves_it__wins(simulation: Simulation) -> None:
    rollout = simulation.begin()
    simulation.answer()
    engine = simulation.engine()
    for _ in range(3):
        simulation.tick()
        engine.advance(rollout.rollout_id)
    simulation.rollouts.take_lease(rollout.rollout_id, "busy", lease_s=5, now=simulation.clock())
    assert roll_back(simulation.world(), MODEL, reason="by hand", by="on-call").is_recorded
    assert simulation.state(rollout.rollout_id).step == ROLLED_BACK
    simulation.check_back_on(1)


def test_table__two_rollouts_of_a_model__are_refused_by_the_database(simulation: Simulation) -> None:
    simulation.begin()
    with pytest.raises(Refusal, match="is under way already"):
        simulation.begin(3)


def test_table__row_written_since_it_was_read__is_not_overwritten(simulation: Simulation) -> None:
    rollout = simulation.begin()
    row = simulation.rollouts.read(rollout.rollout_id)
    assert row is not None
    RolloutTable(simulation.url).save(row, row.document, is_open=True)
    with pytest.raises(StaleRolloutError):
        simulation.rollouts.save(row, row.document, is_open=True)
