"""What the status of pods says of a slot's service: does it take requests, has it crashed, was it refused; pure.

https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#PodStatus
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.errors import EXIT_REFUSED, EXIT_TRY_LATER

SERVER_LABEL = "perch/server"
DIGEST = "perch/release-digest"
_WORKERS = "PERCH_SERVING_WORKERS"
_MOST_STARTS = 5  # of a container in a pod that was not ready in between


@dataclass(frozen=True)
class EndedContainer:
    """A container that will not come up.

    Attributes:
        pod: its name.
        container: its name.
        is_running_again: whether its last words are those of the run before.
        reason: why it is given up.
    """

    pod: str
    container: str
    is_running_again: bool
    reason: str


def current(pods: Iterable[Mapping[str, Any]], process: str) -> list[Mapping[str, Any]]:
    """The pods of a process (`serving-a`) that are not being ended."""
    server = process.rpartition("-")[2]
    return [
        pod
        for pod in pods
        if pod["metadata"].get("labels", {}).get(SERVER_LABEL) == server
        and "deletionTimestamp" not in pod["metadata"]
        and pod.get("status", {}).get("phase") != "Succeeded"
    ]


def with_release(pods: Iterable[Mapping[str, Any]], digest: str) -> list[Mapping[str, Any]]:
    """Those that serve a release."""
    return [pod for pod in pods if pod["metadata"].get("annotations", {}).get(DIGEST) == digest]


def ready_since(pod: Mapping[str, Any]) -> float | None:
    """When a pod began to take requests, in seconds since the epoch; None where it does not."""
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition["type"] == "Ready" and condition["status"] == "True":
            return datetime.fromisoformat(condition["lastTransitionTime"]).timestamp()
    return None


def takes_requests(pods: Sequence[Mapping[str, Any]], digest: str) -> bool:
    """Whether a process answers, and with this release alone: during an exchange of releases it may be either."""
    ready = [pod for pod in pods if ready_since(pod) is not None]
    return bool(ready) and len(with_release(ready, digest)) == len(ready)


def count_crashes(pods: Iterable[Mapping[str, Any]]) -> int:
    """Containers that ended without being asked to, since their pods were made.

    A restart follows each end, at once or after a while; until it does, the end itself is counted.  What fetches the
    release before the service starts is left out: a store that is away is no crash.
    """
    count = 0
    for pod in pods:
        status = pod.get("status", {})
        ends = 0
        for container in status.get("containerStatuses") or ():
            state = container.get("state") or {}
            is_down = "terminated" in state or (
                "waiting" in state and "terminated" in (container.get("lastState") or {})
            )
            ends += int(container.get("restartCount", 0)) + is_down
        # Put out by the node, for want of memory or disk.
        count += max(ends, 1 if status.get("phase") == "Failed" else 0)
    return count


def find_ended(pods: Iterable[Mapping[str, Any]]) -> EndedContainer | None:
    """A container that was refused its release, or that ends again and again.

    One whose store or disk makes it end with "try again later" is neither, however often it does.
    """
    for pod in pods:
        status = pod.get("status", {})
        for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            states = [container.get("state") or {}, container.get("lastState") or {}]
            codes = [state["terminated"].get("exitCode") for state in states if "terminated" in state]
            restarts = int(container.get("restartCount", 0))
            is_again = "terminated" not in states[0] and "terminated" in states[1]
            name = pod["metadata"]["name"]
            if EXIT_REFUSED in codes:
                return EndedContainer(name, container["name"], is_again, "its release was refused")
            if restarts > _MOST_STARTS and not container.get("ready") and EXIT_TRY_LATER not in codes:
                return EndedContainer(name, container["name"], is_again, f"it ended {restarts} times")
    return None


def explain_waiting(pods: Iterable[Mapping[str, Any]]) -> str:
    """What pods wait for, as Kubernetes says it; one line each, the same only once."""
    lines: dict[str, None] = {}
    for pod in pods:
        status = pod.get("status", {})
        for condition in status.get("conditions") or ():
            if condition["status"] != "True" and condition.get("message"):
                lines[f"{condition['type']}: {condition['message']}"] = None
        for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            waiting = (container.get("state") or {}).get("waiting")
            if waiting:
                lines[f"{container['name']}: {waiting.get('reason', '')} {waiting.get('message', '')}".strip()] = None
    return "\n".join(lines) or "no pod has been made yet"


def count_workers(pods: Iterable[Mapping[str, Any]]) -> int:
    """Worker processes that each service is told to have; 0 where nothing tells."""
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for variable in container.get("env") or ():
                if variable["name"] == _WORKERS and str(variable.get("value", "")).isdigit():
                    return int(variable["value"])
    return 0
