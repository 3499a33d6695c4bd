# SPDX-License-Identifier: Apache-2.0
"""Sites, invitations, certificates and events of a consortium."""

import sqlalchemy as sa
from alembic import op

__all__ = ["upgrade"]

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "sites",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("node_key", sa.Text, nullable=False, server_default=""),
        sa.Column("node_id", sa.String(20), nullable=False, server_default=""),
        sa.Column("changed", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "invitations",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("site", sa.String(64), sa.ForeignKey("sites.name"), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
        sa.Column("used", sa.BigInteger),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(42), primary_key=True),
        sa.Column("site", sa.String(64), sa.ForeignKey("sites.name"), nullable=False),
        sa.Column("issuer", sa.Integer, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("pem", sa.Text, nullable=False),
        sa.Column("revoked", sa.BigInteger),
    )
    op.create_table(
        "consortium_events",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("site", sa.String(64), nullable=False, server_default=""),
        sa.Column("text", sa.Text, nullable=False, server_default=""),
    )
