"""Metrics: exact counts, over worker processes that live and die, in a form Prometheus takes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.__main__ import STARTED_VARIABLE, server_environment
from serving.metrics import OTHER_ROUTE, ServiceMetrics
from serving.settings import ServingSettings

PROJECT = Path(__file__).parents[3]
WORKER = """
import sys
from serving.metrics import ServiceMetrics
metrics = ServiceMetrics("digits", "3", "ab" * 32, ["0", "1"], max_concurrent=64)
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


class Worker:
    """A process that holds metrics and does what it is told."""

    def __init__(self, directory: Path) -> None:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory), "PYTHONPATH": str(PROJECT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, expression: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        print(expression, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def render(self) -> str:
        return eval(self.do("metrics.render()")).decode()

    def kill(self) -> None:
        """Ends the process as a supervisor sees it at first: a zombie that still has its id."""
        self.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[type[Worker]]:
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker(tmp_path))
        return started[-1]

    yield start  # type: ignore[misc]
    for worker in started:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture
def metrics() -> ServiceMetrics:
    return ServiceMetrics("digits", "3", "ab" * 32, ["0", "1"], release="cd" * 32, max_concurrent=64)


def _value(text: str, name: str, **labels: str) -> float:
    """The sum of the samples with this name and these labels."""
    samples = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert samples, f"no {name}{labels}"
    return sum(samples)


def test_observe_request__route_that_a_client_made_up__is_counted_as_other(metrics: ServiceMetrics) -> None:
    for number in range(1000):
        metrics.observe_request(f"/wp-admin/{number}", 404, 0.001, "not-found")
    text = metrics.render().decode()
    assert _value(text, "perch_requests_total", route=OTHER_ROUTE, code="404") == 1000
    assert _value(text, "perch_problems_total", type="not-found") == 1000
    assert "wp-admin" not in text


def test_observe_request__durations__fall_on_the_two_promises(metrics: ServiceMetrics) -> None:
    for duration_s in (0.049, 0.051, 0.499, 0.501):
        metrics.observe_request("/v1/predict", 200, duration_s)
    text = metrics.render().decode()
    name = "perch_request_duration_seconds_bucket"
    assert _value(text, name, le="0.05", route="/v1/predict") == 1
    assert _value(text, name, le="0.5", route="/v1/predict") == 3


def test_render__before_any_request__shows_errors_as_zero(metrics: ServiceMetrics) -> None:
    text = metrics.render().decode()
    assert _value(text, "perch_requests_total", route="/v1/predict", code="500", model_version="3") == 0
    assert _value(text, "perch_problems_total", type="overloaded") == 0
    assert _value(text, "perch_predictions_total", label="1") == 0


def test_render__what_is_counted_elsewhere__is_caught_up_with(metrics: ServiceMetrics) -> None:
    class Log:
        backlog_rows, spooled_bytes, oldest_spooled_s = 7, 900, 12.5
        shipped_rows, dropped_rows, shipping_failures = 10, 2, 1

    log = Log()
    metrics.watch_prediction_log(log)
    metrics.watch_log(lambda: 5)
    metrics.render()
    log.dropped_rows = 6
    text = metrics.render().decode()
    assert _value(text, "perch_prediction_log_dropped_rows_total") == 6
    assert _value(text, "perch_prediction_log_shipped_rows_total") == 10
    assert _value(text, "perch_prediction_log_ship_failures_total") == 1
    assert _value(text, "perch_prediction_log_backlog_rows") == 7
    assert _value(text, "perch_prediction_log_oldest_seconds") == 12.5
    assert _value(text, "perch_log_lines_dropped_total") == 5


def test_start__requests_are_under_way__other_workers_show_them_soon(start_worker: type[Worker]) -> None:
    one, other = start_worker(), start_worker()
    one.do("metrics.start()")
    one.do("metrics.in_flight(3)")
    deadline = time.monotonic() + 30
    while _value(other.render(), "perch_requests_in_flight") != 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_render__several_workers__any_of_them_adds_all_up_at_once(start_worker: type[Worker]) -> None:
    one, other = start_worker(), start_worker()
    for worker in (one, other):
        worker.do("metrics.set_ready(True)")
        worker.do("metrics.observe_request('/v1/predict', 200, 0.004)")
        worker.do("metrics.observe_prediction('1', 0.97)")
    for text in (one.render(), other.render()):
        assert _value(text, "perch_requests_total", route="/v1/predict", code="200") == 2
        assert _value(text, "perch_request_duration_seconds_count", route="/v1/predict", code="200") == 2
        assert _value(text, "perch_prediction_confidence_bucket", le="0.95") == 0
        assert _value(text, "perch_ready_workers") == 2
        assert _value(text, "perch_requests_in_flight_limit") == 128
        assert _value(text, "perch_model_info", onnx_sha256="ab" * 32) == 1


def test_render__a_worker_was_killed__its_counts_stay_and_its_gauges_go(start_worker: type[Worker]) -> None:
    doomed, survivor = start_worker(), start_worker()
    for worker in (doomed, survivor):
        worker.do("metrics.set_ready(True)")
        worker.do("metrics.in_flight(1)")
        worker.do("metrics.observe_request('/v1/predict', 200, 0.004)")
        worker.render()
    doomed.kill()
    text = survivor.render()
    assert _value(text, "perch_requests_total", route="/v1/predict", code="200") == 2
    assert _value(text, "perch_requests_in_flight") == 1
    assert _value(text, "perch_ready_workers") == 1


def test_join__workers_that_die_again_and_again__leave_one_file_and_every_count(
    start_worker: type[Worker], tmp_path: Path
) -> None:
    for _ in range(4):
        worker = start_worker()
        worker.do("metrics.observe_request('/v1/predict', 500, 0.3, 'internal')")
        worker.do("metrics.observe_model(0.001, 0.002, 4)")
        worker.kill()
    last = start_worker()
    text = last.render()
    assert _value(text, "perch_requests_total", route="/v1/predict", code="500") == 4
    assert _value(text, "perch_request_duration_seconds_bucket", le="0.35", code="500") == 4
    assert _value(text, "perch_request_duration_seconds_bucket", le="0.2", code="500") == 0
    assert _value(text, "perch_batch_size_sum") == 16
    assert _value(text, "perch_worker_starts_total") == 5
    owners = sorted(file.stem.rpartition("_")[2] for file in tmp_path.glob("counter_*.db"))
    assert owners == sorted(["dead", str(last.process.pid)])


def test_render__file_that_a_worker_is_just_making__is_no_obstacle(start_worker: type[Worker], tmp_path: Path) -> None:
    observer = start_worker()
    observer.do("metrics.observe_request('/v1/predict', 200, 0.004)")
    (tmp_path / "counter_1.db").touch()
    assert _value(observer.render(), "perch_requests_total", code="200", route="/v1/predict") == 1
    start_worker().do("0")  # tidies
    assert _value(observer.render(), "perch_requests_total", code="200", route="/v1/predict") == 1


def test_render__workers_die_and_start_while_it_is_asked__no_count_ever_falls_or_counts_twice(
    start_worker: type[Worker],
) -> None:
    """A count that falls is a restart to Prometheus, which would add the whole of it to the rate."""
    observer = start_worker()
    seen: list[float] = []
    over = threading.Event()

    def observe() -> None:
        while not over.is_set():
            seen.append(_value(observer.render(), "perch_requests_total", code="200", route="/v1/predict"))

    observing = threading.Thread(target=observe)
    observing.start()
    try:
        for _ in range(6):
            worker = start_worker()
            worker.do("metrics.observe_request('/v1/predict', 200, 0.004)")
            worker.kill()
        start_worker().do("0")
    finally:
        over.set()
        observing.join()
    assert len(seen) > 20
    assert seen == sorted(seen)
    assert max(seen) == 6


def test_observations__of_one_prediction__cost_little(tmp_path: Path) -> None:
    """10 µs where the decoder and the model take 500; the limit leaves room for a busy machine."""
    code = """
import time
from serving.metrics import ServiceMetrics
metrics = ServiceMetrics("digits", "3", "ab" * 32, [str(label) for label in range(10)])
best = 1.0
for _ in range(20):
    started = time.perf_counter()
    for _ in range(500):
        metrics.in_flight(1)
        metrics.observe_model(0.0002, 0.0004)
        metrics.observe_prediction("7", 0.97)
        metrics.observe_request("/v1/predict", 200, 0.0032)
        metrics.in_flight(-1)
    best = min(best, (time.perf_counter() - started) / 500)
print(best * 1e6)
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert float(done.stdout) < 40


def test_render__service_started_by_its_entry__counters_say_since_when_and_gauges_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    for _ in range(2):
        started = server_environment(ServingSettings(), tmp_path)[STARTED_VARIABLE]
        monkeypatch.setenv(STARTED_VARIABLE, started)
        text = ServiceMetrics("digits", "3", "ab" * 32, ["0"]).render().decode()
        assert _value(text, "perch_requests_total", started=started, route="/v1/predict", code="500") == 0
        assert _value(text, "perch_batch_size_bucket", started=started, le="8.0") == 0
        gauges = [line for line in text.splitlines() if line.startswith(("perch_model_info", "perch_ready_workers"))]
        assert len(gauges) == 2
        assert not any("started" in line for line in gauges)
        seen.append(started)
        time.sleep(0.002)
    assert seen[0] < seen[1]


def test_render__to_promtool__is_well_formed(start_worker: type[Worker]) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: scripts/debian-packages.sh installs it (package prometheus)"
    worker = start_worker()
    worker.do("metrics.observe_request('/v1/predict', 200, 0.004)")
    done = subprocess.run([promtool, "check", "metrics"], input=worker.render(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_metrics_page__its_table__is_what_the_service_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED_VARIABLE, "2026-11-22T10:00:00.000Z")
    metrics = ServiceMetrics("digits", "3", "ab" * 32, ["0", "1"], release="cd" * 32)
    metrics.observe_request("/v1/predict", 200, 0.004)
    metrics.observe_request("/v1/predict", 200, 0.004, is_probe=True)
    shown = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le", "model", "model_version"}
        assert ("started" in labels) == (family.type != "gauge")
        shown[name] = (family.type, labels - {"started"})
    page = (PROJECT / "docs/reference/metrics.md").read_text()
    rows = re.findall(r"^\| `(perch_\w+)` \| (\w+) \| ([^|]*) \|", page, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == shown
