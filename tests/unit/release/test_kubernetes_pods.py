from typing import Any

import pytest

from pipelines.release.kubernetes_pods import (
    count_crashes,
    count_workers,
    current,
    explain_waiting,
    find_ended,
    ready_since,
    takes_requests,
    with_release,
)

DIGEST, OTHER = "5c" * 32, "6d" * 32
TERMINATED = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
RUNNING: dict[str, Any] = {"running": {"startedAt": "2026-11-21T10:00:00Z"}}
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}


def container(
    state: dict[str, Any], restarts: int = 0, last: dict[str, Any] | None = None, name: str = "serving"
) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "lastState": last or {},
        "restartCount": restarts,
        "ready": "running" in state,
    }


def pod(
    *containers: dict[str, Any], digest: str = DIGEST, ready: bool = True, server: str = "b", name: str = "pod-1"
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"perch/server": server}, "annotations": {"perch/release-digest": digest}},
        "spec": {"containers": [{"name": "serving", "env": [{"name": "PERCH_SERVING_WORKERS", "value": "2"}]}]},
        "status": {
            "phase": "Running",
            "conditions": [
                {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-11-21T10:00:05Z"},
            ],
            "containerStatuses": list(containers),
        },
    }


@pytest.mark.parametrize(
    ("status", "crashes"),
    [
        (container(RUNNING), 0),
        (container({"waiting": {"reason": "PodInitializing"}}), 0),
        (container(TERMINATED), 1),
        (container(RUNNING, 1, TERMINATED), 1),
        (container(TERMINATED, 1, TERMINATED), 2),
        (container(BACK_OFF, 2, TERMINATED), 3),
    ],
)
def test_count_crashes__container_ended__is_counted_once_before_and_after_its_restart(
    status: dict[str, Any], crashes: int
) -> None:
    assert count_crashes([pod(status), pod(container(RUNNING))]) == crashes


def test_count_crashes__pod_put_out_by_its_node__is_one() -> None:
    evicted = pod()
    evicted["status"] = {"phase": "Failed", "reason": "Evicted"}
    assert count_crashes([evicted]) == 1


def test_count_crashes__store_away_while_fetching__is_none() -> None:
    fetching = pod(container({"waiting": {"reason": "PodInitializing"}}))
    fetching["status"]["initContainerStatuses"] = [container(BACK_OFF, 3, {"terminated": {"exitCode": 75}}, "fetch")]
    assert count_crashes([fetching]) == 0
    assert find_ended([fetching]) is None


def test_takes_requests__two_releases_in_one_server__not_until_the_old_one_is_gone() -> None:
    new, old = pod(container(RUNNING)), pod(container(RUNNING), digest=OTHER)
    starting = pod(container(RUNNING), ready=False)
    assert takes_requests([new], DIGEST)
    assert takes_requests([new, starting], DIGEST)  # the autoscaler makes more
    assert not takes_requests([new, old], DIGEST)
    assert not takes_requests([starting], DIGEST)
    assert not takes_requests([], DIGEST)
    assert with_release([new, old], DIGEST) == [new]
    assert ready_since(starting) is None
    assert ready_since(new) == 1_795_255_205.0


def test_current__pods_of_another_server_or_being_ended__are_left_out() -> None:
    mine, other, ending = pod(), pod(server="a"), pod()
    ending["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    assert current([mine, other, ending], "serving-b") == [mine]


def test_find_ended__release_refused__is_found_at_the_first_end_with_where_its_words_are() -> None:
    refused = pod(ready=False)
    code = {"terminated": {"exitCode": 65}}
    refused["status"]["initContainerStatuses"] = [container(code, 0, None, "fetch")]
    found = find_ended([pod(container(RUNNING)), refused])
    assert found is not None
    assert (found.container, found.is_running_again) == ("fetch", False)
    refused["status"]["initContainerStatuses"] = [container(BACK_OFF, 1, code, "fetch")]
    found = find_ended([refused])
    assert found is not None
    assert found.is_running_again


def test_find_ended__ends_again_and_again__is_given_up_after_five() -> None:
    assert find_ended([pod(container(BACK_OFF, 5, TERMINATED))]) is None
    assert find_ended([pod(container(BACK_OFF, 6, TERMINATED))]) is not None
    assert find_ended([pod(container(RUNNING, 6, TERMINATED))]) is None  # it is ready now


def test_find_ended__store_away_for_longer_than_six_starts__is_waited_for() -> None:
    later = {"terminated": {"exitCode": 75}}
    fetching = pod(container({"waiting": {"reason": "PodInitializing"}}), ready=False)
    for states in ((BACK_OFF, later), (later, later), (RUNNING, later)):
        status = {**container(states[0], 9, states[1], "fetch"), "ready": False}
        fetching["status"]["initContainerStatuses"] = [status]
        assert find_ended([fetching]) is None
    full_disk = container(BACK_OFF, 9, later)
    assert find_ended([pod(full_disk, ready=False)]) is None


def test_explain_waiting__image_that_is_not_there__says_so_once() -> None:
    waiting = pod(container({"waiting": {"reason": "ErrImagePull", "message": "not found"}}), ready=False)
    assert explain_waiting([waiting, waiting]) == "serving: ErrImagePull not found"
    assert explain_waiting([]) == "no pod has been made yet"


def test_count_workers__as_the_container_is_told__or_none() -> None:
    assert count_workers([pod()]) == 2
    silent = pod()
    silent["spec"]["containers"][0]["env"] = [{"name": "PERCH_SERVING_WORKERS", "valueFrom": {}}]
    assert count_workers([silent]) == 0
