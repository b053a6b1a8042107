"""`perch runs`, `perch replay` and `perch quarantine`."""

from __future__ import annotations

from typing import Annotated

import typer

runs_app = typer.Typer(invoke_without_command=True, help="List runs, with what differed between them; remove old ones.")


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(runs_app, name="runs", rich_help_panel="Look and check")
    app.command("quarantine", rich_help_panel="Look and check")(quarantine)
    app.command("replay", rich_help_panel="Run")(replay)


@runs_app.callback()
def list_all(context: typer.Context) -> None:
    """List the runs on this machine by data set and model, newest last, with what changed since the run before."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from pipelines.runs.history import runs_list
    from pipelines.settings import get_settings

    Console(highlight=False).print(runs_list(get_settings()))


@runs_app.command("prune")
def prune(
    keep: Annotated[int, typer.Option("--keep", min=0, help="Newest workspaces to keep.")] = 20,
) -> None:
    """Remove old workspaces; what MLflow and the shared cache hold of them stays, so they can still be replayed."""
    from pipelines.runs.history import prune_workspaces
    from pipelines.settings import get_settings

    removed = prune_workspaces(get_settings(), keep)
    typer.echo(f"removed {len(removed)} workspaces" + (f": {', '.join(removed)}" if removed else ""))


@runs_app.command("outcome")
def outcome(
    run_id: Annotated[str, typer.Argument(help="The run.", metavar="RUN")],
    stage: Annotated[str, typer.Argument(help="One of its steps.", metavar="STEP")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON in the last line.")] = False,
) -> None:
    """Say how a step of a run ended that goes through `PERCH_RUNS_URL`, with the step's own exit code."""
    import json

    from pipelines.cli.printing import print_error
    from pipelines.runs.sharing import NotEnded, read_outcome
    from pipelines.settings import get_settings

    try:
        found = read_outcome(get_settings(), run_id, stage)
    except NotEnded as error:
        if not as_json:
            raise
        print_error(error)
        typer.echo(json.dumps({"by": ""}))  # nobody ended it, which is an answer; a bucket that is away gives none
        raise typer.Exit(error.exit_code) from None
    if found.error is not None:
        print_error(found.error)
    else:
        typer.echo(f"  {stage:<20}  {found.result['summary']}")
    if as_json:
        links = found.error.links if found.error is not None else found.result["links"]
        typer.echo(json.dumps({**found.result, "links": links, "by": found.by}))
    if found.error is not None:
        raise typer.Exit(found.error.exit_code)


def quarantine(
    run_id: Annotated[
        str | None, typer.Argument(help="The run; by default the newest that has ingested.", metavar="RUN")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Files to list at most; 0 lists all.")] = 50,
) -> None:
    """List the files that a run put aside because they are no sound images, each with the reason."""
    from pipelines.data.quarantine import count_reasons, name_reasons, read_quarantine
    from pipelines.runs.history import find_ingested
    from pipelines.settings import get_settings

    workspace = find_ingested(get_settings(), run_id)
    records = read_quarantine(workspace.quarantine_file)
    reasons = name_reasons(count_reasons(records)) or "nothing"
    typer.secho(f"run {workspace.root.name} quarantined {reasons} · {workspace.quarantine_file}", bold=True)
    shown = records[:limit] if limit else records
    for record in shown:
        typer.echo(f"  {record['key']}  {record['reason']}: {record['detail']}")
    if len(shown) < len(records):
        typer.echo(f"  and {len(records) - len(shown):,} more; --limit 0 lists all")


def replay(
    run_id: Annotated[str, typer.Argument(help="The run to do again.", metavar="RUN")],
    from_cache: Annotated[
        bool, typer.Option("--from-cache/--recompute", help="Let DVC's run cache answer instead of computing again.")
    ] = False,
) -> None:
    """Do a past run again from its recorded parameters, code, suites and reference, and say what came out the same.

    Exit code 0 when data, weights and metrics are identical, 1 when one differs: the first that does is named.
    """
    from rich.console import Console

    from pipelines.runs.replaying import replay_run
    from pipelines.settings import get_settings

    console = Console()
    comparison = replay_run(get_settings(), run_id, from_cache=from_cache, report=console.print)
    console.print(comparison.render())
    if not comparison.identical:
        raise typer.Exit(1)
