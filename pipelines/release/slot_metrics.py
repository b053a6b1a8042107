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
"""

from __future__ import annotations

import http.client
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipelines.release.local_layout import HOST

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
    """

    requests: int = 0
    errors: int = 0
    client_errors: int = 0
    worker_starts: int = 0
    latency_buckets: dict[float, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    release: str = ""


def fetch_metrics(port: int, timeout_s: float = 3.0) -> str:
    """The text of /metrics on a port of this machine.

    Raises:
        OSError: nothing answers, or not with 200.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"/metrics on port {port}: {error!r}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise OSError(f"/metrics on port {port} answers {response.status}")
    return body.decode()


def read_counts(text: str) -> ServiceCounts:
    """The counts in an answer of /metrics (Prometheus' text format 0.0.4).

    Raises:
        ValueError: it is no such text.
    """
    counts = ServiceCounts()
    codes: dict[int, int] = defaultdict(int)
    problems: dict[str, int] = defaultdict(int)
    buckets: dict[float, int] = defaultdict(int)
    for name, labels, value in _samples(text):
        if name == "perch_requests_total" and labels["route"] in PREDICTION_ROUTES:
            codes[int(labels["code"])] += value
        elif name == "perch_problems_total":
            problems[labels["type"]] += value
        elif name == "perch_worker_starts_total":
            counts.worker_starts += value
        elif name == "perch_predictions_total":
            counts.labels[labels["label"]] = value
        elif name == "perch_model_info":
            counts.release = labels["release"]
        elif name == "perch_request_duration_seconds_bucket" and _is_timed(labels):
            buckets[float(labels["le"])] += value
    due = sum(problems[slug] for slug in _ERRORS_OF_503)
    counts.errors = sum(count for code, count in codes.items() if code >= 500 and code != _UNAVAILABLE)
    counts.errors += min(codes[_UNAVAILABLE], due)
    counts.requests = codes[200] + counts.errors
    counts.client_errors = sum(count for code, count in codes.items() if 400 <= code < 499)
    counts.latency_buckets = dict(sorted(buckets.items())) or {math.inf: 0}
    return counts


def _is_timed(labels: dict[str, str]) -> bool:
    return labels["route"] == _TIMED_ROUTE and labels["code"] == "200"


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], int]]:
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("perch_") and math.isfinite(sample.value):
                yield sample.name, sample.labels, int(sample.value)
