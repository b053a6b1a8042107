import math

import numpy as np
import pytest

from pipelines.core.canary_judgement import judge
from pipelines.core.canary_observations import CanaryLimits, CanaryWindow, SlotWindow
from pipelines.core.rollout_forecast import (
    HealthyCanary,
    StepPlan,
    deviation,
    forecast_rollout,
    forecast_step,
)
from pipelines.core.sequential_test import PROMOTE

LIMITS = CanaryLimits()
PLANS = (StepPlan("shadow", "shadow", 1.0), StepPlan("canary@10", "canary", 0.1), StepPlan("canary@100", "canary", 1.0))


def test_forecast_rollout__ten_requests_a_second__names_requests_and_minutes_of_each_step() -> None:
    shadow, tenth, whole = forecast_rollout(PLANS, LIMITS, requests_per_s=10)
    assert [gate.name for gate in shadow.gates] == ["agreement", "scores"]
    assert shadow.requests == 106
    assert [gate.requests for gate in tenth.gates] == [2_123, 157]
    assert tenth.minutes == pytest.approx(2_123 / 60)
    assert whole.minutes == pytest.approx(2_123 / 600)
    assert "2,123 requests" in tenth.sentence
    assert "35.4 min" in tenth.sentence


def test_forecast_step__its_likely_requests__suffice_in_about_nine_of_ten_courses() -> None:
    """The forecast is held to the judgement itself, on simulated canaries."""
    random = np.random.default_rng(6)
    forecast = forecast_step(PLANS[1], LIMITS, requests_per_s=10)
    assert forecast.requests is not None
    assert forecast.likely_requests is not None
    needed = []
    for _ in range(80):
        sent = errors = slow = 0
        verdict = "need more data"
        while verdict == "need more data":
            sent, errors, slow = sent + 100, errors + random.binomial(100, 0.0002), slow + random.binomial(100, 0.01)
            buckets = {0.5: float(sent - slow), math.inf: float(sent)}
            window = CanaryWindow(SlotWindow(sent, errors, buckets, 0, 1), None, 1.0)
            verdict = judge(window, LIMITS, phase="canary").verdict
        if verdict == PROMOTE:
            needed.append(sent)
    assert np.mean(needed) == pytest.approx(forecast.requests, rel=0.2)
    assert np.mean(np.array(needed) <= forecast.likely_requests + 100) >= 0.8


def test_forecast_step__a_shortest_time__is_waited_for() -> None:
    forecast = forecast_step(PLANS[2], LIMITS, requests_per_s=1_000, min_step_s=600)
    assert forecast.minutes == forecast.likely_minutes == 10


def test_forecast_step__a_prober__adds_what_clients_lack_and_is_named() -> None:
    alone = forecast_step(PLANS[1], LIMITS, requests_per_s=0.0, min_step_s=600, max_probes_per_s=1_000)
    assert alone.probes_per_s == pytest.approx(2_942 / 60)
    assert (alone.minutes, alone.likely_minutes) == (10, pytest.approx(10))
    assert "at present traffic and 49 probes/s" in alone.sentence
    beside = forecast_step(PLANS[1], LIMITS, requests_per_s=40.0, min_step_s=600, max_probes_per_s=1_000)
    assert beside.probes_per_s == pytest.approx(alone.probes_per_s - 40)
    few = forecast_step(PLANS[1], LIMITS, requests_per_s=0.0, min_step_s=600, max_probes_per_s=10)
    assert few.minutes == pytest.approx(2_123 / 60)


def test_forecast_step__a_prober_and_enough_clients__does_without_it() -> None:
    forecast = forecast_step(PLANS[1], LIMITS, requests_per_s=60.0, min_step_s=600, max_probes_per_s=10)
    assert forecast.probes_per_s == 0
    assert "probes" not in forecast.sentence


@pytest.mark.parametrize("requests_per_s", [0.0, math.nan])
def test_forecast_step__no_traffic__says_that_nothing_is_promoted(requests_per_s: float) -> None:
    forecast = forecast_step(PLANS[1], LIMITS, requests_per_s=requests_per_s)
    assert forecast.minutes is None
    assert forecast.requests == 2_123
    assert "there is no traffic now, and without it nothing is promoted" in forecast.sentence


@pytest.mark.parametrize(
    ("plan", "healthy", "gate"),
    [
        (PLANS[1], HealthyCanary(error_rate=0.002), "errors"),
        (PLANS[1], HealthyCanary(slow_share=0.06), "latency"),
        (PLANS[0], HealthyCanary(agreement=0.88), "agreement"),
    ],
)
def test_forecast_step__a_stable_slot_that_would_not_pass_itself__is_said_beforehand(
    plan: StepPlan, healthy: HealthyCanary, gate: str
) -> None:
    forecast = forecast_step(plan, LIMITS, requests_per_s=10, healthy=healthy)
    assert forecast.requests is None
    assert forecast.minutes is None
    assert gate in forecast.sentence


def test_deviation__afterwards__says_how_far_off_the_forecast_was() -> None:
    forecast = forecast_step(PLANS[1], LIMITS, requests_per_s=10)
    text = deviation(forecast, 1_663, 30.0)
    assert text == "canary@10: 1,663 requests, forecast 2,123 (-22%); 30.0 min, forecast 35.4 (-15%)"
    blind = forecast_step(PLANS[1], LIMITS, requests_per_s=0)
    assert deviation(blind, 1_663, 30.0) == (
        "canary@10: 1,663 requests, 30.0 min; no minutes were forecast, for nothing was asked when the release began"
    )
    hopeless = forecast_step(PLANS[1], LIMITS, requests_per_s=10, healthy=HealthyCanary(error_rate=0.5))
    assert deviation(hopeless, 900, 2.0) == "canary@10: 900 requests, 2.0 min; no promotion had been expected"
