"""The release DAG in a real Airflow: who is asked, whose answer counts, and that a green task is no answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import EXIT_REFUSED, Refusal
from pipelines.registry.ledger import Ledger
from pipelines.release.airflow_approvals import AirflowApprovals, Ask
from pipelines.release.local_target import LocalTarget
from pipelines.release.targets import Slot
from pipelines.services.airflow_client import AirflowClient
from tests.integration.conftest import PROJECT, Services, explain_failure, wait_for_dag_run

DAG = "model_release"
LIMIT_S = 120.0

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value


def perch(services: Services, *words: str) -> subprocess.CompletedProcess[str]:
    """A command at a terminal that knows nothing but the home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_")}
    environment |= {"PERCH_HOME": str(services.settings.home), "PERCH_PROJECT_DIR": str(PROJECT)}
    program = str(Path(sys.executable).parent / "perch")
    return subprocess.run([program, *words], env=environment, capture_output=True, text=True, check=False)


def wait_for_ask(services: Services, run_id: str, *, tries: int = 1) -> Ask:
    """The request of a run, once it waits for an answer."""
    client = services.client()

    def waits() -> bool:
        task = client.tasks(DAG, run_id).get("request_approval")
        assert client.dag_run_state(DAG, run_id) != "failed" or tries > 1, explain_failure(client, DAG, run_id)
        return task is not None and (task.state, task.try_number) == ("awaiting_input", tries)

    until(waits, f"{run_id} asks for nothing: {client.tasks(DAG, run_id)}")
    (ask,) = [ask for ask in AirflowApprovals(client).open_asks() if ask.run_id == run_id]
    return ask


def events(services: Services) -> list[str]:
    ledger = Ledger(services.settings.ledger_url)
    try:
        return [record.event for record in ledger.entries()]
    finally:
        ledger.close()


def last_evidence(services: Services, event: str) -> dict[str, Any]:
    ledger = Ledger(services.settings.ledger_url)
    try:
        return json.loads([record for record in ledger.entries() if record.event == event][-1].evidence)
    finally:
        ledger.close()


def served(services: Services) -> str:
    stable = LocalTarget(services.settings).state().slots.get(Slot.STABLE)
    return stable.version if stable else ""


def clear(client: AirflowClient, run_id: str, task_id: str) -> None:
    body = {"dry_run": False, "dag_run_id": run_id, "task_ids": [task_id], "only_failed": False}
    status, found = client.call("POST", f"/dags/{DAG}/clearTaskInstances", json={**body, "include_downstream": True})
    assert status == 200, found


@pytest.fixture(scope="module")
def rejected(services: Services, undisturbed: str) -> str:
    """The run that the candidate called for, after the approver has rejected it by the command line."""
    client = services.client()

    def runs() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = client.call("GET", f"/dags/{DAG}/dagRuns")[1]["dag_runs"]
        return [run for run in found if run["run_type"] == "asset_triggered"]

    run_id: str = until(runs, "no candidate called for a release")[0]["dag_run_id"]
    wait_for_ask(services, run_id)
    said = perch(services, "reject", "1", "--comment", "wrong on sevens")
    assert said.returncode == 0, said.stderr
    assert wait_for_dag_run(client, DAG, run_id) == "success", explain_failure(client, DAG, run_id)
    return run_id


def test_rejection__by_the_approver__ends_the_rollout_and_releases_nothing(services: Services, rejected: str) -> None:
    tasks = services.client().tasks(DAG, rejected)
    assert tasks["roll_out"].state == "skipped"
    assert served(services) == ""
    assert not {"approved", "promoted"} & set(events(services))
    assert "wrong on sevens" in last_evidence(services, "rolled_back")["reason"]


def test_approval__only_the_recorded_answer_of_who_was_asked__releases(
    services: Services, undisturbed: str, rejected: str
) -> None:
    client = services.client()
    client.trigger(DAG, "again", {"version": 1})
    ask = wait_for_ask(services, "again")
    staged = client.result("ml_training_pipeline", undisturbed, "deploy_to_staging")
    assert staged is not None
    assert (ask.assigned, ask.evidence_sha256) == (("approver",), staged["evidence_sha256"])

    # Who was not asked may not answer, whatever else they may.
    for user in ("admin", "scientist"):
        with pytest.raises(Refusal, match="not a respondent"):
            AirflowApprovals(services.client(user)).answer(ask, approve=True, comment="")

    # The administrator marks the task as succeeded instead: there is no answer, and nothing is released.
    path = f"/dags/{DAG}/dagRuns/again/taskInstances/request_approval"
    assert client.call("PATCH", path, json={"new_state": "success"})[0] == 200
    assert wait_for_dag_run(client, DAG, "again") == "failed"
    roll_out = client.tasks(DAG, "again")["roll_out"]
    log = "\n".join(client.log_tail(DAG, "again", roll_out, 50))
    assert (roll_out.state, roll_out.try_number) == ("failed", 1)
    assert "1 approval by anybody but admin" in log
    assert "clear request_approval" in log
    assert served(services) == ""
    assert not {"approved", "promoted"} & set(events(services))

    # Asked again, the approver answers.
    clear(client, "again", "request_approval")
    wait_for_ask(services, "again", tries=2)
    assert ask.subject in perch(services, "approvals").stdout.replace("\n", " ")
    said = perch(services, "approve", "1", "--comment", "better on 8 and 9")
    assert said.returncode == 0, said.stderr
    twice = perch(services, "approve", "1")
    assert (twice.returncode, "waits for no answer" in twice.stderr) == (EXIT_REFUSED, True)
    assert wait_for_dag_run(client, DAG, "again") == "success", explain_failure(client, DAG, "again")
    assert served(services) == "1"
    approved = last_evidence(services, "approved")
    assert (approved["by"], approved["comment"]) == ("approver", "better on 8 and 9")
    assert approved["evidence_sha256"] == staged["evidence_sha256"]
    assert approved["source"] == f"airflow:{DAG}/again/request_approval"
    assert last_evidence(services, "promoted")["champion"] == "1"
