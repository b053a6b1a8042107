"""Real servers for the tests that need them, in folders of their own, on free ports: Airflow, MLflow, the service."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.services.airflow_client import AirflowClient
from pipelines.services.programs import Ports
from pipelines.services.secrets import ensure_passwords
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings
from tests.integration.local_rig import ENVIRONMENT, Rig, serve_locally
from tests.integration.postgresql_server import make_database, serve_postgresql
from tests.integration.s3_server import serve_s3
from tests.integration.served_release import Server, stage_release

PROJECT = Path(__file__).parents[2]
FAST = {"epochs": 6, "as_of": "2026-11-01", "source": "digits"}  # for the training DAG's form


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Airflow's tests come last: it goes on running, and would take its part of two cores from the others."""
    items.sort(key=lambda item: "services" in getattr(item, "fixturenames", ()))


@dataclass(frozen=True)
class Services:
    settings: Settings
    stack: Stack
    ports: Ports

    @property
    def policy_file(self) -> Path:
        """The promotion policy, read at each look; empty unless a test writes it."""
        return self.settings.home / "policy.yaml"

    def client(self, user: str = "admin") -> AirflowClient:
        return AirflowClient(self.ports.airflow_uri, user, ensure_passwords(self.settings)[user])


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    settings = Settings(project_dir=PROJECT, home=tmp_path_factory.mktemp("perch-home"))
    stack = Stack(settings)
    policy = settings.home / "policy.yaml"
    policy.write_text("{}\n")
    # The services inherit these.
    own = {"RETRY_DELAY_S": "1", "PROMOTION_POLICY": str(policy), "APPROVERS": "approver scientist"}
    own |= {"SERVING_FLUSH_INTERVAL_S": "1"}  # a gate of `shadow` reads the predictions that were kept
    own = {f"PERCH_{name}": value for name, value in own.items()}
    os.environ.update(own)
    try:
        ports = stack.up(print, Ports(mlflow=any_free_port(), airflow=any_free_port(), serving=any_free_port()))
        yield Services(settings, stack, ports)
    finally:
        stack.down()
        for name in own:
            del os.environ[name]


def wait_for_dag_run(
    client: AirflowClient, dag_id: str, run_id: str, watch: Callable[[], None] = lambda: None, limit_s: float = 600
) -> str:
    """Wait until a DAG run has ended; what it ended as."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        state = client.dag_run_state(dag_id, run_id)
        if state in {"success", "failed"}:
            return state
        watch()
        time.sleep(0.1)
    pytest.fail(f"run {run_id} of {dag_id} did not end in {limit_s:g} s: {client.tasks(dag_id, run_id)}")


def explain_failure(client: AirflowClient, dag_id: str, run_id: str) -> str:
    """The ends of the logs of the tasks that failed."""
    return "\n".join(
        "\n".join([task.task_id, *client.log_tail(dag_id, run_id, task, 25)])
        for task in client.tasks(dag_id, run_id).values()
        if task.state == "failed"
    )


@pytest.fixture(scope="session")
def undisturbed(services: Services) -> str:
    """The id of a run of the training DAG that nobody disturbed; the candidate that it made calls for an approval."""
    client, dag_id = services.client(), "ml_training_pipeline"
    client.wait_for_dag(dag_id)
    client.wait_for_dag("model_release")  # before there is a candidate that it would miss
    client.trigger(dag_id, "undisturbed", FAST)
    assert wait_for_dag_run(client, dag_id, "undisturbed") == "success", explain_failure(client, dag_id, "undisturbed")
    return "undisturbed"


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Path]:
    """The folder of a running PostgreSQL's socket."""
    with serve_postgresql() as folder:
        yield folder


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with serve_s3() as url:
        yield url


@pytest.fixture
def postgresql_url(postgresql_server: Path) -> str:
    """An empty database on a real PostgreSQL."""
    return make_database(postgresql_server, f"perch_{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def staged_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release around a small convolutional network with random weights, for colour images padded to a square."""
    return stage_random_network(tmp_path_factory.mktemp("staged-release"), seed=1)


def stage_random_network(folder: Path, seed: int) -> Path:
    """Such a release; one of another seed answers otherwise."""
    import torch

    from pipelines.core.contract import InputContract, ModelContract
    from pipelines.modeling.export import export_onnx
    from pipelines.modeling.networks import NormalizedNet, PixelNormalization, SmallConvNet

    contract = ModelContract(
        input=InputContract(size_px=28, channels=3, resize="pad"), labels=tuple(f"digit {n}" for n in range(10))
    )
    torch.manual_seed(seed)
    backbone = SmallConvNet(3, 10, widths=(16, 32, 64), dropout=0.0)
    network = NormalizedNet(PixelNormalization([60.0] * 3, [70.0] * 3), backbone).eval()
    with torch.no_grad():  # as sure of itself, and as undecided between the labels, as a trained one
        blots = torch.rand(64, 3, 4, 4).mul(255).repeat_interleave(7, 2).repeat_interleave(7, 3)
        logits = network(blots.permute(0, 2, 3, 1).byte())
        backbone.head.bias -= logits.mean(0)
        for parameter in backbone.head.parameters():
            parameter /= logits.std(0).mean()
    export_onnx(network, contract, folder / "model.onnx", temperature=0.5)
    return stage_release(folder / "stage", (folder / "model.onnx").read_bytes(), contract)


@pytest.fixture(scope="session")
def served(staged_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """That release served by one worker, with the default limits but for short times."""
    settings = {"EXPLAIN_BUDGET_S": 0.05, "REQUEST_TIMEOUT_S": 5}
    server = Server(staged_release, tmp_path_factory.mktemp("served"), settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory, staged_release: Path) -> Iterator[Rig]:
    """Services behind Envoy, in whichever state the last test left them: `settled` puts them in order."""
    with serve_locally(tmp_path_factory.mktemp("perch-home"), staged_release) as rig:
        yield rig


@pytest.fixture
def settled(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """The first release stable, the second canary without traffic, both ready."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    rig.settle()
    return rig
