"""Publishing and registering through a real MLflow server that is killed while they are at it."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import patience
from pipelines.core.workspace import Workspace
from pipelines.params import Params
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import find_disagreements, list_versions, read_card
from pipelines.registry.reference import fetch_reference
from pipelines.registry.registration import register
from pipelines.registry.tracking import artifact_url, ensure_run, publish_stage, run_url
from pipelines.settings import Settings

pytestmark = pytest.mark.services
MakeRun = Callable[..., Workspace]
MODEL = "shapes-classification"
STAGES = ("data_ingestion", "data_validation", "model_training", "model_evaluation")


class Server:
    """MLflow over the home's own database, as `perch up` starts it, or over another."""

    def __init__(self, home: Path, database: str = "") -> None:
        self.home = home
        self.database = database or f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self.home / "mlflow"
        command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        switches = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.home / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | switches, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None, (self.home / "mlflow.log").read_text()
            assert time.monotonic() < deadline, (self.home / "mlflow.log").read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return get(f"{self.uri}/health")[0] == 200
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(registry_settings: Settings) -> Iterator[Server]:
    server = Server(registry_settings.home)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def settings(registry_settings: Settings, server: Server, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(patience, "PATIENCE_S", 300.0)  # a server starts slowly on a busy machine
    return registry_settings.model_copy(update={"mlflow_uri": server.uri})


def get(address: str) -> tuple[int, str, str, bytes]:
    with urllib.request.urlopen(address, timeout=10) as answer:
        headers = answer.headers
        return answer.status, headers.get_content_type(), headers.get("Content-Disposition", ""), answer.read()


def publish_all(settings: Settings, params: Params, workspace: Workspace) -> str:
    run_id = ensure_run(settings, params, workspace)
    for stage in STAGES:
        publish_stage(settings, params, workspace, stage, run_id)
    return run_id


def everything(settings: Settings) -> Any:
    def read(mlflow: Mlflow) -> Any:
        experiment = mlflow.client.get_experiment_by_name(MODEL)
        return [
            (
                run.info.run_id,
                run.data.params,
                run.data.tags,
                {
                    name: [(m.step, m.value) for m in mlflow.client.get_metric_history(run.info.run_id, name)]
                    for name in run.data.metrics
                },
                [entry.dataset.digest for entry in run.inputs.dataset_inputs],
                digests(mlflow.artifacts(run.info.run_id)),
            )
            for run in mlflow.client.search_runs([experiment.experiment_id])
        ]

    return with_mlflow(settings, read)


def digests(artifacts: Any) -> dict[str, str]:
    root = Path(artifacts.download_artifacts(""))
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_registry__whole_life_over_a_server__is_readable_with_and_without_it(
    settings: Settings,
    registry_settings: Settings,
    registry_params: Params,
    make_run: MakeRun,
    server: Server,
    tmp_path: Path,
) -> None:
    workspace = make_run()
    run_id = publish_all(settings, registry_params, workspace)
    once = everything(settings)
    assert publish_all(settings, registry_params, workspace) == run_id
    assert everything(settings) == once

    first = register(settings, registry_params, workspace)
    assert register(settings, registry_params, workspace) == first
    assert first.version == 1
    (version,) = list_versions(settings, MODEL)
    assert read_card(settings, version).startswith("# Card of run-1")
    fetch_reference(settings, registry_params, tmp_path / "with")

    # The page that shows the card: MLflow's interface, which finds the run and the artifact by the part after the #.
    address = artifact_url(settings, run_id, "model_evaluation/model_card.html")
    assert address is not None
    status, kind, disposition, page = get(address)
    assert (status, kind) == (200, "text/html")
    assert not disposition.startswith("attachment")
    assert b'id="root"' in page
    found = re.fullmatch(r".*/#/experiments/(\w+)/runs/(\w+)/artifacts/(.+)", address)
    assert found is not None
    query = urllib.parse.urlencode({"run_uuid": found[2], "path": found[3]})
    status, kind, disposition, card = get(f"{server.uri}/get-artifact?{query}")
    assert card == (workspace.evaluation / "model_card.html").read_bytes()
    assert (status, kind) == (200, "text/html")
    assert disposition.startswith("attachment")  # why there is no address of the bare page
    assert run_url(settings, run_id) == f"{server.uri}/#/runs/{run_id}"

    server.kill()
    (version,) = list_versions(registry_settings, MODEL)
    assert read_card(registry_settings, version).startswith("# Card of run-1")
    fetch_reference(registry_settings, registry_params, tmp_path / "without")
    with_, without = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("with", "without"))
    assert with_ == without
    assert register(registry_settings, registry_params, workspace) == first


def test_register__server_killed_at_the_creation__makes_one_version(
    settings: Settings,
    registry_params: Params,
    make_run: MakeRun,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import requests
    from mlflow import MlflowClient

    create = MlflowClient.create_model_version
    losses = ["request", "answer"]
    restarts: list[threading.Timer] = []

    def create_and_kill(*arguments: Any, **keywords: Any) -> Any:
        loss = losses.pop(0) if losses and len(restarts) == len(made) else ""
        answer = create(*arguments, **keywords) if loss != "request" else None
        if loss:
            server.kill()
            restarts.append(threading.Timer(2.0, server.start))
            restarts[-1].start()
            raise requests.ConnectionError("Connection reset by peer")
        return answer

    made: list[int] = []
    monkeypatch.setattr(MlflowClient, "create_model_version", create_and_kill)
    for run_id, seed in (("run-1", 1), ("run-2", 2)):
        made.append(register(settings, registry_params, make_run(run_id, seed=seed)).version)
        restarts[-1].join()
    assert made == [1, 2]
    assert losses == []
    versions = list_versions(settings, MODEL)
    assert [version.version for version in versions] == [2, 1]
    ledger = Ledger(settings.ledger_url)
    assert len(ledger.entries()) == 2
    assert find_disagreements(MODEL, versions, ledger.entries(), candidate_alias="candidate") == []


def test_publish__server_killed_while_at_it__loses_and_doubles_nothing(
    settings: Settings, registry_params: Params, make_run: MakeRun, server: Server
) -> None:
    workspace = make_run()
    reference = publish_all(settings, registry_params, make_run("undisturbed"))

    def kill_and_restart() -> None:
        server.kill()
        server.start()

    timer = threading.Timer(0.2, kill_and_restart)
    timer.start()
    run_id = publish_all(settings, registry_params, workspace)
    register(settings, registry_params, workspace)
    timer.join()
    assert len(list_versions(settings, MODEL)) == 1
    runs = {run[0]: run for run in everything(settings)}
    assert runs.keys() == {run_id, reference}
    assert runs[run_id][3] == runs[reference][3]  # the same histories
    published = {path for path in runs[run_id][5] if not path.startswith("model_registration/")}
    assert published == runs[reference][5].keys()
