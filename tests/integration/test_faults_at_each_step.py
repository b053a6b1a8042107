"""Each part of a release killed at each step of a rollout, under traffic: what it ends as, and what clients saw.

Engine and watchdog are processes of their own here; services, Envoy, MLflow, database and gates are the real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from pipelines.params import ModelReleaseParams
from pipelines.registry.aliases import RegistryAliases, find_alias_contradictions
from pipelines.registry.connection import with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.rollout_table import RolloutTable
from pipelines.release.engine import ReleaseEngine, ReleaseRequest
from pipelines.release.rollout_state import RolloutState, from_document
from pipelines.release.steps import PROMOTED, ROLLED_BACK, Plan
from pipelines.release.targets import Routing, Slot
from pipelines.settings import Settings
from tests.integration.local_rig import Rig
from tests.integration.registered_aliases import read_aliases
from tests.integration.release_target_behaviour import PROJECT
from tests.integration.rollout_process import build_world
from tests.integration.test_registry_over_mlflow import Server
from tests.integration.test_rollout import EVIDENCE
from tests.integration.traffic import Exchange, Traffic

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(400)]

PARAMS = ModelReleaseParams(
    canary_percents=[10, 50, 100],
    min_step_s=3,
    max_step_s=120,
    max_error_rate=0.05,
    min_agreement=0.8,
    abandoned_after_s=60,
    lease_s=3,
)
DOOR = "before promoted"  # the intent is written, and nothing is done yet
STEPS = ("shadow", "canary@10", "canary@50", "canary@100", DOOR)
LIMIT_S = 150.0
BACK_LIMIT_S = 15.0  # Envoy is back after 1 s, a service after 5 s


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("mlflow-home")
    (home / "mlflow").mkdir()
    shutil.copyfile(empty_mlflow_database, home / "mlflow" / "mlflow.db")
    server = Server(home)
    server.start()
    yield server
    server.kill()


@dataclass
class Stage:
    """A rollout of the second release over the first, and the processes that move and watch it."""

    rig: Rig
    mlflow: Server
    folder: Path
    settings: Settings
    rollout: RolloutState
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: list[tuple[str, float]] = field(default_factory=list)

    def start(self, role: str) -> None:
        """Start an engine or a watchdog."""
        command = [sys.executable, "-m", "tests.integration.rollout_process", role, str(self.folder / "scene.json")]
        with (self.folder / f"{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(command, cwd=PROJECT, env=os.environ, stdout=log, stderr=log)

    def now(self) -> RolloutState:
        table = RolloutTable(self.settings.ledger_url)
        try:
            row = table.read(self.rollout.rollout_id)
        finally:
            table.close()
        assert row is not None
        return from_document(row.document)

    def wait_for(self, step: str) -> RolloutState:
        """Until the rollout is in a step, or over."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            state = self.now()
            at_door = step == DOOR and (self.folder / "held").exists()
            if at_door or state.is_finished or (state.settled and state.step.name == step):
                return state
            assert time.monotonic() < deadline, (step, state.step, state.reading, self.logs())
            time.sleep(0.05)

    def wait_for_end(self) -> RolloutState:
        deadline = time.monotonic() + LIMIT_S
        while not (state := self.now()).is_finished:
            assert time.monotonic() < deadline, (state.step, state.reading, self.logs())
            time.sleep(0.1)
        return state

    def logs(self) -> str:
        return "\n".join(file.read_text()[-1500:] for file in self.folder.glob("*.log"))

    def strike(self, fault: str, step: str) -> None:
        """Do it, and start again what nobody else starts again."""
        self.killed.append((step, time.monotonic()))
        if fault in self.processes:
            self.processes[fault].kill()
            self.processes[fault].wait()
            self.start(fault)
        elif fault == "Envoy":
            psutil.Process(self.rig.pid("envoy")).kill()
        elif fault == "MLflow":
            self.mlflow.kill()  # gone already after the first step
        elif fault.startswith("clock"):
            (self.folder / "clock").write_text(fault.split()[1])
        else:
            self.rig.kill_service(Slot(fault.split()[0]))

    def mend(self, fault: str) -> None:
        """Start again what a person would."""
        if fault == "MLflow" and not self.mlflow.answers():
            self.mlflow.start()
        if fault.startswith("clock") and not fault.endswith("for good"):
            (self.folder / "clock").unlink(missing_ok=True)

    def check_legal(self, final: RolloutState) -> None:
        """Weights, processes, aliases and ledger are those of a release, or of none."""
        target, model = self.rig.target, final.release.model
        released = final.step == PROMOTED
        serves = self.rig.second if released else self.rig.first
        assert final.step in (PROMOTED, ROLLED_BACK)
        assert final.settled
        deadline = time.monotonic() + 60
        while True:
            actual, processes = target.state(), self.rig.stack.status()
            if set(actual.slots) == actual.ready and set(processes.values()) == {"RUNNING"}:
                break
            assert time.monotonic() < deadline, (actual, processes)
            time.sleep(0.2)
        assert (actual.slots[Slot.STABLE], actual.routing) == (serves, Routing())
        expected = {"champion": "2", "previous": "1"} if released else {"champion": "1"}
        assert read_aliases(self.settings, model) == expected
        assert find_alias_contradictions(self.settings, "candidate") == []
        ledger = Ledger(self.settings.ledger_url)
        try:
            assert ledger.verify() == []
            records = ledger.entries(model)
        finally:
            ledger.close()
        assert records[-1].event == ("promoted" if released else "rolled_back")
        steps = [json.loads(record.evidence)["step"] for record in records if record.event == "traffic"]
        assert len(steps) == len(set(steps)), "each step once"
        if released:
            assert steps == list(STEPS[:-1])


@pytest.fixture
def stage(settled: Rig, mlflow: Server, tmp_path: Path) -> Iterator[Stage]:
    if not mlflow.answers():
        mlflow.start()
    for left in settled.settings.home.glob("ledger.db*"):  # what was killed leaves a write-ahead log behind
        left.unlink()
    settled.target.remove(Slot.CANARY)
    settings = settled.settings.model_copy(update={"mlflow_uri": mlflow.uri})
    model = settled.first.model
    lay_out_registry(settings, model)
    told = {
        "project": str(PROJECT),
        "home": str(settings.home),
        "mlflow": mlflow.uri,
        "evidence": EVIDENCE,
        "answered_at": datetime.now(UTC).isoformat(),
        "rollout": "",
    }
    world = build_world(told, lambda target: target, patient=True)
    ledger = Ledger(settings.ledger_url)
    ledger.append("promoted", model=model, version="1", evidence={"champion": "1", "previous": None}, key="promoted:1")
    ledger.close()
    request = ReleaseRequest(settled.second, settled.first, "scheduler", EVIDENCE)
    rollout = ReleaseEngine(world, "beginner").begin(request, Plan(PARAMS))
    told |= {"rollout": rollout.rollout_id, "answered_at": datetime.now(UTC).isoformat()}
    (tmp_path / "scene.json").write_text(json.dumps(told))
    (tmp_path / "hold").touch()
    stage = Stage(settled, mlflow, tmp_path, settings, rollout)
    for role in ("engine", "watchdog"):
        stage.start(role)
    try:
        yield stage
    finally:
        for process in stage.processes.values():
            process.kill()
            process.wait()
        stage.mend("MLflow")


def lay_out_registry(settings: Settings, model: str) -> None:
    """Two versions, the first of which is the champion."""

    def register(client: object) -> None:
        if not client.search_registered_models(f"name = '{model}'"):  # type: ignore[attr-defined]
            client.create_registered_model(model)  # type: ignore[attr-defined]
            for _ in range(2):
                client.create_model_version(model, "s3://nowhere/model")  # type: ignore[attr-defined]

    with_mlflow(settings, lambda mlflow: register(mlflow.client))
    RegistryAliases(settings).move(model, {"champion": "1", "previous": None})


def failures(traffic: Traffic, stage: Stage, outage_s: float) -> tuple[list[Exchange], list[Exchange]]:
    """Failed requests: those that were under way, or came, within so long after a kill; and all others."""
    near = [
        exchange
        for exchange in traffic.failed
        if any(exchange.ended_at >= at and exchange.sent_at <= at + outage_s for _, at in stage.killed)
    ]
    return near, [exchange for exchange in traffic.failed if exchange not in near]


def run(stage: Stage, fault: str, steps: tuple[str, ...], outage_s: float) -> RolloutState:
    """A whole rollout with the fault at these steps; prints its row of the table."""
    outcomes: list[str] = []
    with stage.rig.traffic() as traffic:
        for step in STEPS:
            state = stage.wait_for(step)
            if state.is_finished:
                break
            if step in steps:
                stage.strike(fault, step)
                outcomes.append(step)
                time.sleep(1)
            if step == DOOR:
                (stage.folder / "hold").unlink()
                (stage.folder / "held").unlink(missing_ok=True)
            if fault != "MLflow" or step == DOOR:  # away for all of the rollout, and back when it is needed
                stage.mend(fault)
        (stage.folder / "hold").unlink(missing_ok=True)
        final = stage.wait_for_end()
        ended = time.monotonic()
        traffic.wait_for(30, limit_s=60)
    in_flight, others = failures(traffic, stage, outage_s)
    total = len(traffic.since(0.0))
    print(
        f"\n| {fault} | {', '.join(outcomes)} | {final.step.name}: {final.reason or 'as without'} | "
        f"{len(in_flight)} + {len(others)} of {total:,} | {ended - stage.killed[0][1]:.0f} s |"
    )
    assert others == []
    stage.check_legal(final)
    return final


@pytest.mark.parametrize("fault", ["engine", "watchdog", "MLflow"])
def test_rollout__its_servant_killed_at_each_step__ends_as_without_and_no_request_fails(
    stage: Stage, fault: str
) -> None:
    final = run(stage, fault, STEPS, 0.0)
    assert final.step == PROMOTED, final.reason
    assert len(stage.killed) == len(STEPS)


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_rollout__clock_jumps_at_each_step__ends_legally_and_no_request_fails(stage: Stage, jump_s: int) -> None:
    """To and fro: the clock is wrong for a second in each step, until the engine takes a jump ahead for its silence."""
    run(stage, f"clock {jump_s:+d}", STEPS, 0.0)


def test_rollout__envoy_killed_at_each_step__ends_legally_and_only_what_met_its_absence_fails(stage: Stage) -> None:
    run(stage, "Envoy", STEPS, 3.0)


@pytest.mark.parametrize("step", STEPS)
def test_rollout__canary_killed_at_a_step__is_taken_back_and_only_what_was_in_flight_fails(
    stage: Stage, step: str
) -> None:
    # At the door its gates have spoken for the last time, and it is about to be the stable one.
    run(stage, "canary service", (step,), BACK_LIMIT_S if step == DOOR else 1.0)


@pytest.mark.parametrize("step", STEPS)
def test_rollout__stable_killed_at_a_step__ends_legally_and_only_what_met_its_absence_fails(
    stage: Stage, step: str
) -> None:
    run(stage, "stable service", (step,), BACK_LIMIT_S)
