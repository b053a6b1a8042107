"""`perch api-keys`: makes, lists and revokes the keys with which clients call the prediction service."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from pipelines.core.scopes import Scope

app = typer.Typer(help="Make, list and revoke the API keys of the prediction service.", no_args_is_help=True)

File = Annotated[
    Path | None,
    typer.Option("--file", help="The service's file of keys; without it, api-keys.json in PERCH_HOME."),
]


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is; a second key of the same name replaces one in use.")],
    scope: Annotated[
        list[Scope],
        typer.Option("--scope", help="What it may do; repeatable.", default_factory=lambda: [Scope.PREDICT]),
    ],
    rate: Annotated[float, typer.Option("--rate", help="Images, or other requests, per second.")] = 50.0,
    burst: Annotated[
        int | None, typer.Option("--burst", help="So many at once; without it two seconds' worth, 64 at least.")
    ] = None,
    expires: Annotated[
        datetime | None,
        typer.Option("--expires", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Refused from then on (UTC)."),
    ] = None,
    file: File = None,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from rich.console import Console

    from pipelines.core.api_keys import editing, new_key
    from pipelines.core.request_origins import PROBER
    from pipelines.errors import Refusal

    if name == PROBER:
        raise Refusal("the name", name, limit="any other: it marks the prober's own keys", way_out="name the client")
    until = expires.replace(tzinfo=UTC) if expires else None
    if until and until <= datetime.now(UTC):
        raise Refusal("--expires", until.isoformat(), limit="in the future", way_out="give a later date, or none")
    key, record = new_key(name, tuple(scope), rate_per_s=rate, burst=burst, expires=until)
    place = _file(file)
    with editing(place) as keys:
        keys.append(record)
    typer.echo(key)  # alone on standard output, so that `KEY=$(perch api-keys add …)` takes it
    notes = Console(stderr=True, highlight=False)
    notes.print(
        f"key {record.id} of {record.name}: {', '.join(record.scopes)}; {record.rate_per_s:g} per second, "
        f"{record.burst} at once; {_until(record.expires)}",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
    notes.print(
        f"Give it to the client now, it cannot be shown again.  Services that read {place} take it within a second.",
        style="dim",
        markup=False,
        soft_wrap=True,
    )


@app.command("own")
def own(file: File = None) -> None:
    """Make the keys by which Perch itself asks a cluster's services, and print them as variables, once."""
    from rich.console import Console

    from pipelines.core.api_keys import editing, new_key
    from pipelines.core.request_origins import PROBER
    from pipelines.release.staging import CALLER

    place = _file(file)
    made = {
        name: new_key(name, scopes, rate_per_s=1e6, burst=1_000_000)
        for name, scopes in ((CALLER, (Scope.PREDICT, Scope.MODEL)), (PROBER, (Scope.PREDICT,)))
    }
    with editing(place) as keys:
        keys.extend(record for _, record in made.values())
    for name, (key, _) in made.items():
        typer.echo(f"PERCH_{name.upper()}_API_KEY={key}")  # alone there, for `kubectl create secret --from-env-file`
    Console(stderr=True, highlight=False).print(
        f"Put these into a Secret for the steps' pods and the watchdog, and {place} into that of the services.  "
        "They cannot be shown again.",
        style="dim",
        markup=False,
        soft_wrap=True,
    )


@app.command("list")
def list_keys(file: File = None) -> None:
    """List the keys: id, name, scopes, rate, and when they end."""
    from rich.table import Table

    from pipelines.cli.models import wide_console
    from pipelines.core.api_keys import read_or_refuse

    console, place = wide_console(), _file(file)
    keys = read_or_refuse(place).keys
    if not keys:
        console.print(f"No key in {place}; make one with `perch api-keys add NAME --scope predict`.", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("id", "name", "scopes"):
        table.add_column(title, style="bold" if title == "id" else "", no_wrap=title != "scopes")
    for title in ("per second", "at once"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("created (UTC)", no_wrap=True)
    table.add_column("expires (UTC)", no_wrap=True)
    now = datetime.now(UTC)
    for key in sorted(keys, key=lambda key: (key.name, key.created)):
        ended = key.expired(now)
        table.add_row(
            key.id,
            key.name,
            " ".join(key.scopes),
            f"{key.rate_per_s:g}",
            str(key.burst),
            _minute(key.created),
            f"{_minute(key.expires)} (over)" if ended and key.expires else _minute(key.expires),
            style="red" if ended else None,
        )
    console.print(table)


@app.command("revoke")
def revoke(
    ids: Annotated[list[str], typer.Argument(help="Ids of keys: the eight characters after `perch_`.")],
    file: File = None,
) -> None:
    """Remove keys; services refuse them within a second."""
    from pipelines.core.api_keys import editing
    from pipelines.errors import Refusal

    place = _file(file)
    with editing(place) as keys:
        known = {key.id: key for key in keys}
        if unknown := [id_ for id_ in ids if id_ not in known]:
            raise Refusal(
                "the key to revoke",
                f"{', '.join(unknown)} is not in {place}",
                way_out="`perch api-keys list` shows the ids; nothing was revoked",
            )
        keys[:] = [key for key in keys if key.id not in ids]
    for id_ in dict.fromkeys(ids):
        typer.echo(f"revoked {id_} of {known[id_].name}")
    if not keys:
        typer.echo(f"{place} holds no key now: a service that takes no tokens will not start with it.", err=True)


def _file(given: Path | None) -> Path:
    from pipelines.core.api_keys import DEFAULT_FILE_NAME
    from pipelines.settings import get_settings

    return given.expanduser() if given else get_settings().require_home() / DEFAULT_FILE_NAME


def _until(expires: datetime | None) -> str:
    return f"until {_minute(expires)} UTC" if expires else "without an end"


def _minute(moment: datetime | None) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M") if moment else "never"
