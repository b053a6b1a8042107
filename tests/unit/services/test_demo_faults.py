"""What the demo of faults says of a release that was stopped, and when it counts as stopped as it should be."""

from __future__ import annotations

import io
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.core.locking import hold
from pipelines.errors import TryLater
from pipelines.params import ModelReleaseParams, override
from pipelines.release.rollout_state import Passage, RolloutState
from pipelines.release.steps import PROMOTED, ROLLED_BACK, Plan
from pipelines.release.supervision import SOCKET
from pipelines.services.demo_faults import (
    LIMITS,
    Look,
    Stopped,
    _describe,
    _own_home,
    describe_outcome,
    render_summary,
    run_faults,
)
from pipelines.services.faulty_releases import CRASHES, ERRORS, FAULTS, LABELS, SLOW, TAMPERED
from pipelines.settings import Settings
from tests.unit.release.simulated_release import EPOCH, release

LATENCY = "latency: p95 716 ms, 4 of 11 (36.4 %) slower than the limit of 500 ms, allowed 5 %"
REFUSAL = "refused: the release 9bb799eb5a7e…: was changed: its bytes have SHA-256 f458daa206ca…"
NOT_STARTED = f"it does not start: the service in the slot canary: ended while starting; the last lines:\n{REFUSAL}\n "


def stopped(reason: str, *steps: str, requests: int = 0) -> RolloutState:
    """A rollout that was rolled back out of the last of these steps."""
    passages = tuple(Passage(step, EPOCH - 60) for step in ("pending", *steps))
    return RolloutState(
        "m:2:d:1",
        release(2),
        release(1),
        Plan(ModelReleaseParams()),
        "demo",
        EPOCH,
        "5d" * 32,
        step=ROLLED_BACK,
        reason=reason,
        passages=(*passages, Passage("rolled_back", EPOCH, reason, requests)),
    )


def looks(rollback_s: float, requests: int = 311) -> list[Look]:
    """A sound one, one that found the breach, and one that came too late to see anything."""
    sound, late = Look(EPOCH - rollback_s, requests - 20, False), Look(EPOCH + 0.1, 0, False)
    return [Look(EPOCH - 30, 10, False), sound, Look(EPOCH - rollback_s / 2, requests, True), late]


def draw(renderable: object) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(renderable)
    return file.getvalue()


def test_outcome__of_a_breach_in_the_shadow__names_gate_step_and_copies() -> None:
    outcome = describe_outcome(SLOW, stopped(LATENCY, "shadow", requests=250), looks(0.6), 800, 0)
    assert (outcome.gate, outcome.step, outcome.requests) == ("latency", "shadow", 311)
    assert outcome.rollback_s == pytest.approx(0.6)
    assert outcome.as_it_should
    line = draw(render_summary([outcome])).splitlines()[1]
    assert line.split("  ")[0] == "slow"
    assert " ".join(line.split()) == "slow latency shadow 311 copies 0.6 s 0 of 800 failed"


def test_outcome__breached_at_the_first_look__counts_from_the_step_s_beginning() -> None:
    outcome = describe_outcome(SLOW, stopped(LATENCY, "shadow"), [Look(EPOCH - 1, 90, True)], 800, 0)
    assert outcome.rollback_s == 60.0


def test_outcome__of_a_changed_file__is_the_signature_before_any_step() -> None:
    outcome = describe_outcome(TAMPERED, stopped(NOT_STARTED, "shadow"), [], 200, 0)
    assert (outcome.gate, outcome.step, outcome.reason) == ("signature", "before any", REFUSAL)
    assert outcome.as_it_should
    assert "not needed" in draw(render_summary([outcome]))


def test_outcome__of_another_cause_that_it_does_not_start__is_not_the_signature() -> None:
    outcome = describe_outcome(TAMPERED, stopped("it does not start: no memory", "shadow"), [], 200, 0)
    assert outcome.gate != "signature"
    assert not outcome.as_it_should


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (describe_outcome(SLOW, stopped(LATENCY, "shadow", "canary@10"), looks(0.4), 800, 0), "after the shadow"),
        (describe_outcome(ERRORS, stopped(LATENCY, "shadow"), looks(0.4), 800, 0), "by another gate"),
        (describe_outcome(SLOW, stopped(LATENCY, "shadow"), looks(0.4), 800, 1), "with a client's request failed"),
        (describe_outcome(SLOW, stopped(LATENCY, "shadow"), looks(5.1), 800, 0), "later than promised"),
        (
            describe_outcome(SLOW, stopped("scores: differ", "shadow"), looks(0.4), 800, 0),
            "by one that is beside another's",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outcome__stopped_otherwise__is_not_as_it_should(outcome: Stopped, why: str) -> None:
    assert outcome.gate
    assert not outcome.as_it_should, why


def test_outcome__stopped_by_a_gate_on_the_same_thing__is_as_it_should() -> None:
    outcome = describe_outcome(LABELS, stopped("scores: probabilities differ by 0.4", "shadow"), looks(0.4), 800, 0)
    assert outcome.gate == "scores"
    assert outcome.as_it_should


def test_outcome__promoted__was_stopped_by_nothing() -> None:
    state = stopped("", "shadow", "canary@10", "promoted")
    state = replace(state, step=PROMOTED, passages=state.passages[:-1])
    outcome = describe_outcome(CRASHES, state, [], 800, 0)
    assert (outcome.gate, outcome.step) == ("", "promoted")
    assert not outcome.as_it_should
    assert "nothing" in draw(render_summary([outcome]))


def test_summary__of_all_faults__fits_a_terminal_of_80_columns() -> None:
    outcomes = [
        describe_outcome(fault, stopped(LATENCY, "shadow", requests=2032), looks(12.3), 12_345, 12) for fault in FAULTS
    ]
    outcomes.append(describe_outcome(TAMPERED, stopped(NOT_STARTED, "shadow"), [], 12_345, 0))
    lines = draw(render_summary(outcomes)).splitlines()
    assert len(lines) == 1 + len(outcomes)  # none is wrapped
    assert all(line.rstrip().endswith("failed") for line in lines[1:])


def test_description__of_a_reason_with_brackets__keeps_them_and_its_column() -> None:
    reason = f"agreement: 74 of 126 mirrored requests, 0.587 [0.452, 0.717], at least 0.9; {LATENCY}"
    lines = draw(_describe(describe_outcome(LABELS, stopped(reason, "shadow"), looks(0.9), 600, 0))).splitlines()
    assert lines[0].startswith("    shadow     ✓ agreement: ")
    assert "[0.452, 0.717]" in " ".join(lines)
    assert all(line.startswith(" " * 15) for line in lines[1:] if line.strip())


def test_limits__of_the_demo__are_keys_of_a_release() -> None:
    changed = override({"model_release": ModelReleaseParams().model_dump(mode="json")}, LIMITS)
    params = ModelReleaseParams.model_validate(changed["model_release"])
    assert params.shadow
    assert params.max_error_rate == 0.02


def test_run_faults__another_one_is_at_it__leaves_its_home_alone(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    kept = tmp_path / "faults" / "ledger.db"
    kept.write_bytes(b"of the first")
    with hold(tmp_path / "faults.lock", wait_s=0), pytest.raises(TryLater, match="one at a time"):
        run_faults(Settings(home=tmp_path))
    assert kept.read_bytes() == b"of the first"


def test_own_home__somebody_has_exported_a_cluster__is_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_TARGET", "kubernetes")
    with _own_home(Settings(home=tmp_path)) as own:
        assert (own.target, own.home) == ("local", tmp_path / "faults")
    assert os.environ["PERCH_TARGET"] == "kubernetes"


@pytest.mark.timeout(60)
def test_own_home__somebody_has_exported_a_supervisor__leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as supervisor:
        supervisor.bind(f"{short}/supervisor.sock")
        supervisor.listen()
        monkeypatch.setenv(SOCKET, f"{short}/supervisor.sock")
        with _own_home(Settings(home=tmp_path)):
            assert SOCKET not in os.environ
        assert os.environ[SOCKET] == f"{short}/supervisor.sock"
        assert Path(f"{short}/supervisor.sock").exists()
        supervisor.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has spoken to it
            supervisor.accept()
