"""Clocks that jump by an hour while a canary has a part of the traffic, as the engine and the watchdog read them."""

from __future__ import annotations

import pytest

from pipelines.release.steps import PROMOTED, ROLLED_BACK
from tests.integration.test_faults_at_each_step import Stage, mlflow, run, stage  # noqa: F401 - fixtures

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize("jump_s", [3600, -3600])
@pytest.mark.parametrize("step", ["canary@10", "canary@50"])
def test_rollout__clock_jumps_at_a_canary_step_and_back__is_taken_back_and_no_request_fails(
    stage: Stage,  # noqa: F811 - the fixture
    step: str,
    jump_s: int,
) -> None:
    """Whichever way it jumped, to the engine an hour passes in one moment: at once, or when the clock is put right."""
    final = run(stage, f"clock {jump_s:+d}", (step,), 0.0)
    assert (final.step, final.reason.partition(" for")[0]) == (ROLLED_BACK, "nobody moved the release")


@pytest.mark.parametrize("step", ["canary@10", "canary@50"])
def test_rollout__clock_is_set_back_for_good_at_a_canary_step__ends_as_without_and_no_request_fails(
    stage: Stage,  # noqa: F811 - the fixture
    step: str,
) -> None:
    final = run(stage, "clock -3600 for good", (step,), 0.0)
    assert final.step == PROMOTED, final.reason
