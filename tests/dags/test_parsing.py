"""DAG files parse fast, alone, without a database or a heavy library, and mirror `dvc.yaml`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
HEAVY = {"torch", "mlflow", "pandas", "pytorch_lightning", "great_expectations", "boto3", "sklearn", "evidently"}

# Runs in a process of its own: what is imported and opened at parse time is what is measured.
PARSE = """
import importlib, json, socket, sys, time
import airflow.sdk, airflow.providers.standard.hooks.subprocess  # what the DAG processor has loaded already

def refuse(*args, **kwargs):
    raise AssertionError(f"a connection was opened at parse time: {args}")
socket.socket.connect = refuse

from airflow.providers.standard.operators.hitl import ApprovalOperator
import sqlalchemy.engine
sqlalchemy.engine.Engine.connect = refuse

before = set(sys.modules)
started = time.process_time()
dags = {}
for name in sys.argv[1:]:
    dag = importlib.import_module(f"dags.{name}").dag
    dags[dag.dag_id] = {
        "tasks": {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks},
        "schedule": dag.timetable.expression if hasattr(dag.timetable, "expression") else str(dag.schedule),
        "catchup": dag.catchup,
        "max_active_runs": dag.max_active_runs,
        "retries": [task.retries for task in dag.tasks],
        "timeouts": [task.execution_timeout is not None for task in dag.tasks],
        "notices": [bool(task.on_failure_callback) for task in dag.tasks],
        "form": {name: dag.params.get_param(name).schema for name in dag.params},
        "defaults": dag.params.dump(),
        "assets": [asset.name for asset in dag.schedule] if isinstance(dag.schedule, list) else [],
        "outlets": {task.task_id: [outlet.name for outlet in task.outlets] for task in dag.tasks if task.outlets},
        "asks": [
            {
                "assigned": [user["id"] for user in task.assigned_users],
                "defaults": task.defaults,
                "comment": task.params.get_param("comment").schema["type"],
            }
            for task in dag.tasks if isinstance(task, ApprovalOperator)
        ],
    }
print(json.dumps({
    "dags": dags,
    "cpu_s": time.process_time() - started,
    "imported": sorted({module.split(".")[0] for module in set(sys.modules) - before}),
}))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = sorted(file.stem for file in (PROJECT / "dags").glob("*.py") if file.stem != "__init__")
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")), "PYTHONPATH": str(PROJECT)}
    environment["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
    environment["PERCH_APPROVERS"] = "anna bert"
    completed = subprocess.run(
        [sys.executable, "-c", PARSE, *names], env=environment, capture_output=True, text=True, cwd=PROJECT, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def test_dag_files__parsed__take_less_than_two_seconds(parsed: dict[str, Any]) -> None:
    assert parsed["cpu_s"] < 2.0


def test_dag_files__parsed__import_nothing_heavy(parsed: dict[str, Any]) -> None:
    assert not HEAVY & set(parsed["imported"])


def test_training_dag__parsed__has_the_stages_and_edges_of_dvc_yaml(parsed: dict[str, Any]) -> None:
    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    outs = {out: name for name, stage in stages.items() for out in stage["outs"]}
    expected = {name: sorted({outs[dep] for dep in stage["deps"] if dep in outs}) for name, stage in stages.items()}
    tasks = parsed["dags"]["ml_training_pipeline"]["tasks"]
    assert {name: tasks[name] for name in stages} == expected
    assert {name: tasks[name] for name in tasks.keys() - stages.keys()} == {
        "model_registration": ["model_evaluation"],
        "model_packaging": ["model_registration"],
        "deploy_to_staging": ["model_packaging"],
        "notify_team": ["deploy_to_staging"],
    }


def test_training_dag__parsed__is_scheduled_as_promised(parsed: dict[str, Any]) -> None:
    dag = parsed["dags"]["ml_training_pipeline"]
    assert dag["schedule"] == "0 2 * * 0"
    assert dag["catchup"] is False
    assert dag["max_active_runs"] == 1


def test_every_task__parsed__has_retries_a_timeout_and_a_failure_notice(parsed: dict[str, Any]) -> None:
    for dag in parsed["dags"].values():
        assert all(retries >= 1 for retries in dag["retries"])
        assert all(dag["timeouts"])
        assert all(dag["notices"])


def test_form__parsed__has_the_defaults_of_params_yaml_and_the_limits_of_the_models(parsed: dict[str, Any]) -> None:
    dag = parsed["dags"]["ml_training_pipeline"]
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    assert dag["defaults"] == {
        "network": params["model_training"]["network"],
        "epochs": params["model_training"]["epochs"],
        "learning_rate": params["model_training"]["learning_rate"],
        "trials": params["model_training"]["trials"],
        "parallel_trials": params["model_training"]["parallel_trials"],
        "source": params["data_ingestion"]["source"],
        "as_of": params["data_ingestion"]["as_of"],
    }
    form = dag["form"]
    assert form["network"]["enum"] == ["small_cnn", "huggingface"]
    assert (form["epochs"]["minimum"], form["epochs"]["maximum"]) == (1, 1000)
    assert form["learning_rate"]["exclusiveMinimum"] == 0
    assert form["as_of"]["type"] == ["string", "null"]


def test_release_dag__parsed__runs_on_the_candidate_asset_and_asks_before_it_releases(parsed: dict[str, Any]) -> None:
    dag = parsed["dags"]["model_release"]
    model = yaml.safe_load((PROJECT / "params.yaml").read_text())["model_name"]
    assert dag["assets"] == [f"candidate/{model}"]
    assert parsed["dags"]["ml_training_pipeline"]["outlets"] == {"deploy_to_staging": [f"candidate/{model}"]}
    assert dag["max_active_runs"] == 1
    assert dag["tasks"] == {
        "begin_rollout": [],
        "request_approval": ["begin_rollout"],
        "further_approvals": ["begin_rollout"],
        "request_further_approvals": ["further_approvals", "request_approval"],
        "roll_out": ["request_further_approvals"],
    }
    assert dag["form"]["version"]["type"] == ["null", "integer"]


def test_release_dag__its_approval__is_asked_of_named_people_and_is_a_no_by_default(parsed: dict[str, Any]) -> None:
    for ask in parsed["dags"]["model_release"]["asks"]:
        assert ask == {"assigned": ["anna", "bert"], "defaults": ["Reject"], "comment": ["null", "string"]}
    assert len(parsed["dags"]["model_release"]["asks"]) == 1  # the further ones are known only when a run asks
