"""`docker/compose.yaml` on a Docker Engine, as docs/runbooks/one-server.md goes; each test goes on from the last.

The images of others are stand-ins of Debian's packages (`stand_ins/`).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import httpx
import pytest

from pipelines.services.demo_release import recorded_digits
from tests.compose.engine import PROJECT, Server, wait_for

pytestmark = pytest.mark.compose

TRAINING = "ml_training_pipeline"
CLIENTS = "http://127.0.0.1:3000"
KEYS = "/var/lib/perch/serving/api-keys.json"
SLOTS_LIMIT_S = 60.0
"""Without answers where `slots`, or all of it, begins anew; ADR 33 says seconds, on a machine that is not busy."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server, up and healthy, with steps of a release that a test can wait for."""
    server = Server()
    server.run("bash", "docker/one-server/make-env.sh", server.image)
    params = server.checkout / "params.yaml"
    text = params.read_text()
    for name, value in {"min_step_s": "20", "max_step_s": "600", "max_error_rate": "0.02", "epochs": "12"}.items():
        text, count = re.subn(rf"^(  {name}: )\S+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count == 1, name
    params.write_text(text)
    try:
        server.compose("up", "--detach")
        wait_for("all is healthy", lambda: not server.unwell(), 300)
        yield server
    finally:
        print(server.compose("ps", "--all"), server.compose("logs", "--tail", "15", "--no-color"))
        server.compose("down", "--volumes")


@pytest.fixture(scope="module")
def key(server: Server) -> str:
    """An API key, by the runbook's command."""
    return server.compose("exec", "-T", "slots", "perch", "api-keys", "add", "clinic", "--file", KEYS).split()[0]


@contextmanager
def clients(key: str, per_s: float = 10) -> Iterator[Counter[Any]]:
    """Answers by status and model version while the block lasts."""
    answers: Counter[Any] = Counter()
    end = Event()

    def send() -> None:
        bodies = recorded_digits()[-200:]
        with httpx.Client(base_url=CLIENTS, headers={"X-API-Key": key}, timeout=10) as client:
            while not end.wait(1 / per_s):
                body = bodies[answers.total() % len(bodies)]
                try:
                    answer = client.post("/v1/predict", content=body, headers={"Content-Type": "image/png"})
                    answers[answer.status_code, answer.json().get("model", {}).get("version")] += 1
                except httpx.TransportError as error:
                    answers[type(error).__name__, None] += 1

    thread = Thread(target=send, daemon=True)
    thread.start()
    try:
        yield answers
    finally:
        end.set()
        thread.join(timeout=30)


def served(key: str) -> str | None:
    """The version that answers a client, if one does."""
    answer = httpx.post(
        f"{CLIENTS}/v1/predict", content=recorded_digits()[0], headers={"X-API-Key": key, "Content-Type": "image/png"}
    )
    return answer.json()["model"]["version"] if answer.status_code == httpx.codes.OK else None


def train(server: Server, conf: dict[str, Any]) -> None:
    """A run of the training DAG, to its end."""
    airflow = server.airflow("scientist")
    started = airflow.post(f"/api/v2/dags/{TRAINING}/dagRuns", json={"logical_date": None, "conf": conf})
    run = started.raise_for_status().json()["dag_run_id"]

    def state() -> str:
        known = airflow.get(f"/api/v2/dags/{TRAINING}/dagRuns/{run}").raise_for_status().json()["state"]
        return str(known) if known in {"success", "failed"} else ""

    assert wait_for("the training ends", state, 1500, every_s=5) == "success"


def approve(server: Server) -> None:
    """As the approver, on Airflow's page."""
    approver = server.airflow("approver")

    def ask() -> dict[str, Any] | None:
        found = approver.get("/api/v2/dags/~/dagRuns/~/hitlDetails", params={"response_received": False})
        return next(iter(found.raise_for_status().json()["hitl_details"]), None)

    task = wait_for("an approval is asked for", ask, 300)["task_instance"]
    answered = approver.patch(
        f"/api/v2/dags/{task['dag_id']}/dagRuns/{task['dag_run_id']}/taskInstances/{task['task_id']}/-1/hitlDetails",
        json={"chosen_options": ["Approve"], "params_input": {}},
    )
    answered.raise_for_status()


def test_up__a_new_server__has_its_pages_its_rules_and_no_model(server: Server) -> None:
    assert httpx.get(f"{CLIENTS}/readyz").status_code == httpx.codes.SERVICE_UNAVAILABLE
    for address in ("8080/api/v2/version", "5000/health", "3001/api/health", "9093/-/ready"):
        assert httpx.get(f"http://127.0.0.1:{address}").status_code == httpx.codes.OK, address
    groups = httpx.get("http://127.0.0.1:9090/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert "PerchServingDown" in {rule["name"] for rule in rules}
    assert server.airflow("admin").get("/api/v2/importErrors").json()["total_entries"] == 0
    asked = ["docker", "inspect", "--format", "{{.HostConfig.Memory}} {{.HostConfig.OomScoreAdj}}"]
    said = server.run(*asked, "perch-airflow-scheduler-1", "perch-mlflow-1", "perch-postgres-1").splitlines()
    assert said == [f"{6 << 30} 500", f"{2 << 30} 0", "0 0"]


def test_names__that_people_use__lead_containers_to_the_same_pages(server: Server) -> None:
    code = "import urllib.request as r; [r.urlopen(u, timeout=20) for u in ('http://mlflow.localhost:5000/health', 'http://airflow.localhost:8080/api/v2/version')]"
    server.compose("exec", "-T", "airflow-scheduler", "python", "-c", code)


def test_first_release__trained_and_approved__answers_clients(server: Server, key: str) -> None:
    train(server, {})
    approve(server)
    assert wait_for("the release answers", lambda: served(key), 600) == "1"


def test_second_release__under_requests__goes_through_shadow_and_canary_without_a_failed_one(
    server: Server, key: str
) -> None:
    with clients(key) as answers:
        train(server, {"model_training.learning_rate": 0.004})
        approve(server)
        wait_for("the second version alone answers", lambda: {served(key) for _ in range(20)} == {"2"}, 1200, 10)
    assert {status for status, _ in answers} == {httpx.codes.OK}
    assert {version for _, version in answers} == {"1", "2"}
    targets = httpx.get("http://127.0.0.1:9090/api/v1/targets").json()["data"]["activeTargets"]
    up = {target["labels"].get("server") for target in targets if target["health"] == "up"}
    assert up & {"a", "b"}


@pytest.mark.parametrize("name", ["airflow-scheduler", "watchdog", "mlflow", "prometheus", "postgres", "store"])
def test_restart__of_a_part_that_does_not_serve__fails_no_request(server: Server, key: str, name: str) -> None:
    with clients(key) as answers:
        server.compose("restart", name)
        wait_for("all is healthy again", lambda: not server.unwell(), 300)
    assert set(answers) == {(httpx.codes.OK, "2")}


@pytest.mark.parametrize("name", ["envoy", "slots", "loopback"])
def test_restart__of_a_part_that_serves__is_a_pause(server: Server, key: str, name: str) -> None:
    server.compose("restart", name)
    began = time.monotonic()
    assert wait_for("it answers again", lambda: served(key), SLOTS_LIMIT_S, 0.2) == "2"
    print(f"{name}: {time.monotonic() - began:.1f} s until it answered")
    wait_for("all is healthy again", lambda: not server.unwell(), 300)


def test_start_of_docker__containers_all_at_once__are_put_in_order_by_the_unit(server: Server, key: str) -> None:
    """Those that share a network which is not there yet fail, and Docker does not try again."""
    (command,) = re.findall(
        r"^ExecStart=(.*)$", (server.checkout / "docker/one-server/perch.service").read_text(), re.MULTILINE
    )
    server.run("pkill", "-KILL", "dockerd")
    wait_for("Docker is up again", lambda: server.answers("docker", "version"), 120)
    server.run(*command.replace("/opt/perch", PROJECT).split())
    assert wait_for("it answers again", lambda: served(key), SLOTS_LIMIT_S) == "2"
    wait_for("all is healthy again", lambda: not server.unwell(), 300)


def test_down_and_up__with_its_volumes__serves_the_same_release(server: Server, key: str) -> None:
    server.compose("down")
    server.compose("up", "--detach")
    assert wait_for("it answers again", lambda: served(key), 300) == "2"
    wait_for("all is healthy again", lambda: not server.unwell(), 300)
