"""`perch pods`: the pods of steps on a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look after the pods of steps on a cluster.")


@app.callback()
def _group() -> None:
    """Keep `clean` a command of its own, although it is the only one."""


@app.command("clean")
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON in the last line.")] = False,
) -> None:
    """Remove the pods of steps that Airflow no longer waits for: their task has ended, or there is a later try."""
    import json

    from pipelines.services.orphan_pods import clean_pods
    from pipelines.settings import get_settings

    orphans = clean_pods(get_settings(), dry_run=dry_run)
    for orphan in orphans:
        typer.echo(f"  {orphan.pod.name}: {orphan.reason}")
    typer.echo(f"{'found' if dry_run else 'removed'} {len(orphans)} pods that nobody waits for")
    if as_json:
        typer.echo(json.dumps({"pods": {orphan.pod.name: orphan.reason for orphan in orphans}}))
