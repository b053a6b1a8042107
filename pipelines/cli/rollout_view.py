"""How rollouts look in a terminal of 80 columns."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pipelines.core.champions import Champions
    from pipelines.release.rollout_state import GateReading, RolloutState, StepReading
    from pipelines.release.targets import TargetState

_BAR = 10
_STYLES = {"promote": "green", "roll back": "bold red", "need more data": "yellow"}
_OUTCOMES = {"promoted": "green", "rolled back": "red"}


def render_history(model: str, champions: Champions, states: list[RolloutState]) -> Group:
    """All rollouts of a model, newest first."""
    from pipelines.release.history import summarise

    head = Text(model, style="bold")
    for name, version in champions.as_aliases().items():
        head.append(f"   {name} v{version}" if version else f"   no {name}", style="not bold")
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("began (UTC)", no_wrap=True)
    table.add_column("version", style="bold", no_wrap=True)
    table.add_column("now", no_wrap=True)
    table.add_column("how", overflow="fold")
    for state in reversed(states):
        entry = summarise(state)
        lines = [
            f"approved by {entry.approved}" if entry.approved else "",
            f"{entry.course} requests" if entry.course else "",
            entry.reason,
            entry.forecast,
        ]
        table.add_row(
            f"{entry.began:%Y-%m-%d %H:%M}",
            entry.version,
            Text(entry.outcome, style=_OUTCOMES.get(entry.outcome, "yellow")),
            Text("\n".join(line for line in lines if line)),
        )
    return Group(head, table)


def render_rollout(state: RolloutState, actual: TargetState | None, reading: StepReading | None, now: float) -> Group:
    """One rollout as it stands: weights, each gate's verdict, and what evidence is still missing."""
    from pipelines.release.history import describe_deviations, describe_step, quote_reason

    since = datetime.fromtimestamp(state.entered_at, UTC)
    head = Text(state.release.model, style="bold")
    serves = state.release if state.step.name == "promoted" else state.champion
    champion = f"champion v{serves.version}" if serves else "no champion yet"
    if state.step.is_watched:
        at = "in the shadow" if state.step.percent == 0 else f"at {state.step.percent} %"
        doing = f"canary v{state.release.version} {at} since {since:%H:%M:%S}"
    else:
        doing = f"v{state.release.version} {describe_step(state.step.name)} since {since:%H:%M:%S}"
    head.append(f"   {champion}   {doing}", style="not bold")
    lines: list[Text | Table] = [head]
    if actual is None:
        lines.append(Text("  the target does not answer", style="bold red"))
    elif actual.routing != state.step.routing:
        lines.append(Text(f"  in force: {actual.routing.canary_percent} % to the canary", style="bold red"))
    if reading is not None and state.step.is_watched:
        lines.append(_render_gates(reading))
        lines.append(Text(f"  stable     {reading.stable_requests:,} requests in the same window"))
        if prober := _describe_prober(state, reading):
            lines.append(Text(f"  prober     {prober}"))
        lines.append(Text(f"  {_describe_next(state, reading, now)}", style=_STYLES.get(reading.verdict, "")))
    if state.waiting_for and not state.is_finished:
        lines.append(Text(f"  waits for {state.waiting_for}", style="yellow"))
    if state.reason:
        lines.append(Text(f"  {quote_reason(state.reason)}", style="red"))
    if state.is_finished:
        lines.extend(Text(f"  {line}", style="dim") for line in describe_deviations(state))
    return Group(*lines)


def _render_gates(reading: StepReading) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True, justify="right")
    for gate in reading.gates:
        table.add_row(f"  {gate.name}", Text(gate.text), _render_verdict(gate))
    return table


def _render_verdict(gate: GateReading) -> Text:
    if gate.evidence and gate.verdict != "promote":
        filled = round(_BAR * gate.evidence)
        bar = "▇" * filled + "▁" * (_BAR - filled)
        return Text(f"rollback {gate.evidence:4.0%} {bar}", style="red")
    word = {"promote": "ok", "need more data": "more data"}.get(gate.verdict, gate.verdict)
    return Text(word, style=_STYLES.get(gate.verdict, ""))


def _describe_prober(state: RolloutState, reading: StepReading) -> str:
    params = state.plan.params
    if not params.probe_requests_per_s:
        return ""
    most = f"at most {params.probe_requests_per_s:g} per second"
    if params.count_probes:
        return f"{reading.probes:,} of the canary's requests were probes; {most}"
    return f"{reading.uncounted_probes:,} probes to the canary, no evidence; {most}"


def _describe_next(state: RolloutState, reading: StepReading, now: float) -> str:
    if reading.verdict != "need more data":
        left_s = state.plan.params.min_step_s - state.elapsed_s
        if reading.verdict == "promote" and left_s > 0:
            return f"all gates say promote; the step lasts {left_s:.0f} s more"
        return f"verdict: {reading.verdict} ({reading.reason})"
    remaining = [gate.remaining_requests for gate in reading.gates if gate.remaining_requests]
    if not remaining:
        return f"need more data ({reading.reason})"
    per_s = reading.requests / max(now - state.entered_at, 1.0)
    time_left = f" ({max(remaining) / per_s:.0f} s)" if per_s > 0 else ""
    return f"next verdict expected in ~{max(remaining):,} requests{time_left}"
