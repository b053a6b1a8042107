"""`perch db`: where the tables of the ledger's database are, and how they get to where this Perch needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from pipelines.registry.database import Database

app = typer.Typer(help="Upgrade the ledger's database to this Perch, or take that back.", no_args_is_help=True)
T = TypeVar("T")


@app.command("current")
def current() -> None:
    """Show the revision of the database; ends with 0 only where it is the one that this Perch needs."""
    from pipelines.registry.migration import read_schema
    from pipelines.registry.schema import HEAD

    def look(database: Database) -> bool:
        schema = read_schema(database)
        typer.echo(f"{database.shown_url} is at {schema}")
        if schema.is_current:
            return True
        if schema.is_newer:
            typer.echo(f"This Perch knows nothing after {HEAD}: use the one that upgraded it.")
        elif schema.is_empty:
            typer.echo(f"This Perch needs {HEAD}: `perch db upgrade` makes the tables, and so does the first run.")
        else:
            typer.echo(f"This Perch needs {HEAD}: `perch db upgrade`.")
        return False

    if not _with_database(look):
        raise typer.Exit(1)


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database's tables to this Perch: all of it or nothing; safe to repeat, and by several at once."""
    from pipelines.registry import migration

    def apply(database: Database) -> None:
        before, after = migration.upgrade(database)
        if before == after:
            typer.echo(f"{database.shown_url} is at {after} already")
        else:
            typer.echo(f"{database.shown_url}: {before} > {after}")

    _with_database(apply)


@app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="To end at: one before the present one, or `base` for none at all.")],
) -> None:
    """Take migrations back for an older Perch; refused where rows would be lost."""
    from pipelines.registry import migration

    def apply(database: Database) -> None:
        before, after = migration.downgrade(database, revision)
        typer.echo(f"{database.shown_url}: {before} > {after}")

    _with_database(apply)


def _with_database(action: Callable[[Database], T]) -> T:
    from sqlalchemy.exc import OperationalError

    from pipelines.core.patience import be_patient
    from pipelines.registry.database import Database
    from pipelines.registry.migration import MIGRATION_LIMIT_S
    from pipelines.settings import get_settings

    database = Database(get_settings().ledger_url, wait_s=MIGRATION_LIMIT_S)
    try:
        return be_patient(
            lambda: action(database),
            transient=lambda error: isinstance(error, OperationalError),
            name=f"the ledger's database {database.shown_url}",
        )
    finally:
        database.close()
