"""Reads what a slot's service has counted out of its /metrics, which speaks for all its workers.

What is counted, and why:
- A request is one to the prediction endpoints that a prediction was due to: answered with 200, or with an error.
  What a client did wrong (4xx) says nothing about availability and would thin the errors; it is counted by itself, so
  that a release that turns good images away is seen.
- An error is a 5xx, other than `overloaded`: that bound turns away what would be too much for any release.
  `out-of-time` and `not-ready` are errors.  The service counts problems by type, not by route: of the 503 on the
  prediction endpoints at most as many are errors as there were problems of these two types.
- Latency is that of `/v1/predict`, answered with 200; a batch takes as long as it is large.
- 499, the client went away, is neither: nobody was answered.
- What the prober sent is counted likewise, and apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipelines.release.http_exchange import fetch
from pipelines.release.local_layout import HOST
from pipelines.release.targets import ProbeCounters

PREDICTION_ROUTES = frozenset({"/v1/predict", "/v1/predict/batch"})
_TIMED_ROUTE = "/v1/predict"
_UNAVAILABLE = 503
_ERRORS_OF_503 = frozenset({"out-of-time", "not-ready"})


@dataclass
class ServiceCounts:
    """Sums over all workers since the service started.

    Attributes:
        requests: to the prediction endpoints that a prediction was due to.
        errors: of these, without one.
        client_errors: answered with 4xx.
        worker_starts: worker processes started.
        latency_buckets: upper bound in seconds to cumulative count; the last is infinite.
        labels: predicted label to count.
        release: digest of what is served.
        probes: the prober's requests, in none of the others.
    """

    requests: int = 0
    errors: int = 0
    client_errors: int = 0
    worker_starts: int = 0
    latency_buckets: dict[float, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    release: str = ""
    probes: ProbeCounters = field(default_factory=ProbeCounters)


def fetch_metrics(port: int, timeout_s: float = 3.0) -> str:
    """The text of /metrics on a port of this machine.

    Raises:
        OSError: nothing answers, or not with 200.
    """
    return fetch(f"http://{HOST}:{port}/metrics", timeout_s).decode()


def read_counts(text: str) -> ServiceCounts:
    """The counts in an answer of /metrics (Prometheus' text format 0.0.4).

    Raises:
        ValueError: it is no such text.
    """
    return sum_counts(_samples(text))


def sum_counts(samples: Iterable[tuple[str, Mapping[str, str], int]]) -> ServiceCounts:
    """The counts in samples of one service, or of several that serve the same release.

    Args:
        samples: name, labels and value of each.
    """
    counts, clients, prober = ServiceCounts(), _Answers(), _Answers()
    for name, labels, value in samples:
        if name.startswith("perch_probe_"):
            prober.add(name.removeprefix("perch_probe_"), labels, value)
        elif name == "perch_worker_starts_total":
            counts.worker_starts += value
        elif name == "perch_predictions_total":
            counts.labels[labels["label"]] = counts.labels.get(labels["label"], 0) + value
        elif name == "perch_model_info":
            counts.release = labels["release"]
        else:
            clients.add(name.removeprefix("perch_"), labels, value)
    counts.requests, counts.errors, counts.client_errors = clients.requests, clients.errors, clients.client_errors
    counts.latency_buckets = dict(sorted(clients.buckets.items())) or {math.inf: 0}
    buckets = dict(sorted(prober.buckets.items()))
    counts.probes = ProbeCounters(prober.requests, prober.errors, prober.client_errors, buckets)
    return counts


@dataclass
class _Answers:
    """What one kind of caller was answered: by status, by type of problem, and how quickly."""

    codes: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    problems: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    buckets: dict[float, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, name: str, labels: Mapping[str, str], value: int) -> None:
        if name == "requests_total" and labels["route"] in PREDICTION_ROUTES:
            self.codes[int(labels["code"])] += value
        elif name == "problems_total":
            self.problems[labels["type"]] += value
        elif name == "request_duration_seconds_bucket" and (labels["route"], labels["code"]) == (_TIMED_ROUTE, "200"):
            self.buckets[float(labels["le"])] += value

    @property
    def errors(self) -> int:
        due = sum(self.problems[slug] for slug in _ERRORS_OF_503)
        surely = sum(count for code, count in self.codes.items() if code >= 500 and code != _UNAVAILABLE)
        return surely + min(self.codes[_UNAVAILABLE], due)

    @property
    def requests(self) -> int:
        return self.codes[200] + self.errors

    @property
    def client_errors(self) -> int:
        return sum(count for code, count in self.codes.items() if 400 <= code < 499)


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], int]]:
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("perch_") and math.isfinite(sample.value):
                yield sample.name, sample.labels, int(sample.value)
