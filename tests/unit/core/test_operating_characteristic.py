import math

import pytest

from pipelines.core.canary_observations import CanaryLimits
from pipelines.core.operating_characteristic import (
    ThresholdGate,
    error_streams,
    of_judgement,
    of_latency_bound,
    of_sequential_test,
    of_threshold_gate,
)

LIMITS = CanaryLimits()
STREAMS = 300
TOLERANCE = 4 * math.sqrt(0.25 / STREAMS)


@pytest.mark.parametrize("error_rate", [0.0002, 0.001, 0.01])
def test_of_sequential_test__simulated_streams__agree_with_the_exact_course(error_rate: float) -> None:
    test = LIMITS.error_rate_test
    outcomes = of_sequential_test(test, error_streams(error_rate, STREAMS, 10_000, seed=1))
    assert outcomes.promoted == pytest.approx(test.course(error_rate).promoted, abs=TOLERANCE)
    assert outcomes.requests == pytest.approx(test.course(error_rate).expected_requests, rel=0.2)


@pytest.mark.parametrize("gate", [ThresholdGate(120, 10), ThresholdGate(600, 10, 2), ThresholdGate(1_000, 5)])
@pytest.mark.parametrize("error_rate", [0.0002, 0.001])
def test_of_threshold_gate__simulated_streams__agree_with_the_exact_probability(
    gate: ThresholdGate, error_rate: float
) -> None:
    outcomes = of_threshold_gate(gate, error_streams(error_rate, STREAMS, 6_000, seed=2))
    assert outcomes.promoted == pytest.approx(gate.promotion_probability(error_rate), abs=TOLERANCE)
    assert outcomes.promoted + outcomes.rolled_back == 1


def test_threshold_gate__a_window_of_120_at_a_healthy_rate__is_the_example_of_the_decision_record() -> None:
    """0.05 %: one window in 17 is breached, and of ten-window rollouts 45 in 100."""
    assert 1 - ThresholdGate(120, 1).promotion_probability(0.0005) == pytest.approx(0.058, abs=0.001)
    assert 1 - ThresholdGate(120, 10).promotion_probability(0.0005) == pytest.approx(0.45, abs=0.005)


def test_of_threshold_gate__too_short_streams__are_refused() -> None:
    with pytest.raises(ValueError, match="takes 1200"):
        of_threshold_gate(ThresholdGate(120, 10), error_streams(0.001, 2, 1_000, seed=1))


def test_of_judgement__a_network_bad_for_both__blames_the_canary_only_where_nobody_compares() -> None:
    rates = [0.0002] * 5 + [0.02] * 15
    seen = {
        compare: of_judgement(
            LIMITS,
            canary_error_rates=rates,
            stable_error_rates=rates,
            share=0.1,
            look_requests=400,
            streams=60,
            seed=3,
            compare=compare,
        )
        for compare in (True, False)
    }
    assert seen[True].rolled_back <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
    assert seen[True].promoted == 0
    assert seen[False].rolled_back > 0.9


def test_of_latency_bound__at_and_around_the_limit__keeps_alpha_and_beta() -> None:
    at_limit = of_latency_bound(LIMITS, 0.05, requests=4_000, streams=STREAMS, seed=4)
    tolerance = 3 * math.sqrt(0.05 * 0.95 / STREAMS)
    assert at_limit.promoted <= LIMITS.beta + tolerance
    assert at_limit.rolled_back <= LIMITS.alpha + tolerance
    assert of_latency_bound(LIMITS, 0.01, requests=4_000, streams=STREAMS, seed=4).promoted > 0.95
    assert of_latency_bound(LIMITS, 0.2, requests=4_000, streams=STREAMS, seed=4).rolled_back > 0.95
