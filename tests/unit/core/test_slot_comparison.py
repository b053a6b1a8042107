import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.slot_comparison import LARGEST_COMPARABLE_SHARE, comparable_share, log_evidence_canary_is_worse

NEEDED = math.log(20)


@pytest.mark.parametrize(("share", "failures"), [(0.1, 2), (0.5, 7), (LARGEST_COMPARABLE_SHARE, 20)])
def test_log_evidence_canary_is_worse__only_the_canary_fails__takes_as_many_failures_as_documented(
    share: float, failures: int
) -> None:
    assert log_evidence_canary_is_worse(failures, 0, share) >= NEEDED
    assert log_evidence_canary_is_worse(failures - 1, 0, share) < NEEDED


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_log_evidence_canary_is_worse__a_network_that_gets_bad_for_both__blames_the_canary_rarely(share: float) -> None:
    """The rate of failures changes in every batch; only which slot gets a request is chance."""
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(400):
        rates = random.beta(0.3, 6, 120)  # mostly good, at times terrible
        canary = random.binomial(50, share, 120)
        canary_failed, stable_failed = random.binomial(canary, rates), random.binomial(50 - canary, rates)
        totals = zip(canary_failed.cumsum(), stable_failed.cumsum(), strict=True)
        wrong += any(log_evidence_canary_is_worse(float(a), float(b), share) >= NEEDED for a, b in totals)
    assert wrong / 400 <= 0.05


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.01, 0.8))
def test_log_evidence_canary_is_worse__a_failure_of_either_slot__moves_it_that_slot_s_way(
    canary: int, stable: int, share: float
) -> None:
    before = log_evidence_canary_is_worse(canary, stable, share)
    assert max(-5, log_evidence_canary_is_worse(canary + 1, stable, share)) >= max(-5, before) - 1e-9
    assert max(-5, log_evidence_canary_is_worse(canary, stable + 1, share)) <= max(-5, before) + 1e-9


@pytest.mark.parametrize(
    ("canary", "stable", "weight", "expected"),
    [
        (100, 900, 0.1, 0.1),
        (300, 700, 0.1, 0.3),
        (100, 900, 0.5, 0.5),
        (0, 900, 0.1, None),
        (100, 0, 0.1, None),
        (900, 100, 0.1, None),
        (100, 900, 1.0, None),
    ],
)
def test_comparable_share__of_configured_and_observed__is_the_larger(
    canary: float, stable: float, weight: float, expected: float | None
) -> None:
    assert comparable_share(canary, stable, weight) == expected
