"""The API server away while a step's pod is made, watched or judged: no try is lost, and no worker held for long."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import tenacity
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred

from pipelines.errors import EXIT_REFUSED
from pipelines.settings import get_settings
from tests.dags.test_stage_pods import CONTEXT, SETTINGS

NAME = "perch-trials-x"
PODS = f"/api/v1/namespaces/{SETTINGS['PERCH_KUBERNETES_NAMESPACE']}/pods"


class ApiServer:
    """Enough of one for a pod's life, at one address, which refuses connections while the server is stopped."""

    def __init__(self, kubeconfig: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.kubeconfig = kubeconfig
        self.pods: dict[str, dict[str, Any]] = {}
        self.answers_left = float("inf")  # then it is too busy
        self._server: ThreadingHTTPServer | None = None
        entry = {"cluster": {"server": f"http://127.0.0.1:{self.port}"}, "name": "c"}
        context = {"context": {"cluster": "c", "user": "u"}, "name": "x"}
        tree = {
            "clusters": [entry],
            "contexts": [context],
            "current-context": "x",
            "users": [{"name": "u", "user": {}}],
        }
        kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **tree}))

    def start(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                if path == PODS:
                    self.answer(200, {"kind": "PodList", "apiVersion": "v1", "items": list(api.pods.values())})
                elif path.startswith(PODS) and path.endswith("/log"):
                    self.answer(200, "")
                elif path.startswith(PODS):
                    self.answer_pod(path)
                else:
                    self.answer(200, {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": []})

            def do_POST(self) -> None:
                made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.pods[made["metadata"]["name"]] = made
                self.answer(201, made)

            def do_PATCH(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer_pod(self.path)

            def do_DELETE(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found = api.pods.pop(self.path.rpartition("/")[2], None)
                self.answer(200 if found else 404, found or {"kind": "Status", "code": 404})

            def answer_pod(self, path: str) -> None:
                found = api.pods.get(path.rpartition("/")[2])
                self.answer(200 if found else 404, found or {"kind": "Status", "code": 404})

            def answer(self, status: int, body: object) -> None:
                api.answers_left -= 1
                status = status if api.answers_left >= 0 else 503
                content = b"" if body == "" else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def has(self, phase: str, **state: dict[str, Any]) -> None:
        """The pod is in this phase, its container in this state."""
        container = {"name": "base", "image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": state}
        self.pods[NAME] = {
            "metadata": {"name": NAME, "namespace": SETTINGS["PERCH_KUBERNETES_NAMESPACE"], "labels": {}},
            "spec": {"containers": [{"name": "base"}]},
            "status": {"phase": phase, "containerStatuses": [container]},
        }

    def pod_runs(self) -> None:
        self.has("Running", running={"startedAt": "2026-11-01T02:00:00Z"})

    def pod_ended(self, exit_code: int) -> None:
        self.has("Failed" if exit_code else "Succeeded", terminated={"exitCode": exit_code})


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from airflow.providers.cncf.kubernetes.utils.pod_manager import PodManager

    from dags.dag_support import stage_pods

    for name, value in {**SETTINGS, "AIRFLOW_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    monkeypatch.setattr(stage_pods, "_AWAY_PAUSE_S", 0)
    of_operator = (KubernetesPodOperator.find_pod, KubernetesPodOperator._write_logs)
    for asked in (*of_operator, PodManager.read_pod, PodManager.create_pod):
        monkeypatch.setattr(asked.retry, "wait", tenacity.wait_none())
    server = ApiServer(tmp_path / "kubeconfig")
    yield server
    server.stop()
    get_settings.cache_clear()


def resumed(api: ApiServer) -> Any:
    """The operator as a worker makes it anew each time that a task goes on."""
    from dags.dag_support.trial_pods import TrialsPodOperator

    return TrialsPodOperator(
        task_id="trials", share={"share": 0, "of": 2}, kubernetes_conn_id=None, config_file=str(api.kubeconfig)
    )


def context(*, started_s_ago: float = 5.0) -> Any:
    task = SimpleNamespace(
        **vars(CONTEXT["ti"]),
        start_date=datetime.now(UTC) - timedelta(seconds=started_s_ago),
        xcom_push=lambda **_: None,
    )
    return {**CONTEXT, "ti": task}


def event(status: str, **further: Any) -> dict[str, Any]:
    said = {"status": status, "name": NAME, "namespace": SETTINGS["PERCH_KUBERNETES_NAMESPACE"], "message": "said so"}
    return {**said, "_perch_deferred_at": time.time() - 60, "_execution_deadline": time.time() + 3600, **further}


@pytest.mark.parametrize("status", ["error", "success", "failed"])
def test_pod__looked_at_while_the_api_server_is_away__is_watched_further(api: ApiServer, status: str) -> None:
    with pytest.raises(TaskDeferred) as deferred:
        resumed(api).trigger_reentry(context(), event(status))
    assert deferred.value.method_name == "trigger_reentry"
    assert deferred.value.trigger.pod_name == NAME  # type: ignore[attr-defined]
    api.start()
    api.pod_ended(0)
    resumed(api).trigger_reentry(context(), event("success"))
    assert not api.pods


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_pod__that_ended_before_the_api_server_was_busy__is_judged_once_it_answers(
    api: ApiServer, answers: int
) -> None:
    api.start()
    api.pod_ended(0)
    api.answers_left = answers
    with pytest.raises(TaskDeferred) as deferred:
        resumed(api).trigger_reentry(context(), event("success"))
    assert deferred.value.method_name == "trigger_reentry"
    api.answers_left = float("inf")
    resumed(api).trigger_reentry(context(), event("success"))


def test_pod__looked_at_after_its_tasks_time_with_the_api_server_away__is_given_up(api: ApiServer) -> None:
    with pytest.raises(AirflowException, match=NAME):
        resumed(api).trigger_reentry(context(), event("timeout", _execution_deadline=time.time() - 1))


@pytest.mark.timeout(60)  # a worker that watches would do so until the pod ends
def test_pod__after_many_outages__is_watched_further_without_a_worker(api: ApiServer) -> None:
    api.start()
    api.pod_runs()
    with pytest.raises(TaskDeferred) as deferred:
        resumed(api).trigger_reentry(context(), event("error", _redefer_count=3))
    assert deferred.value.trigger.trigger_kwargs["_redefer_count"] == 1  # type: ignore[attr-defined]


def test_pod__whose_watching_fails_at_once_each_time__is_not_watched_in_circles(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.start()
    api.pod_runs()
    operator = resumed(api)
    monkeypatch.setattr(operator, "_write_logs", lambda *_, **__: api.pod_ended(0))
    with pytest.raises(AirflowException, match="said so"):
        operator.trigger_reentry(context(), event("error", _redefer_count=3, _perch_deferred_at=time.time()))


def test_pod__to_be_made_while_the_api_server_is_away__is_made_when_it_is_back(api: ApiServer) -> None:
    with pytest.raises(TaskDeferred) as deferred:
        resumed(api).execute_async(context())
    go_on = getattr(resumed(api), deferred.value.method_name)
    api.start()
    with pytest.raises(TaskDeferred) as deferred:
        go_on(context(), event=datetime.now(UTC))
    assert deferred.value.method_name == "trigger_reentry"
    (name,) = api.pods
    assert deferred.value.trigger.pod_name == name  # type: ignore[attr-defined]


def test_pod__to_be_made_with_the_api_server_away_for_long__costs_a_try(api: ApiServer) -> None:
    with pytest.raises(Exception, match="refused"):
        resumed(api).execute_async(context(started_s_ago=1900))


def test_share__refused_in_its_pod__is_not_tried_again(api: ApiServer) -> None:
    api.start()
    api.pod_ended(EXIT_REFUSED)
    with pytest.raises(AirflowFailException, match="trials refused"):
        resumed(api).trigger_reentry(context(), event("failed"))


def test_share__failed_in_its_pod__is_tried_again(api: ApiServer) -> None:
    api.start()
    api.pod_ended(1)
    with pytest.raises(AirflowException) as caught:
        resumed(api).trigger_reentry(context(), event("failed"))
    assert not isinstance(caught.value, AirflowFailException)


@pytest.mark.slow
def test_task__api_server_away_for_longer_than_its_trigger_asks__ends_with_its_pod(api: ApiServer) -> None:
    """With the real trigger, which gives up after 48 s of refused connections."""
    api.pod_runs()

    def come_back() -> None:
        api.pod_ended(0)
        api.start()

    threading.Timer(75, come_back).start()
    said, watched = event("error"), 0
    while True:
        try:
            resumed(api).trigger_reentry(context(), said)
            break
        except TaskDeferred as deferred:
            watched += 1
            kind, words = type(deferred.trigger), deferred.trigger.serialize()[1]
            said = asyncio.run(anext(kind(**words).run())).payload  # type: ignore[attr-defined]
    assert watched >= 2
    assert said["status"] == "success"
    assert not api.pods
