"""`perch package` and `perch keys`: a registered version becomes one signed file that a server can verify."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

keys_app = typer.Typer(help="List the keys that sign releases, or make one.", no_args_is_help=False)


def package(
    version: Annotated[str, typer.Argument(help="Number of the version, e.g. 3 or v3.", metavar="VERSION")],
    model: Annotated[str, typer.Option("--model", help="Registered model; the one of params.yaml by default.")] = "",
) -> None:
    """Build the release of a registered version: one signed file; a second call gives the same one."""
    from pipelines.cli.models import default_params, parse_version
    from pipelines.settings import get_settings
    from pipelines.stages.model_packaging import package_version

    console = Console(soft_wrap=True, highlight=False)
    name = model or default_params().model_name
    made = package_version(get_settings(), name, parse_version(version))
    console.print(f"[bold]{made.model} v{made.version}[/bold]  {made.digest}")
    console.print(
        f"  {made.size_bytes / 1e6:.1f} MB, signed with the key {made.key_id}, row {made.ledger_sequence} of the ledger"
    )
    console.print(f"  serve it: python -m serving {made.address}", markup=False)


@keys_app.callback(invoke_without_command=True)
def list_keys(context: typer.Context) -> None:
    """List the keys in the home: id, public half, and which one signs."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from pipelines.errors import Refusal
    from pipelines.release import keys
    from pipelines.settings import get_settings

    console, settings = Console(soft_wrap=True, highlight=False), get_settings()
    pairs = keys.list_keys(settings)
    if not pairs and settings.signing_key is None:
        console.print("There is no key yet; `perch keys init` makes one.")
        return
    try:
        signer = keys.signing_key(settings)[0]
    except Refusal as refusal:
        console.print(f"✗ {refusal}", style="red", markup=False)
        signer = None
    if signer is not None and signer.private not in {pair.private for pair in pairs}:
        pairs.append(signer)
    table = Table(box=None, pad_edge=False)
    table.add_column("key", style="bold", no_wrap=True)
    table.add_column("", style="green", no_wrap=True)
    table.add_column("public half, for servers", no_wrap=True)
    for pair in pairs:
        table.add_row(pair.key_id, "signs" if signer and pair.private == signer.private else "", str(pair.public))
    console.print(table)


@keys_app.command("init")
def init_key(
    name: Annotated[
        str, typer.Option("--name", help="Name of its files; a second key needs one, e.g. 2026-b.")
    ] = "release",
) -> None:
    """Make a pair of keys that sign releases; a key that exists is never overwritten."""
    from pipelines.release.keys import create_key
    from pipelines.settings import get_settings

    console = Console(soft_wrap=True, highlight=False)
    pair = create_key(get_settings(), name)
    console.print(f"key {pair.key_id}")
    console.print(f"  private  {pair.private}   keep it secret: whoever reads it can sign", markup=False)
    console.print(f"  public   {pair.public}   give it to servers: PERCH_SERVING_PUBLIC_KEYS", markup=False)
    if name != "release":
        console.print(f"  sign with it: PERCH_SIGNING_KEY={pair.private}", markup=False)
