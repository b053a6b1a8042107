"""How releases look in 80 columns, and what their commands answer."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.cli.rollout_view import render_history, render_rollout
from pipelines.cli.rollouts import _go_on
from pipelines.core.champions import Champions
from pipelines.errors import Refusal, TryLater
from pipelines.release.engine import look
from pipelines.release.gates import forecast
from pipelines.release.history import as_result, summarise
from pipelines.release.rollback import roll_back
from pipelines.release.rollout_state import Passage, StepReading
from pipelines.release.steps import Phase, Step
from pipelines.settings import get_settings
from tests.unit.release.simulated_release import MODEL, QUICK, Simulation


@pytest.fixture
def world(tmp_path: Path) -> Simulation:
    return Simulation(tmp_path)


def shown(what: RenderableType) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(what)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    return [line.rstrip() for line in lines]


def test_history__released_and_taken_back__says_who_how_far_and_why(world: Simulation) -> None:
    rollout = world.begin()
    world.answer(comment="better on 8 and 9")
    world.run(rollout.rollout_id)
    roll_back(world.world(), MODEL, reason="wrong on 8", by="on-call")
    lines = shown(render_history(MODEL, Champions("1"), [world.state(rollout.rollout_id)]))
    assert lines[0] == "digits-classification   champion v1   no previous"
    text = " ".join(" ".join(line.split()) for line in lines)
    assert "v2 rolled back" in text
    assert "approved by approver: “better on 8 and 9”" in text
    assert "shadow 1,800 · 10 % " in text
    assert text.endswith("reason: “wrong on 8”")


def test_history__a_forecast_was_made__says_in_one_line_how_far_it_was_off(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    state = world.run(rollout.rollout_id)
    steps = [asdict(step) for step in forecast(state.plan, requests_per_s=10.0, is_first=False)]
    expected = sum(step["requests"] for step in steps)
    took = sum(passage.requests for passage in state.passages)
    entry = summarise(replace(state, forecast={"steps": steps}))
    assert entry.forecast.startswith(f"in all: {took:,} requests, forecast {expected:,} ({took / expected - 1:+.0%}); ")
    text = " ".join(
        " ".join(shown(render_history(MODEL, Champions("2"), [replace(state, forecast={"steps": steps})]))).split()
    )
    assert entry.forecast in text
    assert summarise(state).forecast == ""


def test_watch__at_10_percent__shows_weight_gates_and_the_stable_slot(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    engine = world.engine()
    while world.state(rollout.rollout_id).step != Step(Phase.CANARY, 10):
        world.tick()
        engine.advance(rollout.rollout_id)
    world.tick()
    state, reading = look(world.world(), world.state(rollout.rollout_id))
    lines = shown(render_rollout(state, world.target.state(), reading, world.clock()))
    assert "champion v1   canary v2 at 10 % since" in lines[0]
    assert lines[1].split() == ["errors", "0", "of", "60", "more", "data"]
    assert lines[2] == "  stable     540 requests in the same window"


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        (True, "  prober     60 of the canary's requests were probes; at most 20 per second"),
        (False, "  prober     9 probes to the canary, no evidence; at most 20 per second"),
    ],
)
def test_watch__a_release_with_a_prober__says_how_many_were_probes(tmp_path: Path, counts: bool, line: str) -> None:
    params = QUICK.model_copy(update={"probe_requests_per_s": 20, "count_probes": counts})
    world = Simulation(tmp_path, params=params)
    rollout = world.begin()
    world.answer()
    state = world.engine().advance(rollout.rollout_id)
    reading = StepReading("need more data", (), "few requests", 60, 540, probes=60, uncounted_probes=9)
    assert line in shown(render_rollout(state, world.target.state(), reading, world.clock()))


def test_history__steps_that_passed_on_probes__say_how_many(world: Simulation) -> None:
    passages = (Passage("pending", 0.0), Passage("shadow", 0.0), Passage("canary@10", 9.0, "", 400, 390))
    assert summarise(replace(world.begin(), passages=passages)).course == "shadow 400 (390 probes)"


def test_watch__waits_for_an_approval__says_who_could(world: Simulation) -> None:
    rollout = world.begin()
    state = world.engine().advance(rollout.rollout_id)
    lines = shown(render_rollout(state, world.target.state(), None, world.clock()))
    assert "v2 waits for approval" in lines[0]
    assert "1 approval by anybody but scheduler" in lines[1]


def test_as_result__for_a_scheduler__tells_pending_from_denied_and_from_over(world: Simulation) -> None:
    rollout = world.begin()
    result = as_result(world.engine().advance(rollout.rollout_id))
    assert (result["step"], result["needs_answer"], result["was_released"]) == ("pending", True, False)
    world.answer()
    result = as_result(world.run(rollout.rollout_id))
    assert (result["step"], result["is_finished"], result["was_released"]) == ("promoted", True, True)
    assert result["summary"].startswith("digits-classification v2: promoted after")
    assert summarise(world.state(rollout.rollout_id)).reason == ""


def test_advance__until_a_step__returns_when_it_is_reached(world: Simulation) -> None:
    rollout = world.begin()
    world.answer()
    engine = world.engine()

    def take_a_look() -> object:
        world.tick()
        return engine.advance(rollout.rollout_id)

    state = _go_on(take_a_look, "canary@10", 0.0, 0.0)  # type: ignore[arg-type]
    assert state.step == Step(Phase.CANARY, 10)


def test_advance__not_there_in_time__asks_to_be_called_again(world: Simulation) -> None:
    rollout = world.begin()
    engine = world.engine()
    with pytest.raises(TryLater, match=r"has not reached canary@10 after 0\.01 s"):
        _go_on(lambda: engine.advance(rollout.rollout_id), "canary@10", 0.01, 0.01)


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERCH_HOME", str(tmp_path))
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


def test_releases__nothing_was_released__says_how_to_begin(empty_home: Path) -> None:
    result = CliRunner().invoke(app, ["releases"])
    assert result.exit_code == 0
    assert "was never released" in result.output
    assert list(empty_home.iterdir()) == []


@pytest.mark.parametrize("policy", ["", "missing.yaml"], ids=["no policy", "a policy that is not there"])
def test_rollback__nothing_was_released__is_refused_for_just_that(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    if policy:
        monkeypatch.setenv("PERCH_PROMOTION_POLICY", str(empty_home / policy))
    result = CliRunner().invoke(app, ["rollback"])
    assert isinstance(result.exception, Refusal)
    assert "was never released, so there is nothing to take back" in str(result.exception)


def test_advance__no_such_release__is_refused(empty_home: Path) -> None:
    result = CliRunner().invoke(app, ["releases", "advance", "nobody"])
    assert isinstance(result.exception, Refusal)
