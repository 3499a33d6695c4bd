# SPDX-License-Identifier: Apache-2.0
"""The tables of the coordinator's state store. Changes go through a new step in ``server/migrations``.

Times are seconds since 1970 (UTC), which SQLite and PostgreSQL store alike. No private key and no token is in here:
of a token its hash, of a hospital its public key and certificates.
"""

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, MetaData, String, Table, Text

__all__ = ["certificates", "events", "invitations", "metadata", "sites"]

metadata = MetaData()

sites = Table(
    "sites",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("node_key", Text, nullable=False, server_default=""),
    Column("node_id", String(20), nullable=False, server_default=""),
    Column("changed", BigInteger, nullable=False),
)

invitations = Table(
    "invitations",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("site", String(64), ForeignKey("sites.name"), nullable=False),
    Column("role", String(16), nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("used", BigInteger),
    Column("created", BigInteger, nullable=False),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(42), primary_key=True),
    Column("site", String(64), ForeignKey("sites.name"), nullable=False),
    Column("issuer", Integer, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("pem", Text, nullable=False),
    Column("revoked", BigInteger),
)

events = Table(
    "consortium_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("site", String(64), nullable=False, server_default=""),
    Column("text", Text, nullable=False, server_default=""),
)
