"""`perch expectations`: draft a data set's suites from its data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.settings import Settings

app = typer.Typer(help="The rules that data must meet before anything is trained on it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `init` a subcommand while it is the only one."""


@app.command()
def init(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="The data set's name, as `dataset` in params.yaml.")
    ],
    raw: Annotated[
        Path | None,
        typer.Option(help="A run's data/raw folder; by default of the newest run that ingested the data set."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the suites that are there.")] = False,
) -> None:
    """Draft the suites of a data set from its data, into expectations/DATASET, for a person to review."""
    from pydantic import TypeAdapter, ValidationError

    from pipelines.errors import Refusal
    from pipelines.params import NAME_IN_WORDS, Name, load_params
    from pipelines.settings import get_settings

    settings = get_settings()
    try:
        TypeAdapter(Name).validate_python(dataset)
    except ValidationError:
        raise Refusal(
            "the data set's name",
            repr(dataset),
            limit=NAME_IN_WORDS,
            way_out="use the name that stands under `dataset` in params.yaml",
        ) from None
    folder = settings.project_dir / "expectations" / dataset
    if not force and any(folder.glob("*.json")):
        from pipelines.runs.workspaces import is_committed

        old = (
            "Git has the old"
            if is_committed(folder)
            else "after keeping a copy, for Git does not have them as they are"
        )
        raise Refusal(
            f"expectations/{dataset}", "holds suites", way_out=f"review these; or overwrite them with --force, {old}"
        )
    raw = raw or _newest_raw(settings, dataset)
    if not (raw / "manifest.json").is_file():
        raise Refusal(
            f"the folder {raw}", "holds no manifest.json", way_out="name the data/raw folder of a run that has ingested"
        )
    params = load_params(settings.project_dir / "params.yaml")

    from pipelines.data.expectation_drafts import draft_suites, write_suites
    from pipelines.data.suites import validate
    from pipelines.data.validation_tables import build_tables

    typer.echo(f"reading {raw}")
    tables = build_tables(params, raw, raw.parent / "quarantine.parquet", reference=None)
    suites = draft_suites(tables)
    for file, suite in zip(write_suites(folder, suites), suites, strict=True):
        typer.echo(f"wrote {file}: {len(suite.expectations)} expectations")
    typer.echo("holding the data against them ...")
    outcomes = [
        outcome for suite in suites for outcome in validate(tables.by_name()[suite.name], suite)[0].expectations
    ]
    unmet = [outcome for outcome in outcomes if not outcome.success]
    typer.echo(f"{len(outcomes) - len(unmet)} of {len(outcomes)} are met by the data that they were drafted from")
    for outcome in unmet:
        typer.echo(f"  not met: {outcome.column}: observed {outcome.observed}; limit {outcome.limit}")
    typer.echo(
        "Review before you commit: does the label set hold every class and no misspelt one?  Are sizes, modes and\n"
        "intensities what the device delivers, or accidents of this delivery?  Critical stops a run: is it right there?"
    )


def _newest_raw(settings: Settings, dataset: str) -> Path:
    """The `data/raw` of the newest run that ingested this data set."""
    import json

    from pipelines.errors import Refusal
    from pipelines.runs.workspaces import list_runs, workspace_of

    for run_id in reversed(list_runs(settings)):
        raw = workspace_of(settings, run_id).raw
        manifest = raw / "manifest.json"
        if manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8"))["dataset"] == dataset:
            return raw
    raise Refusal(
        f"the data set {dataset}",
        "was not ingested by any run here",
        way_out=f"set `dataset: {dataset}` and its source in params.yaml and say `perch data_ingestion --run first`, "
        "or name a data/raw folder with --raw",
    )
