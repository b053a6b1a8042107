"""`perch params`: check `params.yaml`, show it, explain it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    file: Annotated[
        Path | None, typer.Argument(help="A parameter file; params.yaml of the project by default.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of params.yaml.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page of all parameters.")] = False,
) -> None:
    """Check params.yaml and print it with every default spelt out; or print its schema."""
    import json

    import yaml

    from pipelines.params import Params, load_params
    from pipelines.settings import get_settings

    if schema:
        typer.echo(json.dumps(Params.model_json_schema(), indent=2))
    elif markdown:
        from pipelines.cli.params_reference import render

        typer.echo(render())
    else:
        loaded = load_params(file or get_settings().project_dir / "params.yaml")
        typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
