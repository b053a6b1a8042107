"""Airflow's scheduler and triggerer killed at each step of a rollout, under traffic: it ends as without."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import pytest

from pipelines.registry.aliases import find_alias_contradictions
from pipelines.registry.ledger import Ledger
from pipelines.release.local_target import LocalTarget
from pipelines.release.rollout_state import RolloutState
from pipelines.release.steps import PROMOTED, ROLLED_BACK
from pipelines.release.supervision import Supervisor
from pipelines.release.targets import Routing, Slot, TargetState
from pipelines.services.rollouts import find_rollout
from pipelines.services.secrets import ensure_demo_key
from tests.integration.conftest import FAST, PROJECT, Services, explain_failure, wait_for_dag_run
from tests.integration.registered_aliases import read_aliases
from tests.integration.test_release_in_airflow import DAG, perch, served, until, wait_for_ask
from tests.integration.traffic import Traffic

TRAINING = "ml_training_pipeline"
# A few hundred requests must do; how soon a rollout counts as abandoned is that of params.yaml.
QUICK = {
    "model_release.min_step_s": 1,
    "model_release.max_step_s": 400,
    "model_release.max_error_rate": 0.05,
    "model_release.min_agreement": 0.8,
    "model_release.lease_s": 5,
}
STEPS = ("shadow", "canary@10", "canary@50", "canary@100")
ORDER = (*STEPS, PROMOTED.name)
PROGRAMS = ("airflow-scheduler", "airflow-triggerer")

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def versions(services: Services, undisturbed: str) -> tuple[str, str]:
    """Two versions that passed in staging; one of them is the champion."""
    client = services.client()

    def runs() -> set[str]:
        found = client.call("GET", f"/dags/{DAG}/dagRuns")[1]["dag_runs"]
        return {run["dag_run_id"] for run in found if run["run_type"] == "asset_triggered"}

    asked = until(runs, "no candidate called for a release")
    if not served(services):
        (run_id,) = asked
        if client.dag_run_state(DAG, run_id) == "success":  # another module's test rejected it
            run_id = "before"
            client.trigger(DAG, run_id, {"version": 1})
        wait_for_ask(services, run_id)
        said = perch(services, "approve", "1")
        assert said.returncode == 0, said.stderr
        assert wait_for_dag_run(client, DAG, run_id) == "success", explain_failure(client, DAG, run_id)
    client.trigger(TRAINING, "second", {**FAST, "epochs": 7})
    assert wait_for_dag_run(client, TRAINING, "second") == "success", explain_failure(client, TRAINING, "second")
    staged = client.result(TRAINING, "second", "deploy_to_staging")
    assert staged is not None
    (run_id,) = until(lambda: runs() - asked, "the second candidate called for no release")
    wait_for_ask(services, run_id)
    said = perch(services, "reject", staged["version"], "--comment", "not yet")
    assert said.returncode == 0, said.stderr
    assert wait_for_dag_run(client, DAG, run_id) == "success", explain_failure(client, DAG, run_id)
    return served(services), staged["version"]


def engine_calls(services: Services) -> set[int]:
    """Ids of the processes that move a rollout of this home at present."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_call = process.cmdline()[-4:-2] == ["releases", "advance"]
            if is_call and process.environ().get("PERCH_HOME") == str(services.settings.home):
                found.add(process.pid)
    return found


@dataclass
class Kill:
    """One of the kills.

    Attributes:
        step: of the rollout when it came.
        settled: whether the step's effects were there.
        silent_s: seconds until the engine was called again.
    """

    step: str
    settled: bool
    silent_s: float = float("nan")


@dataclass
class Airflow:
    """The processes of a home's Airflow."""

    services: Services
    kills: list[Kill] = field(default_factory=list)

    def kill(self, state: RolloutState) -> None:
        """Kill it at once, and wait until somebody calls the engine again."""
        supervisor = Supervisor(self.services.settings.home)
        victims = [psutil.Process(supervisor.info(program)["pid"]) for program in PROGRAMS]
        before = engine_calls(self.services)
        at = time.monotonic()
        for victim in victims:
            victim.kill()
        kill = Kill(state.step.name, state.settled)
        self.kills.append(kill)
        missing = f"nobody calls the engine any more in {state.step.name}"
        until(lambda: engine_calls(self.services) - before, missing, limit_s=180)
        kill.silent_s = time.monotonic() - at
        until(self.is_up, f"not back: {self.services.stack.status()}")

    def is_up(self) -> bool:
        status = self.services.stack.status()
        return all(status.get(program) == "RUNNING" for program in PROGRAMS)

    def strays(self) -> list[psutil.Process]:
        """What a killed scheduler left: workers that wait for their next task, for ever."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_ours = process.cwd() == str(self.services.stack.working_folder.resolve())
                if is_ours and process.ppid() == 1 and "LocalExecutor" in " ".join(process.cmdline()):
                    found.append(process)
        return found


def wait_for_step(services: Services, step: str, every_s: float) -> RolloutState:
    """Until the rollout is in this step, or a later one."""
    reached = (*ORDER[ORDER.index(step) :], ROLLED_BACK.name)

    def now() -> RolloutState | None:
        state = find_rollout(services.settings)
        return state if state.step.name in reached else None

    state: RolloutState = until(now, f"the rollout does not reach {step}", limit_s=180, every_s=every_s)
    assert state.step != ROLLED_BACK, state.reason
    return state


def ready_target(services: Services) -> TargetState | None:
    state = LocalTarget(services.settings).state()
    return state if state.ready == set(state.slots) else None


@pytest.fixture(autouse=True)
def everything_runs(services: Services) -> Iterator[None]:
    yield
    until(lambda: set(services.stack.status().values()) == {"RUNNING"}, f"{services.stack.status()}")


def test_rollout__scheduler_and_triggerer_killed_at_each_step__is_promoted_and_no_request_fails(
    services: Services, versions: tuple[str, str]
) -> None:
    client, settings, champion = services.client(), services.settings, served(services)
    (version,) = {*versions} - {champion}
    begun = perch(services, "releases", "begin", version, "--by", "admin", "--conf", json.dumps(QUICK))
    assert begun.returncode == 0, begun.stderr
    run_id = "killed-scheduler"
    client.trigger(DAG, run_id, {"version": int(version)})
    wait_for_ask(services, run_id)
    airflow = Airflow(services)
    image = (PROJECT / "docs" / "seven.png").read_bytes()
    url = services.stack.target.client_url()
    with Traffic(url, ensure_demo_key(settings), image, clients=3, pause_s=0.05) as traffic:
        said = perch(services, "approve", version)
        assert said.returncode == 0, said.stderr
        for step in STEPS:
            wait_for_step(services, step, 0.1)
            until(lambda: engine_calls(services), f"nobody calls the engine in {step}", every_s=0.02)
            airflow.kill(find_rollout(settings))
        # Between two writes: the intent is there, and ledger, traffic and aliases follow.
        airflow.kill(wait_for_step(services, PROMOTED.name, 0.01))
        ended = wait_for_dag_run(client, DAG, run_id)
        traffic.wait_for(20)
    state = find_rollout(settings)
    print(f"\n{ended}, {state.step.name} {state.reason}")
    print("\n".join(f"  {each}" for each in airflow.kills))
    print(f"  {len(traffic.failed)} of {len(traffic.since(0.0)):,} requests failed; {len(airflow.strays())} strays")
    assert (ended, state.step, state.settled) == ("success", PROMOTED, True), state.reason
    assert {kill.step for kill in airflow.kills} == {*ORDER}
    assert traffic.failed == []

    target = until(lambda: ready_target(services), "a slot's service is not ready")
    assert (target.slots[Slot.STABLE].version, target.routing) == (version, Routing())
    aliases = read_aliases(settings, state.release.model)
    assert (aliases["champion"], aliases["previous"]) == (version, champion)
    assert find_alias_contradictions(settings, "candidate") == []
    ledger = Ledger(settings.ledger_url)
    try:
        assert ledger.verify() == []
        rows = [(row.event, json.loads(row.evidence)) for row in ledger.entries(state.release.model)]
    finally:
        ledger.close()
    own = [(event, row.get("step")) for event, row in rows if row.get("rollout") == state.rollout_id]
    assert own == [("approved", None), *(("traffic", step) for step in STEPS), ("promoted", PROMOTED.name)]
    assert [passage.step for passage in state.passages[1:]] == [*ORDER], "each step once"
