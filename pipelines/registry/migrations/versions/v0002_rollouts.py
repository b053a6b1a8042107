"""The rollouts of the release engine, one row each.

Databases from before the migrations may have them already: they are adopted as they are.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from pipelines.registry.migrations.rows import has_table, refuse_to_drop_rows

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table where it is missing."""
    if has_table("perch_rollouts"):
        return
    op.create_table(
        "perch_rollouts",
        sa.Column("rollout_id", sa.String(400), primary_key=True),
        sa.Column("model", sa.String(250), nullable=False, index=True),
        sa.Column("open_model", sa.String(250), nullable=True, unique=True),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("lease_owner", sa.String(250), nullable=False),
        sa.Column("lease_expires_at", sa.Double, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("renewals", sa.BigInteger, nullable=False),
        sa.Column("renewed_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Drop a table without a rollout."""
    refuse_to_drop_rows("perch_rollouts")
    op.drop_table("perch_rollouts")
