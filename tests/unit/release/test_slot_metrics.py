import math

import pytest

from pipelines.release.slot_metrics import fetch_metrics, read_counts
from pipelines.services.stack import any_free_port
from serving.metrics import ServiceMetrics


def metrics() -> ServiceMetrics:
    return ServiceMetrics("shapes", "1", "0a" * 32, ["circle", "square"], release="5c" * 32)


def test_read_counts__what_the_service_shows__is_counted_by_who_is_to_blame() -> None:
    service = metrics()
    for _ in range(7):
        service.observe_request("/v1/predict", 200, 0.02)
    service.observe_request("/v1/predict/batch", 200, 3.0)
    service.observe_request("/v1/predict", 500, 0.1, "internal")
    service.observe_request("/v1/predict", 503, 10.0, "out-of-time")
    for _ in range(5):
        service.observe_request("/v1/predict", 503, 0.001, "overloaded")
    service.observe_request("/v1/predict", 429, 0.001, "rate-limited")
    service.observe_request("/v1/predict", 422, 0.002, "unreadable-image")
    service.observe_request("/v1/predict", 499, 0.5)
    service.observe_request("/v1/explain", 500, 0.5, "internal")
    service.observe_request("/readyz", 200, 0.001)
    service.observe_prediction("square", 0.9)
    counts = read_counts(service.render().decode())
    assert (counts.requests, counts.errors, counts.client_errors) == (10, 2, 2)
    assert counts.latency_buckets[0.01] == 0
    assert counts.latency_buckets[0.025] == 7
    assert counts.latency_buckets[math.inf] == 7
    assert list(counts.latency_buckets) == sorted(counts.latency_buckets)
    assert counts.labels == {"circle": 0, "square": 1}
    assert counts.worker_starts == 1
    assert counts.release == "5c" * 32


def test_read_counts__explanations_out_of_time__are_no_errors_of_predictions() -> None:
    service = metrics()
    service.observe_request("/v1/predict", 200, 0.02)
    service.observe_request("/v1/explain", 503, 10.0, "out-of-time")
    counts = read_counts(service.render().decode())
    assert (counts.requests, counts.errors) == (1, 0)


def test_read_counts__service_just_started__is_zero_with_an_infinite_bucket() -> None:
    counts = read_counts(metrics().render().decode())
    assert (counts.requests, counts.errors, counts.latency_buckets[math.inf]) == (0, 0, 0)


def test_read_counts__no_metrics__is_an_error() -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_counts("<html>503 {oops</html>")


def test_fetch_metrics__nobody_there__is_an_error() -> None:
    with pytest.raises(OSError, match="refused"):
        fetch_metrics(any_free_port())


def test_read_counts__what_the_prober_was_answered__is_counted_likewise_and_apart() -> None:
    service = metrics()
    service.observe_request("/v1/predict", 200, 0.02)
    for _ in range(3):
        service.observe_request("/v1/predict", 200, 0.3, is_probe=True)
    service.observe_request("/v1/predict", 500, 0.1, "internal", is_probe=True)
    service.observe_request("/v1/predict", 503, 10.0, "out-of-time", is_probe=True)
    service.observe_request("/v1/predict", 503, 0.001, "overloaded", is_probe=True)
    service.observe_request("/v1/predict", 422, 0.002, "unreadable-image", is_probe=True)
    counts = read_counts(service.render().decode())
    assert (counts.requests, counts.errors, counts.client_errors, counts.latency_buckets[math.inf]) == (1, 0, 0, 1)
    probes = counts.probes
    assert (probes.requests, probes.errors, probes.client_errors) == (5, 2, 1)
    assert (probes.latency_buckets[0.2], probes.latency_buckets[0.35], probes.latency_buckets[math.inf]) == (0, 3, 3)
