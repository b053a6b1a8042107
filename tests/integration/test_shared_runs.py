"""A run whose steps are each done in a folder of their own, with nothing between them but an S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipelines.core.stage_graph import read_stage_graph
from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER
from pipelines.runs.replaying import lock_outs
from pipelines.runs.workspaces import workspace_of
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[2]
STAGES = [node.name for node in read_stage_graph(PROJECT / "dvc.yaml")]
OVERRIDES = {"model_training.epochs": 4, "model_training.int8": False, "data_ingestion.as_of": "2026-11-01"}

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    made = boto3.resource(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    ).Bucket("perch-runs")
    made.create()
    yield made
    server.stop()


class Machine:
    """A folder that stands for one pod's disk, and the command in it."""

    def __init__(self, home: Path, bucket: Any, mlflow: Path, run_id: str) -> None:
        self.home, self.run_id = home, run_id
        self.settings = Settings(project_dir=PROJECT, home=home)
        self.environment = {
            **os.environ,
            "PERCH_HOME": str(home),
            "PERCH_PROJECT_DIR": str(PROJECT),
            "PERCH_RUNS_URL": f"s3://{bucket.name}/perch",
            "PERCH_S3_ENDPOINT_URL": bucket.meta.client.meta.endpoint_url,
            "PERCH_MLFLOW_URI": f"sqlite:///{mlflow}",
            "PERCH_DATABASE_URL": f"sqlite:///{mlflow.with_name('ledger.db')}",
            "PERCH_POD_NAME": home.name,
            "PERCH_GIT_SHA": "0" * 40,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "perch"), *words],
            env=self.environment,
            cwd=PROJECT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stage(self, stage: str) -> subprocess.Popen[str]:
        return self.start(stage, "--run", self.run_id, "--conf", json.dumps(OVERRIDES), "--json")

    def do(self, stage: str, expected: int = 0) -> str:
        process = self.stage(stage)
        output, _ = process.communicate()
        assert process.returncode == expected, output
        return output

    @property
    def outs(self) -> dict[str, str]:
        return lock_outs(workspace_of(self.settings, self.run_id))


@pytest.fixture
def machine(bucket: Any, tmp_path: Path, empty_mlflow_database: Path, request: pytest.FixtureRequest):
    mlflow = tmp_path / "mlflow.db"
    mlflow.write_bytes(empty_mlflow_database.read_bytes())
    made = iter(range(100))

    def make() -> Machine:
        return Machine(tmp_path / f"pod-{next(made)}", bucket, mlflow, request.node.name[:60])

    return make


@pytest.mark.slow
def test_shared_run__second_machine__finds_what_the_first_did_and_does_it_not_again(machine, bucket: Any) -> None:
    first, second = machine(), machine()
    first.do("data_ingestion")
    first.do("data_validation")
    output = second.do("data_validation")
    assert second.outs == first.outs
    workspace = workspace_of(second.settings, second.run_id)
    assert (workspace.validation / "validation.json").is_file()
    assert not workspace.raw.exists()  # a stage that is done needs nothing of what it read
    assert json.loads(output.splitlines()[-1])["summary"]
    said = second.start("runs", "outcome", second.run_id, "data_validation", "--json")
    assert json.loads(said.communicate()[0].splitlines()[-1])["by"] == second.home.name


@pytest.mark.slow
def test_shared_run__two_machines_at_once__one_waits_or_is_told_to_try_later(machine) -> None:
    first, second = machine(), machine()
    processes = [each.stage("data_ingestion") for each in (first, second)]
    codes = sorted(process.wait() for process in processes)
    assert codes in ([0, 0], [0, EXIT_TRY_LATER])
    assert machine().do("data_ingestion")


@pytest.mark.slow
def test_shared_run__killed_on_one_machine__is_done_by_another(machine, bucket: Any) -> None:
    killed, other = machine(), machine()
    process = killed.stage("data_ingestion")
    key = f"perch/runs/{killed.run_id}/opened.tar"
    while not list(bucket.objects.filter(Prefix=key)):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    other.do("data_ingestion")  # once the lease of the killed one has ended
    assert other.outs["data/raw"]


@pytest.mark.slow
def test_shared_run__asked_to_end__gives_the_run_back_at_once(machine) -> None:
    evicted, other = machine(), machine()
    process = evicted.stage("data_ingestion")
    time.sleep(4)
    process.terminate()
    assert process.wait(30) != 0
    started = time.monotonic()
    other.do("data_ingestion")
    assert time.monotonic() - started < 30  # a lease that nobody gave back would be waited for


@pytest.mark.slow
def test_shared_run__step_that_refuses__says_so_to_whoever_asks_later(machine) -> None:
    here = machine()
    process = here.start("data_ingestion", "--run", here.run_id, "--set", "data_ingestion.source=/no/such/folder")
    assert process.wait() == EXIT_REFUSED
    said = machine().start("runs", "outcome", here.run_id, "data_ingestion")
    output, _ = said.communicate()
    assert said.returncode == EXIT_REFUSED
    assert "/no/such/folder" in output


@pytest.mark.slow
def test_shared_run__each_step_on_a_machine_of_its_own__ends_with_the_bytes_of_a_local_run(
    machine, tmp_path: Path
) -> None:
    for stage in STAGES:
        last = machine()
        last.do(stage)
    local = machine()
    del local.environment["PERCH_RUNS_URL"]
    for stage in STAGES:
        local.do(stage)
    assert last.outs == local.outs
    for stage in ("model_registration", "model_packaging"):
        machine().do(stage)


@pytest.mark.slow
def test_shared_run__training_killed_half_way__goes_on_elsewhere_and_ends_the_same(machine, bucket: Any) -> None:
    for stage in STAGES[: STAGES.index("model_training")]:
        machine().do(stage)
    killed = machine()
    process = killed.stage("model_training")
    time.sleep(0.1)
    checkpoints = workspace_of(killed.settings, killed.run_id).checkpoints
    while not (checkpoints / "training.ckpt").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()  # as when a node is drained
    process.wait()
    assert list(bucket.objects.filter(Prefix=f"perch/runs/{killed.run_id}/checkpoints/"))
    other = machine()
    assert "going on after epoch" in other.do("model_training")
    undisturbed = machine()
    undisturbed.run_id = "undisturbed"
    for stage in STAGES[: STAGES.index("model_training") + 1]:
        undisturbed.environment["PERCH_RUNS_URL"] = f"s3://{bucket.name}/another"
        undisturbed.do(stage)
    assert other.outs["model"] == undisturbed.outs["model"]
    assert not list(bucket.objects.filter(Prefix=f"perch/runs/{killed.run_id}/checkpoints/"))
