"""Airflow, MLflow and PostgreSQL on this machine, which start steps in pods of a cluster beside an installed chart."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.core.workspace import Workspace
from pipelines.release.airflow_approvals import AirflowApprovals
from pipelines.release.keys import signing_key
from pipelines.release.supervision import supervisor_proxy
from pipelines.runs.sharing import SharedRun
from pipelines.runs.workspaces import workspace_of
from pipelines.services.airflow_client import AirflowClient
from pipelines.services.demo_release import recorded_digits
from pipelines.services.programs import Ports, tool
from pipelines.services.secrets import ensure_demo_key, ensure_passwords
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings
from tests.cluster.gateway import Gateway
from tests.cluster.installation import OBJECT_STORE, OWN_KEYS, RELEASE, secret
from tests.cluster.installed import installed, object_store
from tests.cluster.kubernetes_cluster import HOST_SEEN_FROM_PODS, Cluster
from tests.integration.conftest import PROJECT
from tests.integration.postgresql_server import make_database, serve_postgresql
from tests.integration.traffic import Traffic
from tests.missing_parts import miss

NAMESPACE = "vision"
TRAINING, RELEASING = "ml_training_pipeline", "model_release"
DATABASE, SIGNING, LAUNCHER = "perch-database", "perch-signing-key", "airflow"
# Threads add up in another order on another number of cores; one each lets training run beside what serves.
ONE_CORE = {"OMP_NUM_THREADS": "1", "PERCH_WORKERS": "1"}
# As the demo's: minutes instead of an hour, with the usual gates.
LIMITS = {"model_release.min_step_s": 3, "model_release.max_step_s": 240, "model_release.max_error_rate": 0.05}
_PAUSE_S = 0.3


@dataclass(frozen=True)
class TrainingRig:
    """Where the DAGs run.

    Attributes:
        settings: of whoever speaks to all of it.
        environment: variables by which a command on this machine does.
        stack: Airflow and MLflow.
        ports: theirs.
        cluster: where the pods are.
        gateway: of the clients.
        postgresql: folder of the database's server and its socket.
    """

    settings: Settings
    environment: Mapping[str, str]
    stack: Stack
    ports: Ports
    cluster: Cluster
    gateway: Gateway
    postgresql: Path

    def client(self, user: str = "admin") -> AirflowClient:
        return AirflowClient(self.ports.airflow_uri, user, ensure_passwords(self.settings)[user])

    def pods(self, run_id: str, step: str = "") -> list[dict[str, Any]]:
        """Pods of a run's steps."""
        words = (f"--namespace={NAMESPACE}", "--selector=kubernetes_pod_operator=True")
        return [
            pod
            for pod in self.cluster.read("pods", *words)["items"]
            if pod["metadata"]["annotations"]["perch/run-id"] == run_id
            and step in ("", pod["metadata"]["labels"]["perch/step"])
        ]

    def wait_for_pod(self, run_id: str, step: str, *phases: str, limit_s: float = 120) -> dict[str, Any]:
        """The step's pod, once it is in one of these phases."""
        deadline = time.monotonic() + limit_s
        while True:
            for pod in self.pods(run_id, step):
                if pod["status"]["phase"] in phases:
                    return pod
            assert time.monotonic() < deadline, f"{step} of {run_id}: {self.explain(TRAINING, run_id)}"
            time.sleep(_PAUSE_S)

    def wait_without_pods(self, run_id: str, limit_s: float = 90) -> float:
        """Seconds until the run has no pods any more."""
        began = time.monotonic()
        while pods := self.pods(run_id):
            assert time.monotonic() - began < limit_s, [pod["metadata"]["name"] for pod in pods]
            time.sleep(_PAUSE_S)
        return time.monotonic() - began

    def mark_failed(self, run_id: str, task: str) -> None:
        """As a person does on Airflow's page."""
        path = f"/dags/{TRAINING}/dagRuns/{run_id}/taskInstances/{task}"
        status, body = self.client().call("PATCH", path, json={"new_state": "failed"})
        assert status == 200, body

    def wait_for_state(self, dag_id: str, run_id: str, task: str, *states: str, limit_s: float = 120) -> None:
        deadline, client = time.monotonic() + limit_s, self.client()
        while (found := client.tasks(dag_id, run_id)).get(task) is None or found[task].state not in states:
            assert time.monotonic() < deadline, self.explain(dag_id, run_id)
            time.sleep(_PAUSE_S)

    def wait_for_run(self, dag_id: str, run_id: str, limit_s: float = 900) -> str:
        """What a DAG run ended as."""
        deadline, client = time.monotonic() + limit_s, self.client()
        while (state := client.dag_run_state(dag_id, run_id)) not in {"success", "failed"}:
            assert time.monotonic() < deadline, self.explain(dag_id, run_id)
            time.sleep(_PAUSE_S)
        return str(state)

    def explain(self, dag_id: str, run_id: str) -> str:
        """How far a run is, with the ends of the logs of what did not go well, and its pods."""
        client, lines = self.client(), []
        for task in client.tasks(dag_id, run_id).values():
            lines.append(f"{task.task_id}: {task.state}, try {task.try_number}, {task.duration_s or 0:.0f} s")
            if task.state in {"failed", "up_for_retry", "deferred"}:
                with contextlib.suppress(Exception):
                    lines += [f"    {line[:400]}" for line in client.log_tail(dag_id, run_id, task, 30)]
        lines += [f"{pod['metadata']['name']}: {json.dumps(pod['status'])[:600]}" for pod in self.pods(run_id)]
        return "\n".join(lines)

    def durations(self, run_id: str) -> dict[str, float]:
        """Seconds that each task took, as Airflow has it."""
        found = self.client().tasks(TRAINING, run_id)
        return {name: round(task.duration_s or 0, 1) for name, task in found.items()}

    def fetch(self, run_id: str, home: Path) -> Workspace:
        """What a run left in the bucket, as a workspace."""
        settings = self.settings.model_copy(update={"home": home})
        SharedRun(settings, run_id).fetch()
        return workspace_of(settings, run_id)

    def perch(self, *words: str, **further: str) -> str:
        """A command on this machine; what it said."""
        done = subprocess.run(
            [tool("perch"), *words],
            env={**os.environ, **self._own_environment, **self.environment, **further},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"perch {' '.join(words)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    @property
    def _own_environment(self) -> dict[str, str]:
        return {
            "PERCH_HOME": str(self.settings.home),
            "PERCH_PROJECT_DIR": str(self.settings.project_dir),
            "PERCH_MLFLOW_URI": self.ports.mlflow_uri,
            "PERCH_AIRFLOW_URI": self.ports.airflow_uri,
        }

    def approve(self, version: str, limit_s: float = 120) -> str:
        """Answer for the approver; the id of the DAG run that asked."""
        deadline, seen = time.monotonic() + limit_s, AirflowApprovals(self.client())
        while not (asks := list(seen.open_asks("digits-classification", version))):
            assert time.monotonic() < deadline, f"nobody asks for an approval of v{version}"
            time.sleep(_PAUSE_S)
        time.sleep(3)  # an answer before Airflow has noticed the end of the process that asked may cost a try
        AirflowApprovals(self.client("approver")).answer(asks[0], approve=True, comment="looked at")
        return asks[0].run_id

    @contextmanager
    def without(self, program: str) -> Iterator[None]:
        """One of the services is away for the block."""
        supervisor = supervisor_proxy(self.stack.socket).supervisor
        supervisor.stopProcess(program)
        try:
            yield
        finally:
            supervisor.startProcess(program)

    def wait_for_checkpoint(self, run_id: str, limit_s: float = 600) -> str:
        """The name of the pod that trains, as soon as it has a checkpoint."""
        pods = self.cluster.run / "node/kubelet/pods"
        pattern = f"*/volumes/kubernetes.io~empty-dir/home/runs/{run_id}/checkpoints/training.ckpt"
        deadline = time.monotonic() + limit_s
        while not (found := next(pods.glob(pattern), None)):
            assert time.monotonic() < deadline, self.explain(TRAINING, run_id)
            time.sleep(0.02)
        uid = found.relative_to(pods).parts[0]
        (name,) = [
            pod["metadata"]["name"] for pod in self.pods(run_id, "model_training") if pod["metadata"]["uid"] == uid
        ]
        return str(name)

    def evict(self, pod: str) -> None:
        """By the API that drains a node, too."""
        body = {
            "apiVersion": "policy/v1beta1",  # which 1.20 knows; newer ones know v1
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": NAMESPACE},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        self.cluster.kubectl("create", f"--raw={path}", "--filename=-", given=json.dumps(body))

    def traffic(self) -> Traffic:
        """Clients who leave the machine's cores to what trains."""
        key, image = ensure_demo_key(self.settings), recorded_digits()[0]
        return Traffic(self.gateway.url, key, image, clients=2, pause_s=0.2)


@contextmanager
def training_rig(cluster: Cluster, image: str, pipeline_image: str, folder: Path) -> Iterator[TrainingRig]:
    """Install the chart and start what runs the DAGs.

    Args:
        cluster: of one node, which has both images.
        image: of the service.
        pipeline_image: of the steps.
        folder: new.
    """
    ports = Ports(mlflow=any_free_port(), airflow=any_free_port(), serving=any_free_port())
    postgresql_port = any_free_port()
    settings = Settings(
        project_dir=_project_for_one_core(folder / "project"),
        home=folder / "home",
        kubernetes_namespace=NAMESPACE,
        runs_url="s3://perch/runs",
        releases_url="s3://perch/releases",
        predictions_url="s3://perch/predictions",
        airflow_uri=ports.airflow_uri,
        mlflow_uri=ports.mlflow_uri,
    )
    with (
        serve_postgresql() as socket,
        reachable_from_pods(ports.mlflow, f"TCP:127.0.0.1:{ports.mlflow}"),
        reachable_from_pods(postgresql_port, f"UNIX-CONNECT:{socket}/.s.PGSQL.5432"),
        object_store("perch") as endpoint,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name in ("perch", "tuning"):
            make_database(socket, name)
        server = f"postgresql+psycopg://perch@{HOST_SEEN_FROM_PODS}:{postgresql_port}"
        databases = {"PERCH_DATABASE_URL": f"{server}/perch", "PERCH_TUNING_URL": f"{server}/tuning"}
        own = {"database_url": databases["PERCH_DATABASE_URL"], "tuning_url": databases["PERCH_TUNING_URL"]}
        settings = settings.model_copy(update={"s3_endpoint_url": endpoint, **own})
        account = {"name": LAUNCHER, "namespace": NAMESPACE}
        settings.home.mkdir()
        signing_key(settings, make=True)
        keys = {name: (settings.keys_dir / name).read_bytes() for name in ("release.pem", "release.pub")}
        objects = (
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
            secret(NAMESPACE, DATABASE, {name: url.encode() for name, url in databases.items()}),
            secret(NAMESPACE, SIGNING, keys),
        )
        repository, _, tag = pipeline_image.rpartition(":")
        chart = installed(
            cluster,
            settings,
            image,
            folder,
            account=LAUNCHER,
            objects=objects,
            images={"pipeline": {"repository": repository, "tag": tag}},
            mlflow={"externalUri": f"http://{HOST_SEEN_FROM_PODS}:{ports.mlflow}"},
            watchdog={"enabled": True},
            pipeline={"launchers": [account]},
            engine={"subjects": [account]},
        )
        with chart as stands:
            settings = stands.settings
            variables = {
                "PERCH_RUNNER": "kubernetes",
                "PERCH_TARGET": "kubernetes",
                "PERCH_PIPELINE_IMAGE": pipeline_image,
                "PERCH_KUBERNETES_NAMESPACE": NAMESPACE,
                "PERCH_KUBERNETES_RELEASE": RELEASE,
                "PERCH_POD_CONFIG_MAPS": f"{RELEASE}-settings",
                "PERCH_POD_SECRETS": f"{DATABASE} {OBJECT_STORE}",
                "PERCH_POD_SIGNING_SECRET": SIGNING,
                "PERCH_POD_STAGING_SECRET": OWN_KEYS,
                "PERCH_POD_SERVICE_ACCOUNT": f"{RELEASE}-pipeline",
                **databases,
                "PERCH_S3_ENDPOINT_URL": endpoint,
                "PERCH_RUNS_URL": settings.runs_url,
                "PERCH_RELEASES_URL": settings.releases_url,
                "PERCH_PREDICTIONS_URL": settings.predictions_url,
                "PERCH_CLIENTS_URL": settings.clients_url,
                "PERCH_PROMETHEUS_URL": settings.prometheus_url,
                "PERCH_STAGING_API_KEY": settings.staging_api_key,  # for steps that run here
                "PERCH_RETRY_DELAY_S": "1",
            }
            for name, value in variables.items():
                environment.setenv(name, value)  # the services inherit them
            stack = Stack(settings)
            try:
                stack.up(print, ports)
                yield TrainingRig(settings, variables, stack, ports, cluster, stands.gateway, socket)
            finally:
                stack.down()
                cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false", check=False)


def _project_for_one_core(folder: Path) -> Path:
    """The project's DAGs with pods that ask for one core, so that training fits on a node of two where others serve."""
    folder.mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(PROJECT / name, folder / name)
    shutil.copytree(PROJECT / "dags", folder / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    params["pods"] |= {"memory_mib": 3072, "disk_mib": 2048, "steps": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


@contextmanager
def reachable_from_pods(port: int, where: str) -> Iterator[None]:
    """Pass connections to a port of the node's side of this machine on to what listens for this machine alone."""
    program = shutil.which("socat")
    if program is None:
        miss("socat is missing", "the scripts that build Kubernetes install it")
    listen = f"TCP-LISTEN:{port},bind={HOST_SEEN_FROM_PODS},fork,reuseaddr"
    process = subprocess.Popen([program, listen, where], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        for child in (psutil.Process(process.pid), *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        process.wait(timeout=10)
