"""Finds pods of steps that Airflow no longer waits for, and removes them.

A task that is marked as failed or whose DAG run is deleted while its triggerer is away leaves its pod at work
(apache/airflow#37263, #62398).  A pod whose node does not answer any more is never seen to end, and its task waits on.
Pods say whose they are by annotations, word for word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from pipelines.errors import PerchError, TryLater
from pipelines.release.kubernetes_api import CORE, ClusterApi
from pipelines.services.airflow_access import open_airflow
from pipelines.settings import Settings

_SELECTOR = "app.kubernetes.io/name=perch,app.kubernetes.io/component=pipeline,kubernetes_pod_operator=True"
# With these, a task has ended for good; in any other it waits for its pod, or the next try will go on with it.
_ENDED = {"success", "failed", "skipped", "upstream_failed", "removed"}
_SETTLING_S = 60.0  # between a pod's creation and what Airflow says of its task
_LOST_AFTER_S = 300.0  # past the end of its grace: as long as a node may be silent before its pods are asked to end


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
        gone_by: when it should be gone, being removed; its grace is over then.
    """

    name: str
    created: datetime
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    try_number: int
    gone_by: datetime | None = None

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
        is_lost: it was asked to end, and its node says nothing.
    """

    pod: StepPod
    reason: str
    is_lost: bool = False


def clean_pods(settings: Settings, *, dry_run: bool = False) -> list[Orphan]:
    """Remove the pods that nobody waits for.

    Args:
        settings: name the namespace and the release of which they are, and Airflow's address and user.
        dry_run: only look.

    Returns:
        What was found, and removed.

    Raises:
        TryLater: Airflow or the cluster does not answer; then nothing is removed on a guess.
    """
    cluster = _Cluster(settings.kubernetes_namespace)
    # Another installation in the namespace has the same DAGs, and runs that this one's Airflow does not know.
    selector = f"{_SELECTOR},app.kubernetes.io/instance={settings.kubernetes_release}"
    pods = [pod for document in cluster.list_pods(selector) if (pod := read_pod(document)) is not None]
    airflow = open_airflow(settings)

    def state_of(pod: StepPod) -> str | None:
        path = f"/dags/{quote(pod.dag_id)}/dagRuns/{quote(pod.run_id)}/taskInstances/{quote(pod.task_id)}"
        path += f"/{pod.map_index}" if pod.map_index >= 0 else ""
        status, body = airflow.call("GET", path)
        if status == HTTPStatus.NOT_FOUND:
            # Another Airflow than the one that made the pod knows nothing of it either, and must not remove it.
            return None if airflow.call("GET", f"/dags/{quote(pod.dag_id)}")[0] == HTTPStatus.OK else ""
        if status != HTTPStatus.OK:
            raise PerchError(f"Airflow answered {status} to {path}: {str(body)[:300]}")
        return str(body["state"] or "")

    orphans = find_orphans(pods, state_of, datetime.now(UTC))
    if not dry_run:
        for orphan in orphans:
            cluster.remove_pod(orphan.pod.name, at_once=orphan.is_lost)
    return orphans


def find_orphans(pods: Iterable[StepPod], state_of: Callable[[StepPod], str | None], now: datetime) -> list[Orphan]:
    """Choose the pods that nobody waits for.

    Args:
        pods: of steps.
        state_of: the state of a pod's task in Airflow; None where there is no such task, empty before it is scheduled.
        now: aware; pods that were made within a minute are left alone, and so are those being removed, until five
            minutes past their time.
    """
    latest: dict[tuple[str, str, str, int], int] = {}
    found, staying = [], []
    for pod in pods:
        if pod.gone_by is None:
            staying.append(pod)
            latest[pod.task] = max(pod.try_number, latest.get(pod.task, 0))
        elif (late_s := (now - pod.gone_by).total_seconds()) > _LOST_AFTER_S:
            reason = f"it should have ended {late_s / 60:.0f} minutes ago, and its node does not say that it has"
            found.append(Orphan(pod, reason, is_lost=True))
    for pod in staying:
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
    """A pod as the API tells it; None where it does not say whose it is."""
    metadata = document["metadata"]
    said = metadata.get("annotations") or {}
    if "perch/task-id" not in said:
        return None
    gone_by = metadata.get("deletionTimestamp")  # when it was asked to end, and its grace
    return StepPod(
        name=metadata["name"],
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        dag_id=said["perch/dag-id"],
        run_id=said["perch/run-id"],
        task_id=said["perch/task-id"],
        map_index=int(said["perch/map-index"]),
        try_number=int(said["perch/try-number"]),
        gone_by=datetime.fromisoformat(gone_by) if gone_by else None,
    )


class _Cluster(ClusterApi):
    """The namespace of the steps' pods."""

    def remove_pod(self, name: str, *, at_once: bool) -> None:
        """Remove a pod, with the time it needs to hand over; one that is gone is fine.

        Args:
            name: of the pod.
            at_once: without that time, and without waiting for its node to say that it has ended.

        Raises:
            TryLater: the API does not answer, or does not let this account do it.
        """
        try:
            path = f"/{CORE}/namespaces/{self.namespace}/pods/{name}"
            self._call("DELETE", path, [("gracePeriodSeconds", "0")] if at_once else None)
        except TryLater as error:
            if getattr(error.__cause__, "status", None) != HTTPStatus.NOT_FOUND:
                raise
