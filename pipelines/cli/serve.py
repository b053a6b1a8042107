"""`perch serve`: the prediction service of a packaged version, here, until Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.settings import Settings


def serve(
    version: Annotated[
        str,
        typer.Argument(
            help="Number of the version, e.g. 3; by default the champion, or before any release the last one packaged.",
            show_default=False,
        ),
    ] = "",
    model: Annotated[str, typer.Option("--model", help="Registered model; the one of params.yaml by default.")] = "",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="TCP port on the loopback interface.")] = 3000,
) -> None:
    """Serve a packaged version here, until Ctrl-C; its signature is verified before anything of it is loaded."""
    import os

    from pipelines.cli.models import default_params, parse_version
    from pipelines.services.prediction_service import require_packaged_version, serving_command
    from pipelines.services.secrets import ensure_demo_key
    from pipelines.settings import get_settings

    settings = get_settings()
    _refuse_taken(port, settings)
    packaged = require_packaged_version(
        settings, model or default_params().model_name, parse_version(version) if version else None
    )
    command, environment = serving_command(settings, packaged)
    address = f"http://127.0.0.1:{port}"
    typer.echo(f"{packaged.model} v{packaged.version} · release {packaged.digest[:12]} · {address}")
    typer.echo(f'try it: curl -F image=@IMAGE {address}/v1/predict -H "X-API-Key: {ensure_demo_key(settings)}"')
    os.execve(command[0], [*command, "--port", str(port)], environment)  # noqa: S606


def _refuse_taken(port: int, settings: Settings) -> None:
    """What is announced must be ours: a key sent to another program's port is a key given away."""
    from dataclasses import asdict

    from pipelines.core.free_ports import is_free
    from pipelines.errors import Refusal
    from pipelines.services.stack import Stack

    if is_free(port):
        return
    holder, way_out = "another program", "choose one with --port"
    stack = Stack(settings)
    if stack.is_answering() and not stack.has_slots_alone:
        own = {number: name for name, number in asdict(stack.ports()).items()}.get(port)
        if own == "serving":
            holder = "Perch's own Envoy, which `perch up` started and which serves what was released"
            way_out = f"ask http://127.0.0.1:{port}, or choose another port with --port"
        elif own is not None:
            holder = f"Perch's own {'MLflow' if own == 'mlflow' else 'Airflow'}, which `perch up` started"
    raise Refusal(f"port {port}", f"is taken by {holder}", limit="a free TCP port", way_out=way_out)
