"""The training DAG in a real Airflow against a real MLflow: run, killed and retried, refused, restarted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pipelines.core.stage_graph import read_stage_graph
from pipelines.runs.workspaces import find_workspace
from pipelines.services.airflow_client import AirflowClient
from tests.integration.conftest import FAST, PROJECT, Services, explain_failure, wait_for_dag_run

DAG = "ml_training_pipeline"
STEPS = [
    *(node.name for node in read_stage_graph(PROJECT / "dvc.yaml")),
    *("model_registration", "model_packaging", "deploy_to_staging", "notify_team"),
]

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


def wait_for_run(client: AirflowClient, run_id: str, watch: Callable[[], None] = lambda: None) -> str:
    return wait_for_dag_run(client, DAG, run_id, watch)


def versions(services: Services) -> list[dict[str, Any]]:
    from mlflow import MlflowClient

    found = MlflowClient(services.ports.mlflow_uri).search_model_versions("name = 'digits-classification'")
    return sorted((dict(version) for version in found), key=lambda version: int(version["version"]))


def outs(services: Services, run_id: str) -> dict[str, str]:
    from pipelines.runs.replaying import lock_outs

    # A later run is compared with the version that an earlier one registered, and the int8 variant is kept or not by
    # its measured speed; what depends on neither must be the same.
    found = lock_outs(find_workspace(services.settings, run_id))
    return {path: found[path] for path in ("data/raw", "data/quarantine.parquet", "data/splits", "data/features")}


def weights(services: Services, run_id: str) -> str:
    result = find_workspace(services.settings, run_id).result_file("model_training")
    return str(json.loads(result.read_text())["weights_sha256"])


def test_dag_run__undisturbed__ends_in_a_registered_version_with_numbers_and_links(
    services: Services, undisturbed: str
) -> None:
    client = services.client()
    tasks = client.tasks(DAG, undisturbed)
    assert {step: tasks[step].state for step in STEPS} == dict.fromkeys(STEPS, "success")
    evaluation = client.result(DAG, undisturbed, "model_evaluation")
    assert evaluation is not None
    assert evaluation["metrics"]["test/accuracy_low"] >= 0.85
    assert any(version["tags"].get("perch.run_id") == undisturbed for version in versions(services))
    links = {step: client.links(DAG, undisturbed, step) for step in STEPS}
    assert all("MLflow run" in found for found in links.values())
    for step, title in (("data_validation", "Data Docs"), ("model_evaluation", "Model card")):
        response = httpx.get(links[step][title])
        assert response.status_code == 200
        assert "text/html" in response.headers["content-type"]


def test_dag_run__every_stage_killed_once__ends_as_if_undisturbed(services: Services, undisturbed: str) -> None:
    client = services.client()
    run_id = "killed"
    # No cache may answer for what the undisturbed run has computed: another seed would, but change the result.
    run_cache = services.settings.dvc_cache_dir / "runs"
    run_cache.rename(run_cache.with_name("runs-of-undisturbed"))
    workspace = services.settings.runs_dir / run_id
    killed: dict[str, int] = {}

    def kill_once() -> None:
        for process in stage_processes(workspace):
            stage = process.cmdline()[-1]
            if stage not in killed and (time.time() - process.create_time()) > 1.0:
                killed[stage] = process.pid
                os.kill(process.pid, signal.SIGKILL)

    client.trigger(DAG, run_id, FAST)
    assert wait_for_run(client, run_id, kill_once) == "success", explain_failure(client, DAG, run_id)
    assert {"data_ingestion", "data_validation", "model_training", "model_evaluation"} <= killed.keys()
    tries = {task.task_id: task.try_number for task in client.tasks(DAG, run_id).values()}
    assert all(tries[stage] >= 2 for stage in killed)
    assert outs(services, run_id) == outs(services, undisturbed)
    assert weights(services, run_id) == weights(services, undisturbed)


def test_dag_run__source_that_is_not_there__fails_at_once_and_says_why(services: Services, undisturbed: str) -> None:
    client = services.client()
    client.trigger(DAG, "no-source", {**FAST, "source": "/no/such/folder"})
    assert wait_for_run(client, "no-source") == "failed"
    task = client.tasks(DAG, "no-source")["data_ingestion"]
    assert (task.state, task.try_number) == ("failed", 1)  # a refusal is not tried again
    log = "\n".join(client.log_tail(DAG, "no-source", task, 100))
    assert "/no/such/folder" in log
    assert "what to do" in log


def test_trigger__value_outside_its_limits__is_refused_before_anything_runs(services: Services) -> None:
    client = services.client()
    client.wait_for_dag(DAG)
    with pytest.raises(Exception, match="400"):
        client.trigger(DAG, "bad-form", {"epochs": 0})
    assert client.dag_run_state(DAG, "bad-form") is None


def test_registration__task_cleared_after_success__makes_no_second_version(
    services: Services, undisturbed: str
) -> None:
    client = services.client()
    before = versions(services)
    client.clear(DAG, undisturbed, ["model_registration"])
    time.sleep(1)
    assert wait_for_run(client, undisturbed) == "success"
    assert [version["version"] for version in versions(services)] == [version["version"] for version in before]


def stage_processes(workspace: Path) -> Iterator[psutil.Process]:
    """The processes that run a stage in a workspace (not DVC, nor the shell that may stand between)."""
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if len(line) == 4 and line[1:3] == ["-m", "pipelines"] and Path(process.cwd()) == workspace:
                yield process
        except psutil.Error:
            continue
