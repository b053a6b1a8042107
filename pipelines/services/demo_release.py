"""The demo's releases: an answer as the approver, requests as a client, and each step of the rollout as it happens."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, pairwise

import httpx
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipelines.errors import PerchError, Refusal, TryLater
from pipelines.release.airflow_approvals import AirflowApprovals, Ask
from pipelines.release.engine import look
from pipelines.release.history import describe_deviations, describe_step, quote_reason
from pipelines.release.rollout_state import RolloutState, StepReading
from pipelines.release.steps import PENDING, ROLLED_BACK
from pipelines.services.airflow_client import AirflowClient
from pipelines.services.rollouts import list_rollouts, open_world
from pipelines.services.secrets import ensure_demo_key
from pipelines.settings import Settings

APPROVER = "approver"
# Minutes instead of an hour: an error-free canary shows an error rate below 2 % after some 80 requests, below the
# usual 0.1 % after 1,700.  The gates and their risks are the usual ones.
LIMITS = {
    "model_release.min_step_s": 5,
    "model_release.max_step_s": 600,
    "model_release.max_error_rate": 0.02,
}
REQUESTS_PER_S = 30.0
_COMMENT = "the demo's own answer"
_ASK_LIMIT_S = 240.0
_WIDTH = 13


class DemoTraffic:
    """Recorded digits, sent as PNG to the clients' address by one client at a steady rate.

    Attributes:
        sent: requests that were answered or failed.
        failed: those without an answer, or answered with another status than 200.
    """

    def __init__(self, settings: Settings, uri: str, requests_per_s: float = REQUESTS_PER_S) -> None:
        self.sent = 0
        self.failed = 0
        self._uri = f"{uri}/v1/predict"
        self._headers = {"X-API-Key": ensure_demo_key(settings), "Content-Type": "image/png"}
        self._every_s = 1 / requests_per_s
        self._stop = threading.Event()

    @contextmanager
    def flowing(self) -> Iterator[DemoTraffic]:
        """Send for the time of the block."""
        thread = threading.Thread(target=self._send, daemon=True, name="demo-traffic")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join(timeout=30)

    def _send(self) -> None:
        bodies = cycle(recorded_digits())
        due = time.monotonic()
        with httpx.Client(timeout=10, headers=self._headers) as client:
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                # A client that was held up goes on at its rate, and does not make up for the pause.
                due = max(due + self._every_s, time.monotonic())
                try:
                    answered = client.post(self._uri, content=next(bodies)).status_code == httpx.codes.OK
                except httpx.TransportError:
                    answered = False
                self.sent += 1
                self.failed += not answered


def recorded_digits() -> list[bytes]:
    """The digits that come with scikit-learn, in their order, as PNG files of 8 x 8 grey pixels."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    files = []
    for values in load_digits().images:  # 8 x 8 floats from 0 to 16
        file = io.BytesIO()
        Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8)).save(file, format="PNG")
        files.append(file.getvalue())
    return files


def follow_release(
    settings: Settings, console: Console, admin: AirflowClient, approver: AirflowClient, uri: str, version: str
) -> RolloutState:
    """Answer for a version's release, send requests while it rolls out, and show each step.

    Args:
        settings: where things are.
        console: shows it.
        admin: Airflow as the user who may see its runs.
        approver: Airflow as the user who approves.
        uri: where clients ask.
        version: in the registry.

    Raises:
        PerchError: it was rolled back; the message says why.
        TryLater: nobody asked for an approval in time.
    """
    state = _find(settings, version)
    if state is None or not state.is_finished:
        with console.status(f"waiting for model_release to ask for an approval of v{version}"):
            _answer(settings, console, admin, approver, version)
            state = _find(settings, version)
    else:
        console.print(f"  release of v{version} · done before")
    if state is None:
        raise TryLater(f"the release of v{version} is gone\n  what to do: `perch releases`")
    if state.is_finished:
        # Also where somebody took it back since: that was said then, and what serves now is shown below.
        _print_steps(console, state)
        return state
    traffic = DemoTraffic(settings, uri)
    if state.is_first:
        state = _watch(settings, console, state, None)
    else:
        usual = f"the demo sends {REQUESTS_PER_S:.0f} recorded digits per second as a client"
        console.print(f"      [dim]{usual}; steps of {LIMITS['model_release.min_step_s']} s, error rate < 2 %[/dim]")
        with traffic.flowing():
            state = _watch(settings, console, state, traffic)
    if not console.is_terminal:
        console.print()  # a live display leaves the line open there
    _require_promoted(state)
    if traffic.sent:
        console.print(f"      {'clients':<{_WIDTH}}{traffic.sent:,} requests in all, {traffic.failed:,} failed")
    for title, line in zip(("forecast", "", "", "", ""), describe_deviations(state), strict=False):
        console.print(f"      [dim]{title:<{_WIDTH}}{line}[/dim]")
    return state


def _answer(settings: Settings, console: Console, admin: AirflowClient, approver: AirflowClient, version: str) -> None:
    """Approve as a person would, through Airflow's API; not where somebody has answered already."""
    deadline = time.monotonic() + _ASK_LIMIT_S
    while time.monotonic() < deadline:
        state = _find(settings, version)
        if state is not None and (state.step != PENDING or not state.settled):
            return
        ask = _open_ask(admin, state.release.model, version) if state else None
        if ask is not None:
            try:
                AirflowApprovals(approver).answer(ask, approve=True, comment=_COMMENT)
            except Refusal:
                time.sleep(1)
                continue
            console.print(f'  release of v{version} approved by the {APPROVER}: "{_COMMENT}"')
            return
        time.sleep(1)
    raise TryLater(
        f"model_release asked for no approval of v{version} in {_ASK_LIMIT_S:.0f} s\n"
        "  what to do: look at the runs of model_release in Airflow, then `make demo` again"
    )


def _open_ask(admin: AirflowClient, model: str, version: str) -> Ask | None:
    with suppress(TryLater):
        return next(iter(AirflowApprovals(admin).open_asks(model, version)), None)
    return None


def _find(settings: Settings, version: str) -> RolloutState | None:
    """The last rollout of a version."""
    return next((state for state in reversed(list_rollouts(settings)) if state.release.version == version), None)


def _watch(settings: Settings, console: Console, state: RolloutState, traffic: DemoTraffic | None) -> RolloutState:
    world = open_world(settings, patient=False)
    readings: dict[str, StepReading] = {}
    with Live(Text(""), console=console, auto_refresh=False) as live:
        while True:
            with suppress(TryLater):
                if state.step.is_watched and state.settled:
                    readings[state.step.name] = look(world, state)[1]
                elif state.step.is_watched and state.reading:
                    readings[state.step.name] = state.reading
            ending = f"  ({traffic.sent:,} requests sent)" if traffic and not state.is_finished else ""
            lines = [
                *step_lines(state, readings),
                *([f"      [{describe_step(state.step.name)}]{ending}"] if ending else []),
            ]
            live.update(Text("\n".join(lines)), refresh=True)
            if state.is_finished:
                return state
            time.sleep(1)
            with suppress(TryLater):
                state = _find(settings, state.release.version) or state


def step_lines(state: RolloutState, readings: dict[str, StepReading]) -> list[str]:
    """A line for each step that the rollout has reached.

    Args:
        state: of the rollout.
        readings: the last that was seen of each step's gates, by the step's name.
    """
    lines = []
    for passage, following in pairwise((*state.passages, None)):
        if passage is None or passage.step == PENDING.name:
            continue
        name, reading = describe_step(passage.step), readings.get(passage.step)
        if passage.step == "promoted":
            previous = f" · previous v{state.champion.version} kept warm" if state.champion else ""
            first = "" if state.champion else " · no champion yet, canary skipped"
            lines.append(f"      {'live':<{_WIDTH}}champion: v{state.release.version}{previous}{first}")
        elif passage.step == ROLLED_BACK.name:
            lines.append(f"      {name:<{_WIDTH}}{quote_reason(state.reason)}")
        else:
            left = following is not None and following.step != ROLLED_BACK.name
            requests = following.requests if following else (reading.requests if reading else 0)
            kind = "mirrored requests" if passage.step == "shadow" else "requests"
            verdict = f"promoted after {requests:,} {kind}" if left else f"{requests:,} {kind} so far"
            lines.append(f"      {name:<{_WIDTH}}{verdict}{_numbers(passage.step, reading)}")
    return lines


def _numbers(step: str, reading: StepReading | None) -> str:
    """What the gates said last, in a line of its own that fits into 80 columns."""
    texts = {gate.name: gate.text for gate in reading.gates} if reading else {}
    if step == "shadow":
        agreement = texts.get("agreement", "").replace("same label as the champion in", "agreement")
        parts = [agreement.replace(" mirrored requests", "")]
    else:
        # Up to where the sentence turns to the stable slot, or to the requests beyond the limit.
        parts = [texts.get("errors", "").split(";")[0], texts.get("latency", "").split(",")[0]]
    # The last look at a step may have been a moment before the one that let it pass.
    shown = " · ".join(part for part in parts if part and not part.startswith("no verdict without"))
    return f"\n      {'':<{_WIDTH}}{shown}" if shown else ""


def _print_steps(console: Console, state: RolloutState) -> None:
    for line in step_lines(state, {}):
        console.print(Text(line))


def _require_promoted(state: RolloutState) -> RolloutState:
    if state.step == ROLLED_BACK:
        raise PerchError(
            f"the release of v{state.release.version} was rolled back: {state.reason}\n"
            "  what to do: `perch releases` says how it went; `perch releases begin` begins another one"
        )
    return state
