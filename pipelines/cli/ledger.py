"""`perch ledger`: the append-only record of what happened to each version, and the proof that nobody edited it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="List the ledger, or verify that nothing in it was changed.", no_args_is_help=False)

_UNSEEN = (
    "Rows cut off at the end leave no trace in the chain itself: note this hash elsewhere, and check it with --head."
)


@app.callback(invoke_without_command=True)
def list_entries(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Only this model's rows.")] = "",
    evidence: Annotated[bool, typer.Option("--evidence", help="Print the evidence of each row, too.")] = False,
) -> None:
    """List what happened to each version: row, time, event, version, run and hash."""
    if context.invoked_subcommand is not None:
        return
    import json

    from rich.json import JSON
    from rich.table import Table

    from pipelines.cli.models import wide_console
    from pipelines.registry.ledger import Ledger
    from pipelines.settings import get_settings

    console = wide_console()
    records = Ledger(get_settings().ledger_url).entries(model or None)
    if not records:
        console.print("The ledger is empty; registering a model writes its first row.")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("row", justify="right", style="bold")
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("event", style="green", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("run", overflow="fold")
    table.add_column("hash", no_wrap=True)
    for record in records:
        table.add_row(
            str(record.sequence),
            record.occurred_at[:19].replace("T", " "),
            record.event,
            f"{record.model} v{record.version}",
            str(json.loads(record.evidence).get("run_id", "")),
            record.row_sha256[:12],
        )
    console.print(table)
    if evidence:
        for record in records:
            console.print(f"\n[bold]row {record.sequence}[/bold]  evidence {record.evidence_sha256}")
            console.print(JSON(record.evidence))


@app.command("verify")
def verify(
    head: Annotated[str, typer.Option("--head", help="Hash of a row (12 digits or more) noted earlier.")] = "",
    offline: Annotated[bool, typer.Option("--offline", help="Check the chain only, without asking MLflow.")] = False,
) -> None:
    """Check the chain and MLflow's aliases against it; exit 1 with each problem named."""
    from pipelines.core.hash_chain import find_breaks
    from pipelines.registry.ledger import Ledger
    from pipelines.settings import get_settings

    console = Console()
    settings = get_settings()
    records = Ledger(settings.ledger_url).entries()
    problems = find_breaks(records)
    if head and not any(len(head) >= 12 and record.row_sha256.startswith(head) for record in records):
        problems.append(f"no row has the hash {head}: the end of the ledger was cut off or rewritten")
    if not offline:
        from pipelines.cli.models import default_params
        from pipelines.registry.models import find_disagreements, list_versions

        params = default_params()
        for model in sorted({params.model_name, *(record.model for record in records)}):
            problems += find_disagreements(
                model,
                list_versions(settings, model),
                records,
                candidate_alias=params.model_registration.candidate_alias,
            )
    if problems:
        for problem in problems:
            console.print(f"✗ {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    if not records:
        console.print("The ledger is empty, and MLflow agrees.")
        return
    agreement = "" if offline else ", MLflow agrees"
    rows = "1 row" if len(records) == 1 else f"{len(records)} rows"
    console.print(f"✓ {rows}, chain intact{agreement}", style="green", highlight=False)
    console.print(f"head {records[-1].row_sha256} (row {records[-1].sequence})", highlight=False, soft_wrap=True)
    console.print(_UNSEEN, style="dim", soft_wrap=True)
