import shutil
import time

import pytest

from pipelines.modeling.live_run import LiveRun, TrialReport

TRIAL = TrialReport(3, "pruned", {"learning_rate": 0.01}, [0.9, 0.7], {"val/loss": 0.7, "val/accuracy": 0.8})


@pytest.fixture
def store(empty_mlflow_database, tmp_path):
    """A real MLflow on a SQLite file: its address, a client, and an experiment."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copyfile(empty_mlflow_database, tmp_path / 'mlflow.db')}"
    client = MlflowClient(tracking_uri=uri)
    return uri, client, client.create_experiment("digits", artifact_location=str(tmp_path / "artifacts"))


def test_live_run__epochs_and_a_trial__are_in_mlflow_once(store):
    uri, client, experiment = store
    parent = client.create_run(experiment).info.run_id
    for _ in range(2):  # the second time as after a kill
        with LiveRun(parent, uri) as live_run:
            live_run.log_epoch(1, {"val/loss": 0.5, "lr": 0.01, "train/loss": float("nan")})
            live_run.log_trial(TRIAL)
    run = client.get_run(parent)
    assert run.data.metrics["val/loss"] == 0.5
    assert "train/loss" not in run.data.metrics
    assert {metric.step for metric in client.get_metric_history(parent, "val/loss")} == {1}
    (nested,) = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert (nested.info.status, nested.data.params) == ("KILLED", {"learning_rate": "0.01"})
    assert nested.data.metrics == {"val/loss": 0.7, "val/accuracy": 0.8}
    assert [metric.value for metric in client.get_metric_history(nested.info.run_id, "val/loss")] == [0.9, 0.7]


def test_live_run__trial_half_written_by_a_killed_process__is_replaced(store):
    uri, client, experiment = store
    parent = client.create_run(experiment).info.run_id
    half = client.create_run(experiment, tags={"mlflow.parentRunId": parent, "perch.trial": "3"}).info.run_id
    with LiveRun(parent, uri) as live_run:
        live_run.log_trial(TRIAL)
    (nested,) = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    assert nested.info.run_id != half
    assert nested.info.status == "KILLED"


def test_live_run__mlflow_not_there__warns_once_and_goes_on(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with LiveRun("0" * 32, "http://127.0.0.1:9") as live_run:
        for epoch in range(1, 4):
            live_run.log_epoch(epoch, {"val/loss": 0.5})
    (warning,) = (record for record in caplog.records if record.name == "pipelines.modeling.live_run")
    assert "training goes on" in warning.getMessage()


def test_live_run__no_run_in_the_environment__does_nothing(monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    began = time.monotonic()
    with LiveRun.from_environment() as live_run:
        live_run.log_epoch(1, {"val/loss": 0.5})
        live_run.log_trial(TRIAL)
    assert time.monotonic() - began < 10
