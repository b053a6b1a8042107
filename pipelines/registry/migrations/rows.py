"""What a migration may not lose."""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

from pipelines.errors import Refusal


def has_table(name: str) -> bool:
    """Whether the table is there: databases from before the migrations hold some."""
    from sqlalchemy import inspect

    return inspect(op.get_bind()).has_table(name)


def refuse_to_drop_rows(table: str) -> None:
    """Let a downgrade drop an empty table only.

    Raises:
        Refusal: it holds rows.
    """
    rows = op.get_bind().execute(text(f"SELECT count(*) FROM {table}")).scalar_one()  # noqa: S608
    if rows:
        raise Refusal(
            f"the table {table}",
            f"holds {rows} rows, which a downgrade would drop",
            limit="an empty table",
            way_out="keep it: an older Perch leaves tables alone that it does not know; or restore an older backup",
        )
