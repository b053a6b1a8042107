"""The ledger, and the triggers by which the database refuses to change it.

Databases from before the migrations have both already, made by the first writer: they are adopted as they are.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from pipelines.registry.migrations.rows import has_table, refuse_to_drop_rows

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table where it is missing, and its guards in any case."""
    if not has_table("perch_ledger"):
        op.create_table(
            "perch_ledger",
            sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("occurred_at", sa.String(40), nullable=False),
            sa.Column("key", sa.String(500), nullable=False, unique=True),
            sa.Column("model", sa.String(250), nullable=False),
            sa.Column("version", sa.String(50), nullable=False),
            sa.Column("event", sa.String(50), nullable=False),
            sa.Column("evidence", sa.Text, nullable=False),
            sa.Column("evidence_sha256", sa.String(64), nullable=False),
            sa.Column("previous_sha256", sa.String(64), nullable=False, unique=True),
            sa.Column("row_sha256", sa.String(64), nullable=False, unique=True),
        )
    if op.get_context().dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER IF NOT EXISTS perch_ledger_no_{action.lower()} BEFORE {action} ON perch_ledger "
                "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            )
    else:
        op.execute(
            "CREATE OR REPLACE FUNCTION perch_ledger_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$"
        )
        op.execute("DROP TRIGGER IF EXISTS perch_ledger_is_append_only ON perch_ledger")
        op.execute(
            "CREATE TRIGGER perch_ledger_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON perch_ledger "
            "FOR EACH STATEMENT EXECUTE FUNCTION perch_ledger_is_append_only()"
        )


def downgrade() -> None:
    """Drop a ledger that nothing was written to."""
    refuse_to_drop_rows("perch_ledger")
    op.drop_table("perch_ledger")
    if op.get_context().dialect.name != "sqlite":
        op.execute("DROP FUNCTION perch_ledger_is_append_only()")
