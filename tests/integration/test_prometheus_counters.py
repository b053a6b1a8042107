"""The target's one question to a real Prometheus, over two services that are looked at as pods would be."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines.release.prometheus_counters import (
    PodCounts,
    ask_prometheus,
    count_worker_crashes,
    counters_query,
    oldest_sample,
    read_answer,
)
from pipelines.services.stack import any_free_port
from serving.metrics import STARTED_VARIABLE, ServiceMetrics
from serving.metrics_endpoint import MetricsEndpoint

pytestmark = pytest.mark.services

DIGEST = "5c" * 32
# Two jobs find each pod, as where somebody's own job stands beside the operator's.
CONFIGURATION = """
global: {scrape_interval: 500ms, scrape_timeout: 500ms}
scrape_configs:
  - job_name: serving
    file_sd_configs: [{files: ["PODS"], refresh_interval: 200ms}]
  - job_name: annotated-pods
    file_sd_configs: [{files: ["PODS"], refresh_interval: 200ms}]
"""


@dataclass
class Pods:
    """Services, a Prometheus that finds them in a file, and its address."""

    url: str
    file: Path
    endpoints: dict[str, MetricsEndpoint] = field(default_factory=dict)
    metrics: dict[str, ServiceMetrics] = field(default_factory=dict)

    def start(self, name: str) -> ServiceMetrics:
        made = ServiceMetrics("digits", "3", "ab" * 32, ["0", "1"], release=DIGEST)
        self.metrics[name], self.endpoints[name] = made, MetricsEndpoint(made.render, 0, "127.0.0.1")
        self._write()
        return made

    def end(self, name: str) -> None:
        self.endpoints.pop(name).close()
        self._write()

    def _write(self) -> None:
        groups = [
            {"targets": [f"127.0.0.1:{known.port}"], "labels": {"namespace": "ml", "pod": name}}
            for name, known in self.endpoints.items()
        ]
        draft = self.file.with_suffix(".new")
        draft.write_text(json.dumps(groups))
        draft.replace(self.file)

    def ask(self, digest: str = DIGEST) -> PodCounts | None:
        query = counters_query("ml", "perch-serving-b", digest, age_s=60)
        return read_answer(ask_prometheus(self.url, query, 5))


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    program = shutil.which("prometheus")
    assert program, "prometheus is missing: scripts/debian-packages.sh installs it"
    file, port = tmp_path / "pods.json", any_free_port()
    (tmp_path / "prometheus.yml").write_text(CONFIGURATION.replace("PODS", str(file)))
    made = Pods(f"http://127.0.0.1:{port}", file)
    arguments = (f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        yield made
    finally:
        process.terminate()
        process.wait(timeout=30)
        for endpoint in made.endpoints.values():
            endpoint.close()


def wait_for(pods: Pods, is_so: Callable[[PodCounts], bool]) -> PodCounts:
    deadline, found = time.monotonic() + 60, None
    while time.monotonic() < deadline:
        try:
            found = pods.ask()
        except OSError:  # it has only just been started
            found = None
        if found is not None and is_so(found):
            return found
        time.sleep(0.1)
    pytest.fail(f"Prometheus says {found}")


def test_counters_query__pods_come_and_go__are_summed_never_fall_and_end_as_no_data(pods: Pods) -> None:
    for name in ("perch-serving-b-1", "perch-serving-b-2"):
        service = pods.start(name)
        for _ in range(3):
            service.observe_request("/v1/predict", 200, 0.02)
            service.observe_prediction("1", 0.9)
        service.observe_request("/v1/predict", 500, 0.1, "internal")
        service.observe_request("/v1/predict", 200, 0.02, is_probe=True)
    pods.start("perch-serving-a-1").observe_request("/v1/predict", 500, 0.1, "internal")  # another server's
    known = wait_for(pods, lambda found: found.counts.requests == 8)
    counts = known.counts
    assert (counts.errors, counts.client_errors, counts.labels["1"], counts.probes.requests) == (2, 0, 6, 2)
    assert counts.latency_buckets[0.025] == counts.latency_buckets[0.5] == 6
    assert known.sampled_at.keys() == {"perch-serving-b-1", "perch-serving-b-2"}
    assert abs(time.time() - min(known.sampled_at.values())) < 30
    assert pods.ask("6d" * 32) is None

    pods.end("perch-serving-b-1")
    after = wait_for(pods, lambda found: found.sampled_at.keys() == {"perch-serving-b-2"})
    assert after.counts == counts  # what it had counted stays
    pods.metrics["perch-serving-b-2"].observe_request("/v1/predict", 200, 0.02)
    wait_for(pods, lambda found: found.counts.requests == 9)

    ready = {"perch-serving-b-2": time.time() - 60}
    assert oldest_sample(after, ready, now=time.time(), max_age_s=30) is not None
    assert oldest_sample(after, {"perch-serving-b-3": time.time() - 60}, now=time.time(), max_age_s=30) is None
    pods.end("perch-serving-b-2")
    deadline = time.monotonic() + 60
    while pods.ask() is not None:  # counted once, looked at by nobody now
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_counters_query__container_starts_again_in_its_pod__counts_at_once_and_what_it_was_stays(
    pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "perch-serving-b-1"
    monkeypatch.setenv(STARTED_VARIABLE, "2026-11-22T10:00:00.000Z")
    service = pods.start(name)
    for _ in range(5):
        service.observe_request("/v1/predict", 200, 0.02)
        service.observe_prediction("1", 0.9)
    wait_for(pods, lambda found: found.counts.requests == 5)

    pods.end(name)
    monkeypatch.setenv(STARTED_VARIABLE, "2026-11-22T10:07:00.000Z")
    again = pods.start(name)
    again.observe_request("/v1/predict", 500, 0.1, "internal")
    known = wait_for(pods, lambda found: found.counts.requests == 6)
    assert (known.counts.errors, known.counts.labels["1"], known.counts.latency_buckets[0.025]) == (1, 5, 5)
    starts = {(name, "2026-11-22T10:00:00.000Z"): 1, (name, "2026-11-22T10:07:00.000Z"): 1}
    assert (known.worker_starts, count_worker_crashes(known, 1)) == (starts, 0)  # it is its pod's status that counts it
    assert known.sampled_at.keys() == {name}
