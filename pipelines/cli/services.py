"""`perch up`, `down`, `status`, `slots` and `demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.serve import serve

if TYPE_CHECKING:
    from pipelines.services.stack import Stack

_PANEL = "Services on this machine"


def add_commands(app: typer.Typer) -> None:
    """Add the commands that start, show and end services."""
    app.command("demo", rich_help_panel="Run")(demo)
    app.command("up", rich_help_panel=_PANEL)(up)
    app.command("status", rich_help_panel=_PANEL)(status)
    app.command("down", rich_help_panel=_PANEL)(down)
    app.command("serve", rich_help_panel=_PANEL)(serve)
    app.command("slots", rich_help_panel=_PANEL)(slots)


def up() -> None:
    """Start MLflow, Airflow, Envoy and what was last served, supervised, on free ports."""
    from rich.console import Console

    from pipelines.services.secrets import passwords_file
    from pipelines.services.stack import Stack
    from pipelines.settings import get_settings

    settings = get_settings()
    settings.require_project()  # whose DAGs Airflow runs
    console, stack = Console(), Stack(settings)
    with console.status("starting services") as spinner:
        ports = stack.up(spinner.update)
    console.print(
        f"MLflow   {ports.mlflow_uri}\nAirflow  {ports.airflow_uri}  (admin / see {passwords_file(settings)})"
    )
    console.print(f"Serving  {ports.serving_uri}  {describe_live(stack)}")


def describe_live(stack: Stack) -> str:
    """Which release answers clients, as the target itself says."""
    from pipelines.errors import TryLater
    from pipelines.release.targets import Slot

    try:
        release = stack.target.state().slots.get(Slot.STABLE)
    except TryLater:
        return "(Envoy does not answer)"
    return f"({release.model} v{release.version} is live)" if release else "(nothing was released yet)"


def status() -> None:
    """Show what runs, where, and how much memory it takes; exit code 1 when nothing or not all of it runs."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.core.own_command import make_runnable
    from pipelines.services.stack import Stack
    from pipelines.settings import get_settings

    stack = Stack(get_settings())
    states = stack.status()
    console = Console()
    if not states:
        console.print(make_runnable("nothing is up; `perch up` starts everything"))
        raise typer.Exit(1)
    table = Table("program", "state", box=None)
    for program, state in states.items():
        table.add_row(program, f"[{'green' if state == 'RUNNING' else 'red'}]{state}")
    console.print(table)
    if stack.has_slots_alone:
        console.print(f"Serving  {describe_live(stack)}\nwhat else runs, `docker compose ps` says")
    else:
        ports = stack.ports()
        console.print(f"MLflow   {ports.mlflow_uri}\nAirflow  {ports.airflow_uri}")
        console.print(f"Serving  {ports.serving_uri}  {describe_live(stack)}")
    console.print(f"memory   {stack.memory_bytes() / 1e9:.1f} GB")
    if any(state != "RUNNING" for state in states.values()):
        raise typer.Exit(1)


def down() -> None:
    """End every service that `perch up` started, and whatever is left of them."""
    from pipelines.services.stack import Stack
    from pipelines.settings import get_settings

    ended = Stack(get_settings()).down()
    typer.echo("all services ended" if ended else "nothing was up")


def slots() -> None:
    """Keep the slots' services running, in the foreground and without Envoy or Airflow: for a container of its own."""
    from pipelines.services.slots import run_slots
    from pipelines.settings import get_settings

    raise typer.Exit(run_slots(get_settings()))


def demo(
    exit_: Annotated[
        bool,
        typer.Option("--exit", envvar="DEMO_EXIT", help="End at the end, with a status code, instead of staying up."),
    ] = False,
    faults: Annotated[
        bool, typer.Option("--faults", help="Release five bad models instead, and see what stops each; ends by itself.")
    ] = False,
) -> None:
    """Train digits for two consecutive weeks in a real Airflow and release both models, all on this machine."""
    from pipelines.settings import get_settings

    settings = get_settings()
    settings.require_project()
    if faults:
        from pipelines.services.demo_faults import run_faults

        run_faults(settings)
        return
    from pipelines.services.demo import run_demo

    run_demo(settings, stay=not exit_)
