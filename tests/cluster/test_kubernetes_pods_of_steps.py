"""Pods of steps on a real API server: it takes them as they are rendered, and orphans among them are removed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import ApiClient

from pipelines.errors import TryLater
from pipelines.services import orphan_pods
from pipelines.services.orphan_pods import clean_pods
from pipelines.settings import Settings, get_settings
from tests.cluster.kubernetes_cluster import Cluster
from tests.dags.test_stage_pods import CONTEXT, SETTINGS

NAMESPACE = "steps"
RUN = CONTEXT["run_id"]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def namespace(control_plane: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    control_plane.apply(
        [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": SETTINGS["PERCH_POD_SERVICE_ACCOUNT"], "namespace": NAMESPACE},
            },
        ]
    )
    for name, value in {**SETTINGS, "PERCH_KUBERNETES_NAMESPACE": NAMESPACE, "AIRFLOW_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    get_settings.cache_clear()
    yield control_plane
    control_plane.kubectl("delete", "pods", "--all", f"--namespace={NAMESPACE}", "--force", "--grace-period=0")
    get_settings.cache_clear()


@pytest.fixture
def airflow() -> Iterator[dict[str, str]]:
    """Task to state, as an Airflow would answer; `address` is where."""
    states: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            task = self.path.rpartition("/taskInstances/")[2]
            body = json.dumps({"state": states.get(task)}).encode()
            is_dag = self.path.endswith("/dags/ml_training_pipeline")
            self.send_response(200 if is_dag or task in states else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    states["address"] = f"http://127.0.0.1:{server.server_port}"
    yield states
    server.shutdown()


def create(cluster: Cluster, stage: str, *, node: str = "", **changes: str) -> str:
    """A pod as the operator renders it, on that node without a scheduler; its name."""
    from dags.dag_support.stage_pods import StagePodOperator

    task = type(CONTEXT["ti"])(**{**vars(CONTEXT["ti"]), "task_id": stage})
    pod = StagePodOperator(stage=stage).build_pod_request_obj({**CONTEXT, "ti": task}, dry_run=True)
    document = ApiClient().sanitize_for_serialization(pod)
    document["metadata"]["annotations"].update(changes)
    if node:
        document["spec"]["nodeName"] = node
    made = json.loads(cluster.kubectl("create", "--output=json", "--filename=-", given=json.dumps(document)))
    return str(made["metadata"]["name"])


def settings_for(airflow: dict[str, str]) -> Settings:
    return Settings(airflow_uri=airflow["address"], airflow_user="cleaner", airflow_password="secret")


def test_pods__as_rendered__are_taken_by_the_api_server(namespace: Cluster) -> None:
    for stage in ("data_ingestion", "model_training", "model_packaging", "deploy_to_staging"):
        name = create(namespace, stage)
        assert namespace.read("pod", name, f"--namespace={NAMESPACE}")["status"]["qosClass"] == "Guaranteed"


def test_pods_clean__some_nobody_waits_for__removes_these_alone(
    namespace: Cluster, airflow: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphan_pods, "_SETTLING_S", 0.0)
    airflow |= {"data_ingestion": "failed", "model_training": "deferred", "model_evaluation": "up_for_retry"}
    ended, waited_for = create(namespace, "data_ingestion"), create(namespace, "model_training")
    earlier = create(namespace, "model_training", **{"perch/try-number": "1"})
    waiting, unknown = create(namespace, "model_evaluation"), create(namespace, "notify_team")
    settings = settings_for(airflow)
    assert {orphan.pod.name for orphan in clean_pods(settings, dry_run=True)} == {ended, earlier, unknown}
    assert {orphan.pod.name for orphan in clean_pods(settings)} == {ended, earlier, unknown}
    left = namespace.read("pods", f"--namespace={NAMESPACE}")["items"]
    assert {pod["metadata"]["name"] for pod in left if "deletionTimestamp" not in pod["metadata"]} == {
        waited_for,
        waiting,
    }
    assert clean_pods(settings) == []


def test_pods_clean__airflow_away__removes_nothing(
    namespace: Cluster, airflow: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphan_pods, "_SETTLING_S", 0.0)
    name = create(namespace, "data_ingestion")
    with pytest.raises(TryLater):
        clean_pods(settings_for({"address": "http://127.0.0.1:9"}))
    assert namespace.read("pod", name, f"--namespace={NAMESPACE}")["metadata"].get("deletionTimestamp") is None


def test_pods_clean__pod_of_another_installation__leaves_it_alone(
    namespace: Cluster, airflow: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphan_pods, "_SETTLING_S", 0.0)
    airflow |= {"data_ingestion": "failed"}
    own, settings = create(namespace, "data_ingestion"), settings_for(airflow)
    monkeypatch.setenv("PERCH_KUBERNETES_RELEASE", "perch-two")
    get_settings.cache_clear()
    create(namespace, "data_ingestion")
    assert [orphan.pod.name for orphan in clean_pods(settings)] == [own]


def test_pods_clean__pod_asked_to_end_on_a_node_that_does_not_answer__is_forgotten_at_once(
    namespace: Cluster, airflow: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.apply([{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "silent"}}])
    try:
        airflow |= {"model_training": "deferred"}
        name = create(namespace, "model_training", node="silent")
        namespace.kubectl("delete", "pod", name, f"--namespace={NAMESPACE}", "--grace-period=1", "--wait=false")
        settings = settings_for(airflow)
        assert clean_pods(settings) == []
        monkeypatch.setattr(orphan_pods, "_LOST_AFTER_S", -1.0)  # its grace has a second
        (lost,) = clean_pods(settings)
        assert (lost.pod.name, lost.is_lost) == (name, True)
        assert namespace.read("pods", f"--namespace={NAMESPACE}")["items"] == []
    finally:
        namespace.kubectl("delete", "node", "silent")
