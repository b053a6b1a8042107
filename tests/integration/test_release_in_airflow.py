"""The release DAG in a real Airflow: who is asked, whose answer counts, and that a green task is no answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import EXIT_REFUSED, Refusal
from pipelines.registry.ledger import Ledger
from pipelines.release.airflow_approvals import AirflowApprovals, Ask
from pipelines.release.local_target import LocalTarget
from pipelines.release.targets import Slot
from pipelines.services.airflow_client import AirflowClient
from pipelines.services.rollouts import find_rollout
from tests.integration.conftest import PROJECT, Services, explain_failure, wait_for_dag_run

DAG = "model_release"
LIMIT_S = 120.0

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


def until(found: Callable[[], Any], what: str, *, limit_s: float = LIMIT_S, every_s: float = 0.2) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(every_s)
    return value


def perch(services: Services, *words: str) -> subprocess.CompletedProcess[str]:
    """A command at a terminal that knows nothing but the home and the promotion policy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_")}
    environment |= {"PERCH_HOME": str(services.settings.home), "PERCH_PROJECT_DIR": str(PROJECT)}
    environment |= {"PERCH_PROMOTION_POLICY": str(services.policy_file)}
    program = str(Path(sys.executable).parent / "perch")
    return subprocess.run([program, *words], env=environment, capture_output=True, text=True, check=False)


def wait_for_ask(services: Services, run_id: str, *, tries: int = 1, task_id: str = "request_approval") -> Ask:
    """The request of a run, once it waits for an answer."""
    client = services.client()

    def waits() -> bool:
        task = client.tasks(DAG, run_id).get(task_id)
        assert client.dag_run_state(DAG, run_id) != "failed" or tries > 1, explain_failure(client, DAG, run_id)
        # An answer within seconds of its question may have cost a try.
        return task is not None and task.state == "awaiting_input" and task.try_number >= tries

    until(waits, f"{run_id} asks for nothing: {client.tasks(DAG, run_id)}")
    (ask,) = [ask for ask in AirflowApprovals(client).open_asks() if ask.run_id == run_id]
    return ask


def let_go(services: Services, run_id: str, task_id: str = "request_approval", map_index: int = -1) -> None:
    """Wait until Airflow has noticed the end of the process that asked: an answer before that may cost a try."""
    tries = services.client().tasks(DAG, run_id)[task_id].try_number
    key = f"task_id='{task_id}', run_id='{run_id}', try_number={tries}, map_index={map_index})"
    noticed = f"executor event with state success for task instance TaskInstanceKey(dag_id='{DAG}', {key}"
    log = services.stack.folder / "airflow-scheduler.log"
    until(lambda: noticed in log.read_text(errors="replace"), f"Airflow does not say: {noticed}")


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


def note(client: AirflowClient, run_id: str, task_id: str = "request_approval", mapped: str = "") -> str:
    found = client.call("GET", f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/{task_id}{mapped}")[1]
    return str(found.get("note") or "")


def reject(services: Services, run_id: str, user: str = "approver") -> None:
    """End a run without a release."""
    said = perch(services, "reject", "1", "--comment", "enough", "--as", user)
    assert said.returncode == 0, said.stderr
    assert wait_for_dag_run(services.client(), DAG, run_id) == "success"


def test_approval__denied_by_the_policy__is_asked_for_again_and_a_rejection_is_final(
    services: Services, rejected: str
) -> None:
    approver = services.client("approver")
    approver.trigger(DAG, "own", {"version": 1})  # who asks for a release may not approve it
    ask = wait_for_ask(services, "own")
    said = perch(services, "approve", "1")
    assert (said.returncode, "rule requester" in said.stderr) == (EXIT_REFUSED, True), said.stderr
    assert [ask.run_id for ask in AirflowApprovals(approver).open_asks()] == ["own"], "nothing was recorded"

    # Airflow's page does not know the policy.
    let_go(services, "own")
    AirflowApprovals(approver).answer(ask, approve=True, comment="mine")
    with pytest.raises(Refusal, match="already been updated"):
        AirflowApprovals(services.client("scientist")).answer(ask, approve=True, comment="twice")
    wait_for_ask(services, "own", tries=2)
    assert "approver: asked for the release and may not approve it as well; anybody but approver may" in note(
        approver, "own"
    )
    assert served(services) == ""
    reject(services, "own", "scientist")
    tasks = services.client().tasks(DAG, "own")
    assert tasks["roll_out"].state == "skipped"
    assert tasks["request_approval"].try_number >= 2
    assert last_evidence(services, "rolled_back")["reason"] == "rejected by scientist: enough"


@pytest.mark.slow
def test_approval__races_the_end_of_its_time__is_too_late_whoever_wins(services: Services, rejected: str) -> None:
    client, limit_s = services.client(), 20.0
    services.policy_file.write_text(f"models: {{'*': {{deadline_h: {limit_s / 3600}}}}}\n")
    try:
        client.trigger(DAG, "late", {"version": 1})
        ask = wait_for_ask(services, "late")
        state = find_rollout(services.settings, ask.rollout_id)
        time.sleep(max(0.0, state.requested_at + limit_s - time.time()))
        with suppress(Refusal):  # Airflow's scheduler was quicker with its own no
            AirflowApprovals(services.client("approver")).answer(ask, approve=True, comment="just in time?")
        assert wait_for_dag_run(client, DAG, "late") == "success", explain_failure(client, DAG, "late")
    finally:
        services.policy_file.write_text("{}\n")
    assert client.tasks(DAG, "late")["roll_out"].state == "skipped"
    assert "nobody approved by" in last_evidence(services, "rolled_back")["reason"]
    assert served(services) == ""
    assert "approved" not in events(services)


@pytest.mark.slow
def test_approval__by_two_people_in_a_freeze__is_asked_of_each_and_waits_for_its_end(
    services: Services, rejected: str
) -> None:
    client, further = services.client(), "request_further_approvals"
    two = "models: {'*': {min_approvals: 2}}\n"
    services.policy_file.write_text(two)
    try:
        client.trigger(DAG, "two", {"version": 1})
        wait_for_ask(services, "two")
        assert perch(services, "approve", "1").returncode == 0
        second = wait_for_ask(services, "two", task_id=further)
        said = perch(services, "approve", "1")
        assert (said.returncode, "has approved already" in said.stderr) == (EXIT_REFUSED, True), said.stderr
        let_go(services, "two", further, map_index=0)
        AirflowApprovals(services.client("approver")).answer(second, approve=True, comment="me again")
        wait_for_ask(services, "two", task_id=further, tries=2)
        assert "has approved already, and counts once; anybody but admin, approver may" in note(
            client, "two", further, "/0"
        )
        freeze = "freezes: [{name: year end, begins: 2020-01-01T00:00:00Z, ends: 2100-01-01T00:00:00Z}]\n"
        services.policy_file.write_text(two + freeze)
        assert perch(services, "approve", "1", "--as", "scientist").returncode == 0
        # Airflow may have tried one of the two once more, which the answers survived.
        until(lambda: "year end" in find_rollout(services.settings).waiting_for, "no freeze is waited for")
        assert client.dag_run_state(DAG, "two") == "running"
        assert perch(services, "rollback", "--reason", "not this year").returncode == 0
        assert wait_for_dag_run(client, DAG, "two") == "success", explain_failure(client, DAG, "two")
    finally:
        services.policy_file.write_text("{}\n")
    assert served(services) == ""
    assert not {"approved", "promoted"} & set(events(services))


@pytest.mark.slow
def test_approval__of_a_page_that_airflow_kept__fails_and_a_new_run_shows_a_new_one(
    services: Services, rejected: str
) -> None:
    client = services.client()
    client.trigger(DAG, "kept", {"version": 1})
    first = wait_for_ask(services, "kept")
    reject(services, "kept")
    clear(client, "kept", "begin_rollout")  # begins another release; the task's page is still that of the first
    ask = wait_for_ask(services, "kept", tries=2)
    assert ask.rollout_id == first.rollout_id
    said = perch(services, "approve", "1")
    assert (said.returncode, "waits for no answer" in said.stderr) == (EXIT_REFUSED, True), said.stderr
    let_go(services, "kept")
    AirflowApprovals(services.client("approver")).answer(ask, approve=True, comment="")
    assert wait_for_dag_run(client, DAG, "kept") == "failed"
    assert "trigger model_release with this version" in explain_failure(client, DAG, "kept")
    client.trigger(DAG, "anew", {"version": 1})
    assert wait_for_ask(services, "anew").rollout_id != first.rollout_id
    reject(services, "anew")
    assert served(services) == ""


def test_approval__only_the_recorded_answer_of_who_was_asked__releases(
    services: Services, undisturbed: str, rejected: str
) -> None:
    client = services.client()
    client.trigger(DAG, "again", {"version": 1})
    ask = wait_for_ask(services, "again")
    staged = client.result("ml_training_pipeline", undisturbed, "deploy_to_staging")
    assert staged is not None
    assert (ask.assigned, ask.evidence_sha256) == (("approver", "scientist"), staged["evidence_sha256"])

    # Who was not asked may not answer, whatever else they may.
    with pytest.raises(Refusal, match="not a respondent"):
        AirflowApprovals(client).answer(ask, approve=True, comment="")

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
