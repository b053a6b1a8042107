"""`make demo-faults`: five bad releases, one after the other, each stopped by the gate that was made for it.

The services, the releases, the engine and the watchdog are the real ones, in a home of their own.  Airflow is left
out: the demo moves the engine itself, and answers for the approver.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from pipelines.core.locking import hold
from pipelines.core.results import write_json
from pipelines.core.workspace import Workspace
from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.params import load_params
from pipelines.release.approvals import ApprovalRequest, Response
from pipelines.release.engine import ROLL_BACK, ReleaseEngine, look
from pipelines.release.history import describe_step
from pipelines.release.policy import PromotionPolicy
from pipelines.release.rollout_state import RolloutState
from pipelines.release.steps import SHADOW
from pipelines.release.world import World
from pipelines.services.demo_release import DemoTraffic
from pipelines.services.faulty_releases import (
    FAULTS,
    LABELS,
    TAMPERED,
    Fault,
    faulty_code,
    flip_byte,
    write_swapped_digits,
)
from pipelines.services.programs import SERVICES_OF, Program, watchdog_program
from pipelines.services.rollouts import begin_release, find_rollout, open_world
from pipelines.services.stack import Stack, choose_ports
from pipelines.settings import Settings, get_settings

if TYPE_CHECKING:
    from pipelines.stages.deploy_to_staging import DeployToStagingResult

MODEL = "digits-classification"
REQUESTS_PER_S = 60.0
WORKERS = 2  # each must see the images after which its fault begins, also on a machine of many cores
# A step takes at least 15 s, for the faults begin after some seconds of traffic; a breach ends it at any time.
LIMITS = {"model_release.min_step_s": 15, "model_release.max_step_s": 120, "model_release.max_error_rate": 0.02}
# Enough to learn the digits; the demo is about what comes after.
_TRAINING = {"model_training.epochs": 8, "model_training.int8": False}
_STAGING = {"deploy_to_staging.golden_images": 25, "deploy_to_staging.latency_requests": 25}
_LOOK_EVERY_S, _ADVANCE_EVERY_S, _LIMIT_S = 0.1, 1.0, 240.0
_KEPT = "dvc-cache"
MOST_ROLLBACK_S = 5.0  # what a release is promised


@dataclass(frozen=True)
class Stopped:
    """How a bad release was stopped.

    Attributes:
        fault: what was wrong.
        gate: that stopped it; empty where it was promoted.
        step: in which, e.g. `shadow`.
        requests: that the canary had got in that step, when the gate had seen enough.
        rollback_s: seconds from the last look that found no breach to the traffic being back; None where none ever went
            to the canary.
        sent: requests of clients meanwhile.
        failed: of these, not answered with 200.
        reason: in the engine's words.
    """

    fault: Fault
    gate: str
    step: str
    requests: int
    rollback_s: float | None
    sent: int
    failed: int
    reason: str

    @property
    def as_it_should(self) -> bool:
        """Whether the gate made for it stopped it in time, before any client got an answer of it."""
        was_quick = self.rollback_s is None or self.rollback_s <= MOST_ROLLBACK_S
        in_shadow = self.step in ("shadow", "before any")
        by_its_gate = self.gate in (self.fault.gate, *self.fault.beside)
        return by_its_gate and in_shadow and was_quick and self.failed == 0


@dataclass(frozen=True)
class Look:
    """What one look at the gates has found.

    Attributes:
        began: seconds since the epoch.
        requests: that the canary had got in the step.
        found_breach: whether a gate said roll back.
    """

    began: float
    requests: int
    found_breach: bool


class _DemoAnswers:
    """Answers each request with a yes, in the approver's place."""

    def responses(self, request: ApprovalRequest) -> Sequence[Response]:
        """The yes to what was asked."""
        return [Response("approver", datetime.now(UTC), True, request.evidence_sha256, "the demo's own answer")]


def run_faults(settings: Settings) -> None:
    """Serve a good model under traffic, release five bad ones, and print what stopped each.

    Args:
        settings: whose home holds the demo's own one, `faults`; what an earlier demo left in it is removed.

    Raises:
        PerchError: one was not stopped as it should have been, or a part did not work.
        TryLater: another demo of faults has the home.
    """
    console = Console(highlight=False)
    with hold(settings.home / "faults.lock", wait_s=0), _own_home(settings) as own:
        # `kill` must end the services as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        shown = (
            own.home.relative_to(settings.project_dir) if own.home.is_relative_to(settings.project_dir) else own.home
        )
        console.print(f"[bold]Perch demo of faults[/bold] · everything stays in {shown}/")
        stack = Stack(own)
        try:
            outcomes = _run(own, stack, console)
        finally:
            with console.status("ending the services"):
                stack.down()
    console.print(render_summary(outcomes))
    wrong = [outcome for outcome in outcomes if not outcome.as_it_should]
    if wrong:
        lines = "\n  ".join(f"{outcome.fault.name}: {outcome.reason or 'promoted'}" for outcome in wrong)
        raise PerchError(f"{len(wrong)} of {len(outcomes)} were not stopped as they should be:\n  {lines}")


def render_summary(outcomes: Sequence[Stopped]) -> Table:
    """A row for each fault; fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    for title in ("fault", "stopped by", "in", "after", "to weight 0", "clients"):
        table.add_column(title, no_wrap=True)
    for outcome in outcomes:
        style = "green" if outcome.as_it_should else "red"
        table.add_row(
            outcome.fault.name,
            f"[{style}]{outcome.gate or 'nothing'}[/{style}]",
            outcome.step,
            f"{outcome.requests:,} copies" if outcome.step == "shadow" else f"{outcome.requests:,} requests",
            "not needed" if outcome.rollback_s is None else f"{outcome.rollback_s:.1f} s",
            f"{outcome.failed:,} of {outcome.sent:,} failed",
        )
    return table


def _run(settings: Settings, stack: Stack, console: Console) -> list[Stopped]:
    began = time.monotonic()
    with console.status("training v1, which will be the champion"):
        _train(settings, "week-1", {"data_ingestion.as_of": "2026-11-01"})
    with console.status("training v2, a good model whose service will be spoiled"):
        _train(settings, "week-2", {"data_ingestion.as_of": "2026-11-08"})
    with console.status("training v3 on swapped labels"):
        write_swapped_digits(settings.home / "swapped-digits")
        _train(settings, "swapped", {"data_ingestion.source": str(settings.home / "swapped-digits")})
    with console.status("starting Envoy, the slots and the watchdog") as spinner:
        _start(stack, settings, spinner.update)
        _release_champion(settings)
    console.print(
        f"  champion  {MODEL} v1 is live after {time.monotonic() - began:.0f} s\n"
        f"  clients   {REQUESTS_PER_S:.0f} recorded digits per second; the demo answers for the approver\n"
    )
    outcomes = []
    for number, fault in enumerate(FAULTS, start=1):
        console.print(f"[bold]{number} {fault.name}[/bold] · {fault.description}")
        with console.status("packaging it, and asking it in staging"):
            staged = _stage(settings, fault)
        console.print(f"    staging    {staged.summary}: {fault.unseen}")
        with console.status("releasing it") as spinner:
            outcome = _release(settings, stack, fault, staged.release_sha256, spinner.update)
        outcomes.append(outcome)
        console.print(_describe(outcome))
    return outcomes


def _describe(outcome: Stopped) -> Padding:
    """Where it was stopped, and why."""
    grid = Table.grid(padding=(0, 1), expand=False)
    grid.add_column(width=10)
    grid.add_column(max_width=64)
    mark = "[green]✓[/green]" if outcome.as_it_should else "[red]✗[/red]"
    grid.add_row(outcome.step, f"{mark} {escape(outcome.reason) or 'nothing stopped it'}")
    return Padding(grid, (0, 0, 1, 4), expand=False)


def _train(settings: Settings, run_id: str, overrides: dict[str, object]) -> None:
    """All stages of a run, in processes of their own."""
    pairs = [f"--set={key}={value}" for key, value in {**_TRAINING, **_STAGING, **overrides}.items()]
    command = [sys.executable, "-m", "pipelines", "run", "--run", run_id, *pairs]
    done = subprocess.run(command, cwd=settings.project_dir, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PerchError(f"the run {run_id} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _start(stack: Stack, settings: Settings, report: Callable[[str], None]) -> None:
    ports = choose_ports()
    watchdog = watchdog_program(settings, ports)
    # No server of MLflow or Airflow runs here; the registry is the file.
    environment = {name: value for name, value in watchdog.environment.items() if not name.endswith("_URI")}
    program: Program = replace(watchdog, environment=environment)
    stack.supervise([program], ports)
    stack.open_to_clients(report, program)


def _release_champion(settings: Settings) -> None:
    state = begin_release(settings, 1, requested_by="demo")
    deadline = time.monotonic() + _LIMIT_S
    engine = ReleaseEngine(_world(settings), "demo")
    while not state.is_finished:
        if time.monotonic() > deadline:
            raise TryLater("the first release did not become live\n  what to do: try again")
        with suppress(TryLater):
            state = engine.advance(state.rollout_id)
        time.sleep(_LOOK_EVERY_S)


def _stage(settings: Settings, fault: Fault) -> DeployToStagingResult:
    """Package a version with the fault, and have it pass in staging."""
    from pipelines.stages import deploy_to_staging
    from pipelines.stages.model_packaging import package_version

    version, run_id = (3, "swapped") if fault is LABELS else (2, "week-2")
    with faulty_code(fault) as code:
        package = package_version(settings, MODEL, version, make_key=True, code=code)
    workspace = Workspace(settings.runs_dir / run_id)
    # What the stage `model_packaging` would leave for the next one.
    write_json(workspace.result_file("model_packaging"), {"version": str(version), "release_sha256": package.digest})
    return deploy_to_staging.run(load_params(workspace.params_file), workspace)


def _release(settings: Settings, stack: Stack, fault: Fault, digest: str, report: Callable[[str], None]) -> Stopped:
    """Release it under traffic, and see what happens."""
    traffic = DemoTraffic(settings, stack.target.client_url(), REQUESTS_PER_S)
    with traffic.flowing():
        state = begin_release(settings, 3 if fault is LABELS else 2, requested_by="demo", overrides=LIMITS)
        if fault is TAMPERED:
            flip_byte(settings, digest)
        with _advancing(settings, state.rollout_id):
            state, looks = _follow(settings, state, traffic, report)
    return describe_outcome(fault, state, looks, traffic.sent, traffic.failed)


def describe_outcome(fault: Fault, state: RolloutState, looks: Sequence[Look], sent: int, failed: int) -> Stopped:
    """What stopped a release, from where it ended and what was seen on the way."""
    passed, last = state.passages[-2:]
    # A rollback's passage is written once the traffic has moved; a look that began later saw an emptied slot.
    before = [look for look in looks if look.began < last.at]
    sound_at = max((look.began for look in before if not look.found_breach), default=passed.at if looks else None)
    is_stopped = last.step == "rolled_back"
    not_started = state.reason.startswith("it does not start: ")
    # The service's own last words are the reason there.
    refusal = next((line for line in state.reason.splitlines() if line.startswith("refused: ")), "")
    is_signature = not_started and "was changed" in refusal
    gate = "signature" if is_signature else state.reason.partition(":")[0]
    return Stopped(
        fault=fault,
        gate=gate if is_stopped else "",
        # A canary that does not start has not reached the step that it was to enter.
        step="before any" if not_started else describe_step(passed.step if is_stopped else last.step),
        requests=max([last.requests, *(look.requests for look in before)]),
        rollback_s=None if sound_at is None else last.at - sound_at,
        sent=sent,
        failed=failed,
        reason=refusal if is_signature else state.reason,
    )


def _follow(
    settings: Settings, state: RolloutState, traffic: DemoTraffic, report: Callable[[str], None]
) -> tuple[RolloutState, list[Look]]:
    """Look until it is over, or a breach is found and it is over.

    Returns:
        The state at its end, and the looks at which the canary said something.
    """
    world = _world(settings)
    looks: list[Look] = []
    deadline = time.monotonic() + _LIMIT_S
    while not state.is_finished:
        if time.monotonic() > deadline:
            raise TryLater(f"{state.rollout_id} neither ended nor went on\n  what to do: try again")
        with suppress(TryLater):
            if state.step.is_watched and state.settled and not (looks and looks[-1].found_breach):
                began, reading = time.time(), look(world, state)[1]
                if reading.gates:
                    looks.append(Look(began, reading.requests, reading.verdict == ROLL_BACK))
            state = find_rollout(settings, state.rollout_id)
            report(f"{_where(state)} · {traffic.sent:,} requests of clients, {traffic.failed:,} failed")
        time.sleep(_LOOK_EVERY_S)
    return state, looks


def _where(state: RolloutState) -> str:
    requests = state.reading.requests if state.reading else 0
    if not state.step.is_watched:
        return describe_step(state.step.name)
    return f"{describe_step(state.step.name)} · {requests:,} {'copies' if state.step == SHADOW else 'requests'}"


@contextmanager
def _advancing(settings: Settings, rollout_id: str) -> Iterator[None]:
    """Have the engine look once a second, as the DAG would."""
    stop, engine = threading.Event(), ReleaseEngine(_world(settings), "demo")

    def advance() -> None:
        while not stop.wait(_ADVANCE_EVERY_S):
            with suppress(TryLater, Refusal):
                engine.advance(rollout_id)

    thread = threading.Thread(target=advance, daemon=True, name="engine")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)


def _world(settings: Settings) -> World:
    return replace(open_world(settings, policy=PromotionPolicy()), approvals=_DemoAnswers())


@contextmanager
def _own_home(settings: Settings) -> Iterator[Settings]:
    """Settings of a home below the usual one, empty but for the cache of stages; also for the processes begun in it."""
    home = settings.home / "faults"
    own = {
        "PERCH_HOME": str(home),
        SERVICES_OF: str(home),  # so that the next demo ends a training that this one, killed, leaves behind
        "PERCH_PROJECT_DIR": str(settings.project_dir),
        "PERCH_TARGET": "local",  # whatever is exported: no cluster gets bad releases
        "PERCH_SERVING_FLUSH_INTERVAL_S": "2",  # agreement is read from what was kept
        "PERCH_SERVING_WORKERS": str(WORKERS),
    }
    kept = {name: os.environ[name] for name in os.environ if name in own or _is_place(name)}
    for name in kept:
        del os.environ[name]
    os.environ |= own
    get_settings.cache_clear()
    try:
        Stack(get_settings()).down()  # an earlier demo's, and nobody else's, whose supervisor the environment may name
        for entry in home.iterdir() if home.is_dir() else ():
            if entry.name != _KEPT:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        yield get_settings()
    finally:
        for name in own:
            del os.environ[name]
        os.environ |= kept
        get_settings.cache_clear()


def _is_place(name: str) -> bool:
    """Whether a variable names a place or a file of other releases, which the demo must leave alone."""
    return name.startswith("PERCH_") and name.endswith(
        ("_URL", "_URI", "_HOME", "_DIR", "_KEY", "_KEYS", "_FILE", "_POLICY", "_SOCKET")
    )
