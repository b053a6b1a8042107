"""Asks Prometheus what the pods of a slot have counted; what is absent, not a number or old is no data.

Counters of pods that have ended still belong to the slot: each series counts with the most it ever showed since the
deployment, so that the sum never falls when the autoscaler takes a pod away.  A container that starts again in its pod
counts from zero under another `started`, which is another series: both count.  A pod that Prometheus looks at twice,
as it does where two of its jobs find it, counts once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.release.http_exchange import fetch
from pipelines.release.slot_metrics import PREDICTION_ROUTES, ServiceCounts, sum_counts

# A range over weeks of a stable slot would cost Prometheus seconds at every look.  A pod that ended earlier than this
# before a look is forgotten by it.
HISTORY_S = 6 * 3600
_SLACK_S = 5
_SERIES = "series"
_SAMPLED_AT = "sampled_at"
_STARTS = "perch_worker_starts_total"


@dataclass(frozen=True)
class PodCounts:
    """What the pods of a slot have counted.

    Attributes:
        counts: of all of them together, ended ones among them.
        worker_starts: pod and start of its service to worker processes started in it; the start is empty where an older
            release does not tell it.
        sampled_at: pod to the time of its last sample, in seconds since the epoch; only pods that are still looked at.
    """

    counts: ServiceCounts
    worker_starts: Mapping[tuple[str, str], int]
    sampled_at: Mapping[str, float]


def counters_query(namespace: str, name: str, digest: str, *, age_s: float) -> str:
    """One question for everything, in PromQL.

    Args:
        namespace: of the pods.
        name: of their Deployment, with which theirs begin.
        digest: of the release; a pod says itself that it serves it, and never serves another one.
        age_s: seconds since it was deployed.
    """
    pods = f'namespace="{namespace}",pod=~"{name}-.+"'
    routes = "|".join(sorted(PREDICTION_ROUTES))
    window = f"[{math.ceil(min(max(age_s, 0) + _SLACK_S, HISTORY_S))}s]"
    parts = {"perch_predictions_total": ("label", pods), _STARTS: ("pod, started", pods)}
    for prefix in ("perch", "perch_probe"):
        timed = f'{pods},route="/v1/predict",code="200"'
        parts[f"{prefix}_requests_total"] = ("route, code", f'{pods},route=~"{routes}"')
        parts[f"{prefix}_problems_total"] = ("type", pods)
        parts[f"{prefix}_request_duration_seconds_bucket"] = ("le, route, code", timed)
    own = f'on (pod) group_left () max by (pod) (max_over_time(perch_model_info{{{pods},release="{digest}"}}{window}))'
    terms = {
        series: f"sum by ({by}) ({_once(by, f'max_over_time({series}{{{chosen}}}{window})')} * {own})"
        for series, (by, chosen) in parts.items()
    }
    terms[_SAMPLED_AT] = f"max by (pod) (timestamp({_STARTS}{{{pods}}}) * {own})"
    return " or ".join(f'label_replace({term}, "{_SERIES}", "{series}", "", "")' for series, term in terms.items())


def _once(by: str, counts: str) -> str:
    """Each start of a pod's service once, whatever jobs and addresses Prometheus looked at it by."""
    return f"max by ({', '.join(dict.fromkeys(['pod', 'started', *by.split(', ')]))}) ({counts})"


def read_answer(answer: Mapping[str, Any]) -> PodCounts | None:
    """The counts in an answer of Prometheus' `/api/v1/query`; None where it has none, or one that is no number.

    Raises:
        ValueError: it is no such answer, as of a proxy before Prometheus.
    """
    try:
        return _read(answer)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer of Prometheus: {error!r}") from error


def _read(answer: Mapping[str, Any]) -> PodCounts | None:
    if answer.get("status") != "success":
        return None
    samples: list[tuple[str, Mapping[str, str], int]] = []
    worker_starts: dict[tuple[str, str], int] = {}
    sampled_at: dict[str, float] = {}
    for row in answer["data"]["result"]:
        labels, value = row["metric"], float(row["value"][1])
        if not math.isfinite(value):
            return None
        series = labels[_SERIES]
        if series == _SAMPLED_AT:
            sampled_at[labels["pod"]] = value
            continue
        if series == _STARTS:
            worker_starts[labels["pod"], labels.get("started", "")] = int(value)
        samples.append((series, labels, int(value)))
    if not sampled_at:
        return None
    return PodCounts(sum_counts(samples), worker_starts, sampled_at)


def oldest_sample(known: PodCounts, ready_since: Mapping[str, float], *, now: float, max_age_s: float) -> float | None:
    """When the numbers were taken: the time of the oldest among the pods that take requests.

    A pod that has only just become ready may not have been looked at yet.  None where another one is missing, or its
    numbers are too old, or there is no pod at all: what was counted long ago must not look like health.

    Args:
        known: from Prometheus.
        ready_since: pod to the time since when it takes requests, in seconds since the epoch.
        now: in seconds since the epoch.
        max_age_s: in seconds.
    """
    times = []
    for pod, since in ready_since.items():
        sampled_at = known.sampled_at.get(pod)
        if sampled_at is not None:
            times.append(sampled_at)
        elif now - since > max_age_s:
            return None
    if not times or now - min(times) > max_age_s:
        return None
    return min(times)


def count_worker_crashes(known: PodCounts, workers: int) -> int:
    """Worker processes that were started in place of others; 0 where it is not known how many there should be.

    Those of a container that was started again are not: that it ended, its pod's status says.
    """
    return sum(max(0, starts - workers) for starts in known.worker_starts.values()) if workers else 0


def ask_prometheus(url: str, query: str, timeout_s: float) -> Mapping[str, Any]:
    """The answer to an instant query, as JSON.

    Args:
        url: of Prometheus, http or https.
        query: in PromQL.
        timeout_s: in seconds.

    Raises:
        OSError: it does not answer, or not with 200.
        ValueError: its answer is no JSON.
    """
    form = {"query": query, "time": f"{time.time():.3f}"}
    answer: Mapping[str, Any] = json.loads(fetch(f"{url.rstrip('/')}/api/v1/query", timeout_s, form=form))
    return answer
