"""`perch trials`: the tuning trials of a run in several processes."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Run a run's tuning trials side by side, before its training.")

RunOption = Annotated[str, typer.Option("--run", metavar="ID", help="The run.")]
ShareOption = Annotated[int, typer.Option("--share", min=0, help="Which share, from 0.")]
OfOption = Annotated[int, typer.Option("--of", min=1, help="How many shares there are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON in the last line.")]


@app.command("plan")
def plan(run_id: RunOption, as_json: JsonOption = False) -> None:
    """Say in how many shares a run's trials are done; in none where its training runs them itself."""
    import json

    from pipelines.runs.trials import plan_shares
    from pipelines.settings import get_settings

    shares = plan_shares(get_settings(), run_id)
    typer.echo(f"{len(shares)} shares of trials" if shares else "no shares: the training runs its trials itself")
    if as_json:
        typer.echo(json.dumps({"shares": shares}))


@app.command("run")
def run(
    share: ShareOption,
    of: OfOption,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="The run; by default that of the folder at hand.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the trials of one share that are missing, beside other processes that run theirs."""
    import json
    from pathlib import Path

    from pipelines.core.workspace import Workspace
    from pipelines.runs import trials
    from pipelines.runs.parent_death import die_with_parent_if_asked
    from pipelines.settings import get_settings

    die_with_parent_if_asked()
    if run_id is None:
        count = trials.run_share_here(get_settings(), Workspace(Path.cwd()), share, of)
        typer.echo(f"share {share + 1} of {of}: {count} trials done")
    else:
        trials.run_share(get_settings(), run_id, share, of)
    if as_json:
        typer.echo(json.dumps({"share": share, "of": of}))


@app.command("collect")
def collect(run_id: RunOption, as_json: JsonOption = False) -> None:
    """Write what the trials found into the run, where its training takes them as given."""
    import json

    from pipelines.runs.parent_death import die_with_parent_if_asked
    from pipelines.runs.trials import collect as collect_trials
    from pipelines.settings import get_settings

    die_with_parent_if_asked()
    count = collect_trials(get_settings(), run_id)
    typer.echo(f"{count} trials collected")
    if as_json:
        typer.echo(json.dumps({"trials": count}))
