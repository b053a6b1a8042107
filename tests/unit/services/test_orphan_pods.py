"""Which pods nobody waits for: told by their annotations and what Airflow says of their tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines.services.orphan_pods import StepPod, clean_pods, find_orphans, read_pod
from pipelines.settings import Settings

NOW = datetime(2026, 11, 1, 3, tzinfo=UTC)


def pod(name: str = "perch-x", *, tries: int = 1, age_s: float = 600, task: str = "model_training") -> StepPod:
    return StepPod(name, NOW - timedelta(seconds=age_s), "ml_training_pipeline", "run 1", task, -1, tries)


@pytest.mark.parametrize("state", ["success", "failed", "skipped", "upstream_failed", "removed"])
def test_pod__of_a_task_that_has_ended__is_an_orphan(state: str) -> None:
    (orphan,) = find_orphans([pod()], lambda _: state, NOW)
    assert orphan.reason == f"its task has ended: {state}"


@pytest.mark.parametrize("state", ["running", "deferred", "queued", "scheduled", "up_for_retry", "restarting", ""])
def test_pod__of_a_task_that_may_go_on_with_it__stays(state: str) -> None:
    assert find_orphans([pod()], lambda _: state, NOW) == []


def test_pod__of_a_run_that_was_deleted__is_an_orphan() -> None:
    (orphan,) = find_orphans([pod()], lambda _: None, NOW)
    assert orphan.reason == "Airflow knows no such task"


def test_pod__of_an_earlier_try__is_an_orphan_once_a_later_one_has_its_own() -> None:
    pods = [pod("first"), pod("second", tries=2), pod("other", task="model_evaluation")]
    assert [orphan.pod.name for orphan in find_orphans(pods, lambda _: "running", NOW)] == ["first"]


def test_pod__just_made__is_left_alone() -> None:
    assert find_orphans([pod(age_s=20)], lambda _: "failed", NOW) == []


def going(name: str, *, late_s: float, tries: int = 1) -> StepPod:
    return replace(pod(name, tries=tries), gone_by=NOW - timedelta(seconds=late_s))


def test_pod__whose_node_does_not_say_that_it_has_ended__is_lost_whatever_its_task_waits_for() -> None:
    (orphan,) = find_orphans([going("stuck", late_s=660)], lambda _: "deferred", NOW)
    assert orphan.is_lost
    assert orphan.reason == "it should have ended 11 minutes ago, and its node does not say that it has"


@pytest.mark.parametrize("late_s", [-30, 0, 299])
def test_pod__being_removed__is_given_its_time(late_s: float) -> None:
    assert find_orphans([going("ends", late_s=late_s)], lambda _: "failed", NOW) == []


def test_pod__being_removed__makes_no_orphan_of_another() -> None:
    pods = [going("later", late_s=10, tries=2), pod("earlier")]
    assert find_orphans(pods, lambda _: "running", NOW) == []


def test_orphan__whose_task_has_ended__is_given_the_time_to_hand_over() -> None:
    (orphan,) = find_orphans([pod()], lambda _: "failed", NOW)
    assert not orphan.is_lost


def test_pod__as_the_api_tells_it__is_read_by_its_annotations() -> None:
    document: dict[str, Any] = {
        "metadata": {
            "name": "perch-trials-ab",
            "creationTimestamp": "2026-11-01T02:50:00Z",
            "annotations": {
                "perch/dag-id": "ml_training_pipeline",
                "perch/run-id": "manual__2026-11-01T02:00+00:00",
                "perch/task-id": "trials",
                "perch/map-index": "3",
                "perch/try-number": "2",
            },
        }
    }
    read = read_pod(document)
    assert read is not None
    assert read.task == ("ml_training_pipeline", "manual__2026-11-01T02:00+00:00", "trials", 3)
    assert read.created == NOW - timedelta(minutes=10)
    assert read.gone_by is None
    document["metadata"]["deletionTimestamp"] = "2026-11-01T02:51:00Z"
    going = read_pod(document)
    assert going is not None
    assert going.gone_by == NOW - timedelta(minutes=9)
    assert read_pod({"metadata": {"name": "x", "creationTimestamp": "2026-11-01T02:50:00Z"}}) is None


def test_pods_clean__lost_pod__is_looked_for_by_its_installation_and_removed_without_its_nodes_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = {"dag-id": "d", "run-id": "r", "task-id": "t", "map-index": "-1", "try-number": "1"}
    times = {"creationTimestamp": "2026-11-01T02:50:00Z", "deletionTimestamp": "2026-11-01T02:51:00Z"}
    said = {f"perch/{name}": value for name, value in annotations.items()}
    asked: list[tuple[str, str, dict[str, list[str]]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            asked.append((self.command, url.path, parse_qs(url.query)))
            body = json.dumps({"items": [{"metadata": {"name": "perch-t-x", "annotations": said, **times}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_DELETE(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    named = {"clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}]}
    named |= {
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps({**named, "current-context": "x"}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    try:
        settings = Settings(
            kubernetes_namespace="ml",
            kubernetes_release="perch-two",
            airflow_uri="http://127.0.0.1:9",
            airflow_user="cleaner",
            airflow_password="secret",
        )
        (lost,) = clean_pods(settings)
    finally:
        server.shutdown()
        server.server_close()
    assert lost.is_lost
    (_, _, listed), (how, where, options) = asked
    assert "app.kubernetes.io/instance=perch-two" in listed["labelSelector"][0].split(",")
    assert (how, where) == ("DELETE", "/api/v1/namespaces/ml/pods/perch-t-x")
    assert options == {"gracePeriodSeconds": ["0"]}
