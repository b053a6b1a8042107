"""Finds pods of steps that Airflow no longer waits for, and removes them.

A task that is marked as failed or whose DAG run is deleted while its triggerer is away leaves its pod at work
(apache/airflow#37263, #62398).  Pods say whose they are by annotations, word for word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from pipelines.errors import PerchError, TryLater
from pipelines.services.airflow_access import open_airflow
from pipelines.settings import Settings

SELECTOR = "app.kubernetes.io/name=perch,app.kubernetes.io/component=pipeline,kubernetes_pod_operator=True"
# With these, a task has ended for good; in any other it waits for its pod, or the next try will go on with it.
_ENDED = {"success", "failed", "skipped", "upstream_failed", "removed"}
_SETTLING_S = 60.0  # between a pod's creation and what Airflow says of its task


@dataclass(frozen=True)
class StepPod:
    """A pod and the task that it belongs to.

    Attributes:
        name: of the pod.
        created: when.
        dag_id: of the task.
        run_id: of its DAG run.
        task_id: of the task.
        map_index: among mapped tasks, -1 where it is not mapped.
        try_number: whose pod it is.
    """

    name: str
    created: datetime
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    try_number: int

    @property
    def task(self) -> tuple[str, str, str, int]:
        """What the pods of several tries share."""
        return self.dag_id, self.run_id, self.task_id, self.map_index


@dataclass(frozen=True)
class Orphan:
    """A pod that nobody waits for.

    Attributes:
        pod: the pod.
        reason: why nobody does, for a person.
    """

    pod: StepPod
    reason: str


def clean_pods(settings: Settings, *, dry_run: bool = False) -> list[Orphan]:
    """Remove the pods that nobody waits for.

    Args:
        settings: name the namespace, and Airflow's address and user.
        dry_run: only look.

    Returns:
        What was found, and removed.

    Raises:
        TryLater: Airflow or the cluster does not answer; then nothing is removed on a guess.
    """
    cluster = _Cluster(settings)
    pods = [pod for document in cluster.pods() if (pod := read_pod(document)) is not None]
    airflow = open_airflow(settings)

    def state_of(pod: StepPod) -> str | None:
        path = f"/dags/{quote(pod.dag_id)}/dagRuns/{quote(pod.run_id)}/taskInstances/{quote(pod.task_id)}"
        path += f"/{pod.map_index}" if pod.map_index >= 0 else ""
        status, body = airflow.call("GET", path)
        if status == 404:
            return None
        if status != 200:
            raise PerchError(f"Airflow answered {status} to {path}: {str(body)[:300]}")
        return str(body["state"] or "")

    orphans = find_orphans(pods, state_of, datetime.now(UTC))
    if not dry_run:
        for orphan in orphans:
            cluster.remove(orphan.pod.name)
    return orphans


def find_orphans(pods: Iterable[StepPod], state_of: Callable[[StepPod], str | None], now: datetime) -> list[Orphan]:
    """Choose the pods that nobody waits for.

    Args:
        pods: of steps.
        state_of: the state of a pod's task in Airflow; None where there is no such task, empty before it is scheduled.
        now: aware; pods that were made within a minute are left alone.
    """
    pods = list(pods)
    latest: dict[tuple[str, str, str, int], int] = {}
    for pod in pods:
        latest[pod.task] = max(pod.try_number, latest.get(pod.task, 0))
    found = []
    for pod in pods:
        if (now - pod.created).total_seconds() < _SETTLING_S:
            continue
        if pod.try_number < latest[pod.task]:
            found.append(Orphan(pod, f"try {latest[pod.task]} has a pod of its own"))
            continue
        state = state_of(pod)
        if state is None:
            found.append(Orphan(pod, "Airflow knows no such task"))
        elif state in _ENDED:
            found.append(Orphan(pod, f"its task has ended: {state}"))
    return found


def read_pod(document: Mapping[str, Any]) -> StepPod | None:
    """A pod as the API tells it; None where it does not say whose it is, or is being removed already."""
    metadata = document["metadata"]
    said = metadata.get("annotations") or {}
    if metadata.get("deletionTimestamp") or "perch/task-id" not in said:
        return None
    return StepPod(
        name=metadata["name"],
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        dag_id=said["perch/dag-id"],
        run_id=said["perch/run-id"],
        task_id=said["perch/task-id"],
        map_index=int(said["perch/map-index"]),
        try_number=int(said["perch/try-number"]),
    )


class _Cluster:
    """The few calls of the Kubernetes API that this takes, by the rules of its official client."""

    def __init__(self, settings: Settings) -> None:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        try:
            config.load_config()
        except ConfigException as error:
            raise TryLater(f"Kubernetes: {error}\n  what to do: set KUBECONFIG, or run it in a pod") from error
        self._namespace = settings.kubernetes_namespace or _own_namespace()
        self._api = client.CoreV1Api()

    def pods(self) -> list[dict[str, Any]]:
        """Pods of steps, as documents."""
        from kubernetes.client import ApiClient
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            found = self._api.list_namespaced_pod(self._namespace, label_selector=SELECTOR, _request_timeout=30)
        except (ApiException, HTTPError) as error:
            raise TryLater(f"Kubernetes does not list the pods of {self._namespace}: {error}") from error
        documents: list[dict[str, Any]] = ApiClient().sanitize_for_serialization(found.items)
        return documents

    def remove(self, name: str) -> None:
        """Remove a pod, with the time it needs to hand over; one that is gone is fine."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            self._api.delete_namespaced_pod(name, self._namespace, _request_timeout=30)
        except ApiException as error:
            if error.status != 404:
                raise TryLater(f"Kubernetes does not remove pod {name}: {error}") from error
        except HTTPError as error:
            raise TryLater(f"Kubernetes does not answer: {error}") from error


def _own_namespace() -> str:
    """A pod's own namespace, else that of the kubeconfig's context."""
    from pathlib import Path

    from kubernetes import config

    file = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    _, active = config.list_kube_config_contexts()
    return str(active["context"].get("namespace") or "default")
