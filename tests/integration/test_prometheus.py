"""A real Prometheus reads the service's metrics, loads the alert rules and answers every panel of the dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.services.stack import any_free_port
from serving.metrics import ServiceMetrics
from serving.metrics_endpoint import MetricsEndpoint

pytestmark = pytest.mark.services

FOLDER = Path(__file__).parents[2] / "helm/perch/files"
CONFIGURATION = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: perch
    static_configs: [{{targets: ["127.0.0.1:{port}"], labels: {{namespace: ml}}}}]
"""


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after a few scrapes of a service that was busy all the while."""
    program = shutil.which("prometheus")
    assert program, "prometheus is missing: scripts/debian-packages.sh installs it"
    folder = tmp_path_factory.mktemp("prometheus")
    metrics = ServiceMetrics("digits", "3", "ab" * 32, ["0", "1"], max_concurrent=64)
    metrics.set_ready(True)
    endpoint = MetricsEndpoint(metrics.render, 0, "127.0.0.1")
    (folder / "prometheus.yml").write_text(
        CONFIGURATION.format(rules=json.dumps(str(FOLDER / "serving-alerts.yaml")), port=endpoint.port)
    )
    port = any_free_port()
    arguments = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 60
        while _scrapes(server) < 4 or not _rules_are_evaluated(server):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            assert process.poll() is None, (folder / "log").read_text()
            for _ in range(20):
                metrics.observe_model(0.0002, 0.0004)
                metrics.observe_prediction("1", 0.97)
                metrics.observe_request("/v1/predict", 200, 0.004)
            metrics.observe_request("/v1/predict", 415, 0.001, "unsupported-media")
            metrics.observe_request("/v1/predict", 200, 0.004, is_probe=True)
            metrics.observe_request("/v1/predict", 422, 0.001, "unreadable-image", is_probe=True)
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
        endpoint.close()


def _scrapes(server: Prometheus) -> float:
    try:
        found = server.get("/api/v1/query", query="count_over_time(perch_model_info[1m])")["result"]
    except (OSError, urllib.error.URLError):
        return 0
    return float(found[0]["value"][1]) if found else 0


def _rules_are_evaluated(server: Prometheus) -> bool:
    rules = [rule for group in server.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    recorded = ("perch:predictions:share1h", "perch:predict_duration:p95_10m")
    return all(rule["health"] != "unknown" for rule in rules) and all(
        server.get("/api/v1/query", query=series)["result"] for series in recorded
    )


def _dashboard_queries() -> list[tuple[str, str]]:
    board = json.loads((FOLDER / "serving-dashboard.json").read_text())
    chosen = {"$__rate_interval": "10s", "$namespace": ".*", "$model": ".*"}
    queries = [
        (panel["title"], target["expr"])
        for panel in board["panels"]
        if panel["type"] != "row"
        for target in panel["targets"]
    ]
    queries.append(("annotations", board["annotations"]["list"][0]["expr"]))
    for name, value in chosen.items():
        queries = [(title, query.replace(name, value)) for title, query in queries]
    return queries


def test_prometheus__every_panel__has_something_to_show(prometheus: Prometheus) -> None:
    empty = []
    for title, query in _dashboard_queries():
        result = prometheus.get("/api/v1/query", query=query)["result"]
        if not result and title != "annotations":  # nothing fires
            empty.append((title, query))
    assert empty == []


def test_prometheus__the_rules__are_healthy_and_quiet(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["name"]: rule["state"] for rule in rules if rule.get("state", "inactive") != "inactive"} == {}


def test_prometheus__the_target__gives_no_trouble(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("/api/v1/targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_prometheus__what_it_recorded__is_what_was_observed(prometheus: Prometheus) -> None:
    (sample,) = prometheus.get("/api/v1/query", query="perch:predictions:share1h{label='1'}")["result"]
    assert sample["metric"] == {
        "__name__": "perch:predictions:share1h",
        "namespace": "ml",
        "model": "digits",
        "label": "1",
    }
    assert float(sample["value"][1]) == 1.0
    (p95,) = prometheus.get("/api/v1/query", query="perch:predict_duration:p95_10m")["result"]
    assert 0.0025 < float(p95["value"][1]) <= 0.005
