"""What the service counts and times, for Prometheus; one answer speaks for all worker processes.

Each worker writes its numbers into memory-mapped files below `PROMETHEUS_MULTIPROC_DIR` (BentoML sets it before
workers start), and whichever worker is asked adds them up.  Numbers are written at once, so that a killed worker
loses none: an observation costs 0.7 µs, all of a prediction's about 10 µs (benchmark in `tests/unit/serving`).

Counters and histograms say which start of the service they count from (`started`), where the environment does: what is
started again in its pod counts from zero under labels of its own, so that whoever adds up all starts adds up all of it.

Names, labels and meanings are documented in docs/reference/metrics.md.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from serving.metrics_files import join, live_metrics
from serving.problems import ALL as PROBLEM_TYPES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "perch_"
STARTED_VARIABLE = "PERCH_SERVICE_STARTED"  # set by serving/__main__.py, before there are workers
_SINCE_THE_START = frozenset({"counter", "histogram"})
API_ROUTES = ("/v1/predict", "/v1/predict/batch", "/v1/explain", "/v1/feedback", "/v1/model")
ROUTES = (*API_ROUTES, "/v1/openapi.json", "/livez", "/readyz", "/metrics")
OTHER_ROUTE = "other"  # whatever a client makes up is one value: labels are bounded

# 0.05 s and 0.5 s are the two promises made to users (bench and alert), so they are boundaries.
REQUEST_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
STEP_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

_REFRESH_S = 1.0


class PredictionLogCounters(Protocol):
    """What the prediction log counts about itself, in this process."""

    @property
    def backlog_rows(self) -> int:
        """Predictions of this process not yet on the disk."""

    @property
    def spooled_bytes(self) -> int:
        """Bytes that wait on the local disk, of all workers together."""

    @property
    def oldest_spooled_s(self) -> float:
        """Seconds that the oldest of them has waited, of all workers together."""

    @property
    def shipped_rows(self) -> int:
        """Predictions stored since the start."""

    @property
    def dropped_rows(self) -> int:
        """Predictions lost since the start."""

    @property
    def shipping_failures(self) -> int:
        """Attempts to ship that failed since the start."""


class ServiceMetrics:
    """The metrics of one worker, bound to the model that it serves.

    Attributes:
        content_type: of what `render` gives.

    Args:
        model: the registered model's name.
        version: its version, the label `model_version`.
        onnx_sha256: hex digest of the ONNX file.
        labels: the model's class names; each is a value of the label `label`.
        release: hex digest of the release, empty outside one.
        routes: addresses that are counted under their own name; any other is `other`.
        max_concurrent: requests that this worker handles at once.
    """

    content_type = CONTENT_TYPE

    def __init__(
        self,
        model: str,
        version: str,
        onnx_sha256: str,
        labels: Sequence[str],
        *,
        release: str = "",
        routes: Iterable[str] = ROUTES,
        max_concurrent: int = 0,
    ) -> None:
        disable_created_metrics()
        self._directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")
        self._started = os.environ.get(STARTED_VARIABLE, "")
        self._sign_of_life = join(self._directory) if self._directory else None
        self._routes = frozenset(routes)
        self._registry = CollectorRegistry()
        self._of_model = (model, version)
        self._process = psutil.Process()
        self._in_flight = 0
        self._prediction_log: PredictionLogCounters | None = None
        self._log_lines_dropped: Callable[[], int] = int
        self._seen: dict[str, int] = {}
        self._refreshing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

        self._define_requests()
        self._define_predictions(labels)
        self._define_prediction_log()
        self._define_process(onnx_sha256, release, max_concurrent)

    def _define_requests(self) -> None:
        self._of_clients = self._define_requests_of("", "Requests")
        for route in API_ROUTES:  # a counter that begins at 0 shows its first error; one that appears at 1 does not
            for code in ("200", "500", "503"):
                self._of_clients.requests.labels(*self._of_model, route, code)
        # Apart, so that no rate, quantile or alert over clients' requests has to leave them out.
        self._of_prober = self._define_requests_of("probe_", "The prober's requests")

    def _define_requests_of(self, prefix: str, whose: str) -> _Requests:
        problems = self._counter(f"{prefix}problems", f"{whose} answered with a problem, by its type.", "type")
        return _Requests(
            self._of_model,
            self._counter(f"{prefix}requests", f"{whose} answered.", "route", "code"),
            self._histogram(
                f"{prefix}request_duration_seconds",
                f"Time from a request's arrival to its answer: {whose.lower()}.",
                REQUEST_BUCKETS_S,
                "route",
                "code",
            ),
            {kind.slug: problems.labels(*self._of_model, kind.slug) for kind in PROBLEM_TYPES},
        )

    def _define_predictions(self, labels: Sequence[str]) -> None:
        self._queue = self._histogram(
            "queue_duration_seconds", "Time a decoded image waits for the model.", STEP_BUCKETS_S
        ).labels(*self._of_model)
        self._model = self._histogram(
            "model_duration_seconds", "Time of one call of the model.", STEP_BUCKETS_S
        ).labels(*self._of_model)
        self._batch = self._histogram("batch_size", "Images in one call of the model.", BATCH_BUCKETS).labels(
            *self._of_model
        )
        predictions = self._counter("predictions", "Predictions, by the label that was predicted.", "label")
        self._predictions = {label: predictions.labels(*self._of_model, label) for label in labels}
        self._confidence = self._histogram(
            "prediction_confidence", "Probability of the predicted label.", CONFIDENCE_BUCKETS
        ).labels(*self._of_model)

    def _define_prediction_log(self) -> None:
        self._backlog = self._gauge("prediction_log_backlog_rows", "Predictions in memory, not yet in the spool.")
        # The spool is one folder for all workers: each sees all of it.
        self._spooled = self._gauge(
            "prediction_log_spooled_bytes", "Bytes of predictions that wait in the spool to be stored.", "livemax"
        )
        self._oldest = self._gauge(
            "prediction_log_oldest_seconds", "Time that the oldest file of the spool has waited.", "livemax"
        )
        self._shipped = self._counter("prediction_log_shipped_rows", "Predictions brought to the store.").labels(
            *self._of_model
        )
        self._lost = self._counter(
            "prediction_log_dropped_rows", "Predictions given up: memory or spool full, or unreadable."
        ).labels(*self._of_model)
        self._ship_failures = self._counter(
            "prediction_log_ship_failures", "Attempts to ship predictions that failed."
        ).labels(*self._of_model)

    def _define_process(self, onnx_sha256: str, release: str, max_concurrent: int) -> None:
        self._in_flight_gauge = self._gauge("requests_in_flight", "Requests being handled.")
        limit = self._gauge("requests_in_flight_limit", "Requests that may be handled at once; more get 503.")
        limit.set(max_concurrent)
        self._ready = self._gauge("ready_workers", "Workers that have warmed up and take requests.")
        self._startup = self._gauge(
            "worker_startup_seconds", "Time from a worker's start to its readiness; the slowest worker's.", "livemax"
        )
        self._memory = self._gauge("worker_resident_memory_bytes", "Resident memory of all workers.")
        starts = self._counter("worker_starts", "Worker processes started.")
        starts.labels(*self._of_model).inc()
        self._log_drops = self._counter(
            "log_lines_dropped", "Log lines lost because standard output did not take them."
        ).labels(*self._of_model)
        info = Gauge(
            f"{PREFIX}model_info",
            "The model that is served; always 1.",
            ("model", "model_version", "onnx_sha256", "release"),
            multiprocess_mode="livemax",
            registry=self._registry,
        )
        info.labels(*self._of_model, onnx_sha256, release).set(1)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}{name}", meaning, ("model", "model_version", *labels), registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
        names = ("model", "model_version", *labels)
        return Histogram(f"{PREFIX}{name}", meaning, names, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, meaning: str, mode: Literal["livesum", "livemax"] = "livesum") -> Gauge:
        gauge = Gauge(
            f"{PREFIX}{name}",
            meaning,
            ("model", "model_version"),
            multiprocess_mode=mode,
            registry=self._registry,
        )
        return gauge.labels(*self._of_model)

    # The hot path: children are bound beforehand, a call is a few dictionary look-ups and memory writes.

    def observe_request(
        self, route: str, status: int, duration_s: float, problem: str = "", *, is_probe: bool = False
    ) -> None:
        """Counts an answered request.

        Args:
            route: the address as the service knows it, e.g. `/v1/predict`.
            status: HTTP status code.
            duration_s: seconds from arrival to answer.
            problem: slug of the problem type it was answered with, if any.
            is_probe: whether it was the prober's, which is no client.
        """
        requests = self._of_prober if is_probe else self._of_clients
        total, duration = requests.bound.get((route, status)) or self._bind(requests, route, status)
        total.inc()
        duration.observe(duration_s)
        if problem and problem in requests.problems:
            requests.problems[problem].inc()

    def _bind(self, requests: _Requests, route: str, status: int) -> tuple[Counter, Histogram]:
        if route not in self._routes:
            route = OTHER_ROUTE
        key = (route, status)
        if key not in requests.bound:
            values = (*requests.of_model, route, str(status))
            requests.bound[key] = (requests.requests.labels(*values), requests.durations.labels(*values))
        return requests.bound[key]

    def observe_prediction(self, label: str, confidence: float) -> None:
        """Counts a prediction; `confidence` is the probability of `label`, 0 to 1."""
        self._predictions[label].inc()
        self._confidence.observe(confidence)

    def observe_model(self, queue_s: float, model_s: float, batch_size: int = 1) -> None:
        """Times one call of the model.

        Args:
            queue_s: seconds that its images waited.
            model_s: seconds that the call took.
            batch_size: how many images went in.
        """
        self._queue.observe(queue_s)
        self._model.observe(model_s)
        self._batch.observe(batch_size)

    def in_flight(self, change: int) -> None:
        """A request has begun (+1) or ended (-1).  From the event loop's thread only; shown within a second."""
        self._in_flight += change

    # What is read now and then.

    def set_ready(self, ready: bool) -> None:
        """The worker takes requests, or takes no more."""
        self._ready.set(int(ready))
        if ready:
            self._startup.set(time.time() - self._process.create_time())

    def watch_prediction_log(self, log: PredictionLogCounters) -> None:
        """Shows the prediction log's counters from now on."""
        self._prediction_log = log

    def watch_log(self, lines_dropped: Callable[[], int]) -> None:
        """Shows how many log lines were lost since the start."""
        self._log_lines_dropped = lines_dropped

    def start(self) -> None:
        """Begins to refresh, every second, what other workers show of this one."""
        self._thread = threading.Thread(target=self._refresh_until_stopped, name="perch-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Shows the last numbers and takes this worker out of the gauges."""
        self._stopped.set()
        if self._thread:
            self._thread.join(timeout=_REFRESH_S)
        self._in_flight = 0
        self.refresh()
        self._ready.set(0)

    def _refresh_until_stopped(self) -> None:
        while not self._stopped.wait(_REFRESH_S):
            self.refresh()

    def refresh(self) -> None:
        """Copies what is counted elsewhere in this process into the metrics."""
        with self._refreshing:
            self._in_flight_gauge.set(self._in_flight)
            self._memory.set(self._process.memory_info().rss)
            self._catch_up("log lines", self._log_drops, self._log_lines_dropped())
            if (log := self._prediction_log) is not None:
                self._backlog.set(log.backlog_rows)
                self._spooled.set(log.spooled_bytes)
                self._oldest.set(log.oldest_spooled_s)
                self._catch_up("shipped rows", self._shipped, log.shipped_rows)
                self._catch_up("dropped rows", self._lost, log.dropped_rows)
                self._catch_up("ship failures", self._ship_failures, log.shipping_failures)

    def _catch_up(self, name: str, counter: Counter, total: int) -> None:
        """Counts what was added to `total` since the last time; a total never shrinks."""
        if (added := total - self._seen.get(name, 0)) > 0:
            counter.inc(added)
            self._seen[name] = total

    def render(self) -> bytes:
        """The metrics of all workers in Prometheus' text format 0.0.4; this worker's are exact to the moment."""
        self.refresh()
        metrics = live_metrics(self._directory) if self._directory else self._registry.collect()
        ours = _ordered(metrics)
        if self._started:
            _label_start(ours, self._started)
        return generate_latest(_Snapshot(ours))


@dataclass
class _Requests:
    """What is counted of one kind of caller's requests; `bound` holds the children in use, by route and status."""

    of_model: tuple[str, str]
    requests: Counter
    durations: Histogram
    problems: dict[str, Counter]
    bound: dict[tuple[str, int], tuple[Counter, Histogram]] = field(default_factory=dict)


class _Snapshot:
    """Metrics as the exposition wants to be given them."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _ordered(metrics: Iterable[Metric]) -> list[Metric]:
    """Ours alone (BentoML keeps its own in the same files), by name; a histogram's samples in the format's order."""
    ours = sorted((metric for metric in metrics if metric.name.startswith(PREFIX)), key=lambda metric: metric.name)
    for metric in ours:
        metric.samples.sort(key=_sample_order)
    return ours


def _label_start(metrics: Iterable[Metric], started: str) -> None:
    """Here, once per look, rather than at each observation: it is the same for all workers of a start."""
    for metric in metrics:
        if metric.type in _SINCE_THE_START:
            metric.samples = [
                sample._replace(labels={**sample.labels, "started": started}) for sample in metric.samples
            ]


def _sample_order(sample: Sample) -> tuple[list[tuple[str, str]], int, float]:
    series = sorted((key, value) for key, value in sample.labels.items() if key != "le")
    kind = ("_bucket", "_sum", "_count")
    rank = next((place for place, suffix in enumerate(kind) if sample.name.endswith(suffix)), 0)
    return series, rank, float(sample.labels.get("le", 0))
