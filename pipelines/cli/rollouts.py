"""`perch releases`, `perch rollback` and `perch watchdog`: how releases go, taking one back, and who watches them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Group

    from pipelines.release.rollout_state import RolloutState
    from pipelines.release.world import World

app = typer.Typer(help="List releases, begin one, move one on, or watch one.", no_args_is_help=False)

ModelOption = Annotated[str, typer.Option("--model", help="Registered model; the one of params.yaml by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON in the last line.")]
_FAILING_LIMIT_S = 60.0


@app.callback(invoke_without_command=True)
def list_releases(context: typer.Context, model: ModelOption = "") -> None:
    """List a model's releases: when, which version, how far, approved by whom, on how many requests, why it ended."""
    if context.invoked_subcommand is not None:
        return
    from pipelines.cli.models import default_params
    from pipelines.cli.rollout_view import render_history
    from pipelines.services.rollouts import list_rollouts, read_champions
    from pipelines.settings import get_settings

    settings, console = get_settings(), Console(highlight=False)
    name = model or default_params().model_name
    states = list_rollouts(settings, name)
    if not states:
        console.print(f"{name} was never released; `perch releases begin` begins with it.")
        return
    console.print(render_history(name, read_champions(settings, name), states))


@app.command("begin")
def begin(
    version: Annotated[
        str, typer.Argument(help="Number of the version; the last that passed in staging by default.")
    ] = "",
    model: ModelOption = "",
    by: Annotated[str, typer.Option("--by", help="Who asks for the release; by default whoever is logged in.")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="E.g. model_release.min_step_s=60, for this one; repeatable."),
    ] = None,
    conf: Annotated[str, typer.Option("--conf", help="The same as one JSON object of dotted keys.")] = "{}",
    as_json: JsonOption = False,
) -> None:
    """Begin the release of a version that has passed in staging: says what its gates need, and waits for approval."""
    import getpass

    from pipelines.cli.models import parse_version
    from pipelines.cli.stages import parse_overrides
    from pipelines.core.own_command import make_runnable
    from pipelines.release.history import as_result
    from pipelines.services.airflow_access import how_to_release
    from pipelines.services.rollouts import begin_release, write_approval_page
    from pipelines.settings import get_settings

    settings = get_settings()
    number = parse_version(version) if version else None
    overrides = parse_overrides(set_, conf)
    state = begin_release(settings, number, requested_by=by or getpass.getuser(), model=model, overrides=overrides)
    typer.echo(f"{state.rollout_id}  asked for by {state.requested_by}, evidence {state.evidence_sha256[:12]}")
    for step in state.forecast.get("steps", []):
        typer.echo(f"  {step['sentence']}")
    if not as_json and state.step.name == "pending":
        typer.echo(make_runnable(f"  nobody is asked yet: {how_to_release(settings, state.release.version)}"))
    if as_json:
        page = write_approval_page(settings, state)
        asked = {
            "subject": page.subject,
            "body": page.body,
            "deadline": page.deadline.isoformat(),
            "approvals": page.approvals,
        }
        typer.echo(json.dumps(as_result(state) | asked))


@app.command("advance")
def advance(
    rollout: Annotated[str, typer.Argument(help="Id of the release; what is under way by default.")] = "",
    until: Annotated[
        str, typer.Option("--until", metavar="STEP", help="Go on until this step is reached, e.g. canary@50.")
    ] = "",
    every_s: Annotated[float, typer.Option("--every", help="Seconds from look to look.")] = 1.0,
    for_s: Annotated[float, typer.Option("--for", help="Seconds after which to end with 75, not there yet.")] = 0.0,
    model: ModelOption = "",
    as_json: JsonOption = False,
) -> None:
    """Look at a release and take the step that is due, if any; with --until, again and again.

    Exit codes: 0 the step is reached, or without --until one look was taken; 65 it was rolled back; 75 not there yet.
    """
    from pipelines.release.history import as_result
    from pipelines.services.rollouts import find_rollout, open_engine
    from pipelines.settings import get_settings

    settings = get_settings()
    state = find_rollout(settings, rollout, model)
    _require_step(state, until)
    engine = open_engine(settings)
    state = _go_on(lambda: engine.advance(state.rollout_id), until, every_s, for_s)
    if as_json:
        typer.echo(json.dumps(as_result(state)))
    if until:
        _refuse_rolled_back(state)


@app.command("weigh")
def weigh(
    rollout: Annotated[str, typer.Argument(help="Id of the release; what is under way by default.")] = "",
    model: ModelOption = "",
    as_json: JsonOption = False,
) -> None:
    """Say what the recorded answers to a release amount to under the promotion policy; changes nothing."""
    from dataclasses import asdict

    from pipelines.services.rollouts import find_rollout, open_engine
    from pipelines.settings import get_settings

    settings = get_settings()
    decision = open_engine(settings).weigh(find_rollout(settings, rollout, model).rollout_id)
    lines = [decision.reason, *(f"does not count: {denial.reason}" for denial in decision.denials)]
    typer.echo("\n".join([decision.outcome, *(f"  {line}" for line in lines if line)]))
    if as_json:
        result = {
            "outcome": decision.outcome,
            "reason": decision.reason,
            "approvals": [
                {"by": answer.responder, "at": answer.responded_at.isoformat(), "source": answer.source}
                for answer in decision.approvals
            ],
            "denials": [asdict(denial) for denial in decision.denials],
        }
        typer.echo(json.dumps(result))


@app.command("watch")
def watch(
    model: ModelOption = "",
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
) -> None:
    """Show the release that is under way, live: weights, verdicts, evidence that is missing; ends with the release."""
    import time

    from rich.live import Live

    from pipelines.cli.models import default_params
    from pipelines.services.rollouts import find_rollout, open_world
    from pipelines.settings import get_settings

    settings, console = get_settings(), Console(highlight=False)
    name = model or default_params().model_name
    world = open_world(settings, patient=False)
    state = find_rollout(settings, model=name)
    if once or not console.is_terminal:
        console.print(_view(world, state))
        return
    with Live(_view(world, state), console=console, auto_refresh=False) as live:
        while not state.is_finished:
            time.sleep(1)
            state = find_rollout(settings, state.rollout_id)
            live.update(_view(world, state), refresh=True)


def rollback(
    model: Annotated[str, typer.Argument(help="Registered model; the one of params.yaml by default.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why, for the ledger.")] = "by hand",
    version: Annotated[
        str, typer.Option("--version", help="Take this version back; by default what is under way, else the last one.")
    ] = "",
) -> None:
    """Give all traffic back to the champion, or after a promotion to the one before; ends with 0 once it has moved."""
    import getpass

    from pipelines.cli.models import default_params, parse_version
    from pipelines.release.rollback import roll_back
    from pipelines.services.rollouts import open_world
    from pipelines.settings import get_settings

    outcome = roll_back(
        open_world(get_settings()),
        model or default_params().model_name,
        reason=reason,
        by=getpass.getuser(),
        version=str(parse_version(version)) if version else None,
    )
    typer.echo(outcome.text)


def watchdog() -> None:
    """Watch every release once per second, and ledger and aliases, until ended; takes traffic away, gives none.

    Where `model_release.probe_requests_per_s` asks for it, it also sends test images when clients send too little.
    """
    import logging
    import signal
    import threading

    from pipelines.cli.models import default_params
    from pipelines.notices import send_notice
    from pipelines.registry.aliases import find_alias_contradictions
    from pipelines.registry.ledger_watch import LedgerWatch
    from pipelines.release.audit import Audit
    from pipelines.release.watchdog import Watchdog
    from pipelines.services.probing import open_prober
    from pipelines.services.rollouts import open_world
    from pipelines.settings import get_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings, stop = get_settings(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def compare_aliases() -> list[str]:
        return find_alias_contradictions(settings, default_params().model_registration.candidate_alias)

    # Each in its own thread: the one waits for MLflow, and the rows are looked at while that is away.
    for audit in (
        Audit(LedgerWatch(settings.ledger_url).find_changes, send_notice, looks=1),
        Audit(compare_aliases, send_notice),
    ):
        threading.Thread(target=audit.run, args=(stop,), daemon=True, name="audit").start()
    # In its own thread too: probes wait for answers, and one that fails only means less evidence.
    prober = open_prober(settings)
    threading.Thread(target=prober.run, args=(stop,), daemon=True, name="prober").start()
    logging.info("watching releases")
    Watchdog(open_world(settings, patient=False), _alert_aside).run(stop)


def _alert_aside(title: str, text: str) -> None:
    """Send a notice from another thread: a mail server that hangs must not hold up the next look."""
    import threading

    from pipelines.notices import send_notice

    threading.Thread(target=send_notice, args=(title, text), daemon=True).start()


def _go_on(look: Callable[[], RolloutState], until: str, every_s: float, for_s: float) -> RolloutState:
    import time

    from pipelines.errors import TryLater

    began = last_success = time.monotonic()
    shown = ""
    while True:
        try:
            state = look()
            last_success = time.monotonic()
            shown = _show_progress(state, shown)
            if not until or state.is_finished or _has_reached(state, until):
                return state
        except TryLater:
            if not until or time.monotonic() - last_success > _FAILING_LIMIT_S:
                raise
        if for_s and time.monotonic() - began > for_s:
            raise TryLater(f"the release has not reached {until} after {for_s:g} s\n  what to do: nothing; call again")
        time.sleep(every_s)


def _show_progress(state: RolloutState, shown: str) -> str:
    """Print a step when it is reached, and what is waited for when that changes."""
    line = f"{state.release.model} v{state.release.version}  {state.step.name}"
    passage = state.passages[-1]
    if passage.requests or passage.reason:
        line += f"  after {passage.requests:,} requests: {passage.reason}"
    if state.waiting_for:
        line += f"  waits for {state.waiting_for}"
    if line != shown:
        typer.echo(line)
    return line


def _has_reached(state: RolloutState, until: str) -> bool:
    return state.settled and until in {passage.step for passage in state.passages}


def _require_step(state: RolloutState, until: str) -> None:
    from pipelines.errors import Refusal

    course = [step.name for step in state.plan.course(is_first=state.is_first)]
    if until and until not in course:
        raise Refusal("--until", until, limit=", ".join(course), way_out="name a step of this release")


def _refuse_rolled_back(state: RolloutState) -> None:
    from pipelines.errors import Refusal
    from pipelines.release.steps import ROLLED_BACK

    if state.step == ROLLED_BACK:
        name = f"{state.release.model} v{state.release.version}"
        raise Refusal(f"the release of {name}", f"was rolled back: {state.reason}", way_out="`perch releases`")


def _view(world: World, state: RolloutState) -> Group:
    import time

    from pipelines.cli.rollout_view import render_rollout
    from pipelines.errors import TryLater
    from pipelines.release.engine import look

    reading = state.reading
    try:
        actual = world.target.state()
        if state.step.is_watched and state.settled:
            reading = look(world, state)[1]
    except TryLater:
        actual = None
    return render_rollout(state, actual, reading, time.time())
