"""One subcommand per stage, made from the modules in `pipelines/stages`, and `perch run` for all of them."""

from __future__ import annotations

import ast
import json
import pkgutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import stages as stages_package
from pipelines.cli.printing import print_error
from pipelines.core.workspace import COMMAND_LINE

_PANEL = "Stages"

RunOption = Annotated[
    str | None, typer.Option("--run", metavar="ID", help="Do it as part of this run, through DVC, recorded in MLflow.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a parameter, e.g. model_training.epochs=3; repeatable."),
]
ConfOption = Annotated[str, typer.Option("--conf", help="The same as one JSON object of dotted keys.")]
AsOfOption = Annotated[str | None, typer.Option("--as-of", metavar="DATE", help="Take what had arrived by this date.")]
ByOption = Annotated[str, typer.Option("--by", help="Who asked for the run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON in the last line.")]


def stage_names() -> list[str]:
    """Every stage that has a module."""
    return [module.name for module in pkgutil.iter_modules(stages_package.__path__)]


def add_commands(app: typer.Typer) -> None:
    """Add the stages' commands and `perch run`."""
    for name in stage_names():
        app.command(name, help=_describe(name), rich_help_panel=_PANEL)(_command(name))
    app.command("run", rich_help_panel="Run")(run)


def run(
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="Name the run; by default its time.")
    ] = None,
    set_: SetOption = None,
    as_of: AsOfOption = None,
) -> None:
    """Run the whole pipeline here, without Airflow, up to the registered model; what did not change is not redone."""
    from datetime import UTC, datetime

    from pipelines.runs.pipeline import pipeline_steps
    from pipelines.settings import get_settings

    settings = get_settings()
    run_id = run_id or datetime.now(UTC).strftime("local__%Y-%m-%dT%H-%M-%S")
    title = f"run {run_id} · {settings.runs_dir}"
    overrides, outcomes = parse_overrides(set_, "{}"), {}
    for stage in pipeline_steps(settings):
        outcomes[stage] = _run_step(stage, run_id, overrides, as_of, COMMAND_LINE, as_json=False, title=title)
        title = ""
    _show_next(outcomes["deploy_to_staging"])


def _show_next(staged: dict[str, Any]) -> None:
    """Print how the version that a run registered, and tried, goes live."""
    from pipelines.cli.models import default_params
    from pipelines.core.own_command import make_runnable
    from pipelines.services.airflow_access import how_to_release
    from pipelines.settings import get_settings

    version = staged["version"]
    if staged["model"] != default_params().model_name:
        return  # with another model_name by --set: the DAG releases that of params.yaml
    typer.echo(make_runnable(f"next: {how_to_release(get_settings(), version)}"))
    typer.echo(
        make_runnable(f"      `perch models show {version}` is its model card, `perch releases watch` its release")
    )


def parse_overrides(pairs: list[str] | None, conf: str) -> dict[str, Any]:
    """Merge `--set key=value` pairs (YAML values) over `--conf` (a JSON object).

    Raises:
        Refusal: a pair has no `=`, its value is no YAML, or the JSON is not an object.
    """
    import yaml

    from pipelines.errors import Refusal

    try:
        overrides = json.loads(conf)
    except ValueError:
        overrides = None
    if not isinstance(overrides, dict):
        raise Refusal(
            "--conf", conf, limit="one JSON object of dotted keys", way_out='e.g. {"model_training.epochs": 3}'
        )
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise Refusal("--set", pair, limit="KEY=VALUE", way_out="e.g. --set model_training.epochs=3")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # a date such as 2026-13-01 is a ValueError
            reason = str(getattr(error, "problem", None) or error)
            raise Refusal(
                f"--set {key.strip()}",
                f"the value {value!r} cannot be read: {reason}",
                limit="one YAML value",
                way_out="quote it where it holds a bracket or a colon",
            ) from None
    return overrides


def _command(name: str) -> Callable[..., None]:
    def command(
        run: RunOption = None,
        set_: SetOption = None,
        conf: ConfOption = "{}",
        as_of: AsOfOption = None,
        by: ByOption = COMMAND_LINE,
        as_json: JsonOption = False,
    ) -> None:
        from pipelines.runs.parent_death import die_with_parent_if_asked

        die_with_parent_if_asked()
        if run is None:
            _run_bare(name, as_json=as_json)
        else:
            _run_step(name, run, parse_overrides(set_, conf), as_of, by, as_json=as_json)

    return command


def _run_bare(stage: str, *, as_json: bool) -> None:
    import os

    from pipelines.core.workspace import Workspace
    from pipelines.errors import PerchError
    from pipelines.runs.stages import IN_RUN, run_bare

    in_run = IN_RUN in os.environ
    try:
        result = run_bare(stage, Workspace(Path.cwd())).model_dump(mode="json")
    except PerchError as error:
        if in_run:
            raise typer.Exit(error.exit_code) from None
        raise
    if as_json:
        typer.echo(json.dumps(result))
    elif not in_run:
        typer.echo(f"{stage}: {result['summary']}")


def _run_step(
    stage: str, run_id: str, overrides: dict[str, Any], as_of: str | None, by: str, *, as_json: bool, title: str = ""
) -> dict[str, Any]:
    """Run a step and print how it ended; before it a title, once the run is there: a refused one may never be made."""
    import time

    from pipelines.errors import PerchError
    from pipelines.runs.pipeline import run_step
    from pipelines.settings import get_settings

    def print_title() -> None:
        if title:
            typer.secho(title, bold=True)

    started = time.monotonic()
    day = _parse_day(as_of)
    try:
        outcome = run_step(
            get_settings(), run_id, stage, overrides=overrides, as_of=day, requested_by=by, on_open=print_title
        )
    except PerchError as error:
        if not as_json:
            raise
        print_error(error)
        typer.echo(json.dumps({"links": error.links}))
        raise typer.Exit(error.exit_code) from None
    typer.echo(f"  {stage:<20}  {outcome['summary']:<58} {time.monotonic() - started:6.1f} s")
    if as_json:
        for title, address in outcome["links"].items():
            typer.echo(f"  {title}: {address}")
        typer.echo(json.dumps(outcome))
    return outcome


def _parse_day(text: str | None) -> date | None:
    from pipelines.errors import Refusal

    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise Refusal("--as-of", repr(text), limit="a date", way_out="write it as 2026-11-01") from None


def _describe(stage: str) -> str:
    """A stage's help is its module's docstring, read without importing the module: that would take seconds."""
    file = Path(stages_package.__path__[0]) / f"{stage}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
