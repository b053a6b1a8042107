"""What the demo shows of a release, and that its limits and its digits are what the real parts take."""

from __future__ import annotations

import io
from dataclasses import asdict, replace

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.params import ModelReleaseParams, override
from pipelines.release.gates import forecast, limits_of
from pipelines.release.history import describe_deviations
from pipelines.release.rollout_state import GateReading, Passage, RolloutState, StepReading
from pipelines.release.steps import PROMOTED, ROLLED_BACK, Phase, Plan, Step
from pipelines.services.demo_release import LIMITS, recorded_digits, step_lines
from pipelines.services.rollouts import describe_changes
from tests.unit.release.simulated_release import EPOCH, release

CANARY = Step(Phase.CANARY, 10)
STATE = RolloutState(
    "m:2:d:1",
    release(2),
    release(1),
    Plan(ModelReleaseParams()),
    "scheduler",
    EPOCH,
    "5d" * 32,
    step=CANARY,
    passages=(Passage("pending", EPOCH), Passage("shadow", EPOCH), Passage("canary@10", EPOCH, "agreement", 412)),
)
READINGS = {
    "shadow": StepReading(
        "promote",
        (GateReading("agreement", "promote", "same label as the champion in 9 of 9 mirrored requests, 1.000"),),
        "",
        requests=410,
    ),
    "canary@10": StepReading(
        "need more data", (GateReading("errors", "need more data", "0 of 37 failed; stable 0 of 9"),), "", requests=37
    ),
}


def test_lines__in_a_canary__name_what_each_step_took_and_its_numbers() -> None:
    shadow, agreement, canary, errors = "\n".join(step_lines(STATE, READINGS)).splitlines()
    assert shadow.split() == ["shadow", "promoted", "after", "412", "mirrored", "requests"]
    assert agreement.strip() == "agreement 9 of 9, 1.000"
    assert canary.split() == ["10", "%", "37", "requests", "so", "far"]
    assert errors.strip() == "0 of 37 failed"


def test_lines__promoted__name_champion_and_what_is_kept_warm() -> None:
    passages = (*STATE.passages, Passage("promoted", EPOCH, "errors", 96))
    lines = step_lines(replace(STATE, step=PROMOTED, passages=passages), READINGS)
    assert lines[-1].split() == ["live", "champion:", "v2", "·", "previous", "v1", "kept", "warm"]
    first = replace(STATE, champion=None, step=PROMOTED, passages=(Passage("pending", EPOCH), passages[-1]))
    assert "no champion yet" in step_lines(first, {})[-1]


def test_describe_deviations__of_what_was_passed__stand_beside_the_forecast() -> None:
    steps = [asdict(step) for step in forecast(STATE.plan, requests_per_s=30, is_first=False)]
    passages = (
        *(Passage("pending", EPOCH), Passage("shadow", EPOCH + 60), Passage("canary@10", EPOCH + 180, requests=200)),
        Passage("rolled_back", EPOCH + 190, requests=5),
    )
    (line,) = describe_deviations(replace(STATE, passages=passages, forecast={"steps": steps}))
    expected = steps[0]["requests"]
    assert line.startswith(
        f"shadow: 200 requests, forecast {expected:,} ({200 / expected - 1:+.0%}); 2.0 min, forecast"
    )
    assert describe_deviations(STATE) == []


def test_lines__rolled_back__do_not_call_the_last_step_promoted() -> None:
    passages = (*STATE.passages, Passage("rolled_back", EPOCH, "errors 9 %", 60))
    lines = step_lines(replace(STATE, step=ROLLED_BACK, reason="errors 9 %", passages=passages), {})
    assert "promoted" not in lines[-2]
    assert lines[-1].split("  ")[-1] == "reason: “errors 9 %”"


def test_limits__of_the_demo__can_be_judged_and_are_told_to_the_approver() -> None:
    tree = override({"model_release": ModelReleaseParams().model_dump()}, LIMITS)
    params = ModelReleaseParams.model_validate(tree["model_release"])
    assert limits_of(params).max_error_rate == 0.02
    told = describe_changes(params, ModelReleaseParams())
    assert "max_error_rate 0.02 instead of 0.001" in told
    assert told.count("instead of") == len(LIMITS)
    assert describe_changes(params, params) == ""


def test_digits__as_sent__are_those_of_scikit_learn() -> None:
    values = load_digits().images
    files = recorded_digits()
    assert len(files) == len(values)
    sent = np.asarray(Image.open(io.BytesIO(files[7])))
    assert sent.shape == (8, 8)
    assert sent.dtype == np.uint8
    assert np.array_equal(np.rint(sent / (255 / 16)), values[7])
