import math
from typing import Any

import pytest

from pipelines.release.prometheus_counters import count_worker_crashes, counters_query, oldest_sample, read_answer


def answer(*rows: tuple[dict[str, str], str]) -> dict[str, Any]:
    return {
        "status": "success",
        "data": {
            "resultType": "vector",
            "result": [{"metric": labels, "value": [1.0, value]} for labels, value in rows],
        },
    }


def row(series: str, value: object, **labels: str) -> tuple[dict[str, str], str]:
    return {"series": series, **labels}, str(value)


FULL = (
    row("perch_requests_total", 40, route="/v1/predict", code="200"),
    row("perch_requests_total", 2, route="/v1/predict", code="500"),
    row("perch_requests_total", 9, route="/v1/predict", code="503"),
    row("perch_requests_total", 1, route="/v1/predict/batch", code="200"),
    row("perch_requests_total", 3, route="/v1/predict", code="415"),
    row("perch_problems_total", 1, type="out-of-time"),
    row("perch_problems_total", 8, type="overloaded"),
    row("perch_predictions_total", 25, label="circle"),
    row("perch_predictions_total", 15, label="square"),
    row("perch_request_duration_seconds_bucket", 30, le="0.05", route="/v1/predict", code="200"),
    row("perch_request_duration_seconds_bucket", 40, le="+Inf", route="/v1/predict", code="200"),
    row("perch_worker_starts_total", 3, pod="b-1", started="10:00"),
    row("perch_worker_starts_total", 2, pod="b-1", started="10:07"),  # its container was started again
    row("perch_worker_starts_total", 2, pod="b-2"),  # a release that does not tell its start
    row("sampled_at", 1000.5, pod="b-1"),
    row("sampled_at", 1002.0, pod="b-2"),
)


def test_read_answer__all_series__are_counted_as_those_of_one_service() -> None:
    known = read_answer(answer(*FULL))
    assert known is not None
    counts = known.counts
    assert (counts.requests, counts.errors, counts.client_errors, counts.worker_starts) == (44, 3, 3, 7)
    assert counts.labels == {"circle": 25, "square": 15}
    assert counts.latency_buckets == {0.05: 30, math.inf: 40}
    assert known.sampled_at == {"b-1": 1000.5, "b-2": 1002.0}
    assert (count_worker_crashes(known, 2), count_worker_crashes(known, 0)) == (1, 0)


@pytest.mark.parametrize(
    "nothing",
    [
        answer(),
        {"status": "error", "errorType": "timeout"},
        answer(*FULL, row("perch_requests_total", "NaN", route="/v1/predict", code="200")),
        answer(*FULL[:-2]),  # counted once, looked at no more
    ],
)
def test_read_answer__absent_not_a_number_or_no_longer_sampled__is_no_data(nothing: dict[str, Any]) -> None:
    assert read_answer(nothing) is None


@pytest.mark.parametrize(
    "other",
    [
        ["success"],
        {"status": "success"},
        {"status": "success", "data": None},
        {"status": "success", "data": {"result": [{"metric": {}, "value": [1.0, "2"]}]}},
        {"status": "success", "data": {"result": [{"metric": {"series": "perch_worker_starts_total"}, "value": []}]}},
        answer(row("perch_worker_starts_total", "many", pod="b-1")),
    ],
)
def test_read_answer__json_of_something_else__is_a_value_error(other: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_answer(other)


@pytest.mark.parametrize(
    ("ready_since", "now", "taken_at"),
    [
        ({"b-1": 900.0, "b-2": 900.0}, 1003.0, 1000.5),
        ({"b-2": 900.0}, 1003.0, 1002.0),  # the other one has ended
        ({"b-2": 900.0, "b-3": 995.0}, 1003.0, 1002.0),  # has not been looked at yet
        ({"b-2": 900.0, "b-3": 950.0}, 1003.0, None),  # should have been
        ({"b-1": 900.0, "b-2": 900.0}, 1031.0, None),  # old
        ({}, 1003.0, None),
    ],
)
def test_oldest_sample__pods_that_take_requests__all_have_to_have_been_looked_at(
    ready_since: dict[str, float], now: float, taken_at: float | None
) -> None:
    known = read_answer(answer(*FULL))
    assert known is not None
    assert oldest_sample(known, ready_since, now=now, max_age_s=30.0) == taken_at


@pytest.mark.parametrize(("age_s", "window"), [(0, "[5s]"), (-3, "[5s]"), (60.2, "[66s]"), (1e6, "[21600s]")])
def test_counters_query__age__bounds_what_prometheus_reads(age_s: float, window: str) -> None:
    query = counters_query("ml", "perch-serving-b", "5c" * 32, age_s=age_s)
    assert query.count(window) == 17
    assert query.count("max by (pod, started") == 8
    assert query.count('namespace="ml",pod=~"perch-serving-b-.+"') == 18
    assert query.count('release="5c5c5c') == 9
