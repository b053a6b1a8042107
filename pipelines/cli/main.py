"""The `perch` command: one subcommand per stage, and the commands around runs, models and services.

Only light imports stand at the top, here and in the modules beside it: `perch --help` must answer at once.
"""

from __future__ import annotations

import sys

import typer

from pipelines import __version__
from pipelines.cli import (
    api_keys,
    approvals,
    db,
    expectations,
    ledger,
    models,
    params,
    pods,
    predict,
    predictions,
    releases,
    rollouts,
    runs,
    services,
    stages,
    trials,
)
from pipelines.cli.printing import print_error
from pipelines.errors import PerchError

app = typer.Typer(
    name="perch",
    help="Retrains an image classifier, proves that the new model is better, and registers it with its evidence.\n\n"
    "Start with [bold]perch demo[/bold]; or edit params.yaml and say [bold]perch run[/bold].  Each stage of dvc.yaml "
    "is a command of its own.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"perch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Hold the options that stand before a subcommand."""


stages.add_commands(app)
runs.add_commands(app)
services.add_commands(app)
app.command("package", rich_help_panel="Run")(releases.package)
app.add_typer(releases.keys_app, name="keys", rich_help_panel="Run")
app.add_typer(rollouts.app, name="releases", rich_help_panel="Run")
app.command("rollback", rich_help_panel="Run")(rollouts.rollback)
app.command("approve", rich_help_panel="Run")(approvals.approve)
app.command("reject", rich_help_panel="Run")(approvals.reject)
app.command("predict", rich_help_panel="Run")(predict.predict)
app.add_typer(trials.app, name="trials", rich_help_panel="Run")
app.command("params", rich_help_panel="Look and check")(params.show)
app.add_typer(models.app, name="models", rich_help_panel="Look and check")
app.add_typer(ledger.app, name="ledger", rich_help_panel="Look and check")
app.add_typer(approvals.app, name="approvals", rich_help_panel="Look and check")
app.command("predictions", rich_help_panel="Look and check")(predictions.list_predictions)
app.command("watchdog", rich_help_panel="Services on this machine")(rollouts.watchdog)
app.command("why", rich_help_panel="Look and check")(predictions.why)
app.add_typer(expectations.app, name="expectations", rich_help_panel="Look and check")
app.add_typer(api_keys.app, name="api-keys", rich_help_panel="Look and check")
app.add_typer(pods.app, name="pods", rich_help_panel="Services on this machine")
app.add_typer(db.app, name="db", rich_help_panel="Services on this machine")


def main() -> None:
    """Run the command line; an error meant for a person is printed as it is, without a traceback."""
    try:
        app()
    except PerchError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command with the same --run goes on from there", err=True)
        sys.exit(130)
