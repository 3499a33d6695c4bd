# SPDX-License-Identifier: Apache-2.0
"""The state store of a consortium: which sites there are, who was invited, whose certificates hold.

SQLite by default, PostgreSQL by URL. Every change is one transaction and leaves an event; the number of events
is the store's :attr:`Registry.revision`, by which a running ``start`` sees what another command changed.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.event import listen
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from ..privacy.contract import Role
from ..privacy.errors import BadInput, EnvironmentProblem, Refused
from .migrations import upgrade
from .registry_tables import certificates, events, invitations, sites

__all__ = ["CertificateRecord", "Registry", "SiteRecord", "StoreAway", "check_url"]

State = Literal["invited", "enrolled", "revoked"]
CONNECT_SECONDS = 10
"""How long a database server may take to accept a connection."""


class StoreAway(EnvironmentProblem):
    """The database does not answer; nothing of the call was done."""


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One site as the coordinator knows it; ``node_id`` 0 where no node is registered."""

    name: str
    role: Role
    state: State
    node_key: str
    node_id: int
    expires: int
    """When its newest certificate that holds ends, 0 without one."""


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """One client certificate; ``revoked`` is None while it holds, ``issuer`` the number of its issuing key."""

    serial: str
    site: str
    issuer: int
    not_after: int
    pem: str
    revoked: int | None = None


def check_url(url: str) -> sa.URL:
    """The database's address.

    Raises:
        BadInput: it is not one of SQLite or PostgreSQL.
    """
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise BadInput(
            "state.url: is not a database URL; write sqlite:///state.db or postgresql+psycopg://USER@HOST/NAME"
        ) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise BadInput(f"state.url: {parsed.get_backend_name()!r} is not supported; use sqlite or postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise BadInput("state.url: names no file, and would forget all sites; write sqlite:///state.db")
    return parsed


class Registry:
    """An open state store. All of it raises :class:`StoreAway` where the database does not answer.

    Args:
        url: its address; a relative SQLite path is relative to where the process runs.

    Raises:
        BadInput: the address is wrong.
        EnvironmentProblem: the driver is not installed, or the database does not answer.
    """

    def __init__(self, url: str | sa.URL) -> None:
        parsed = check_url(url) if isinstance(url, str) else url
        shown = self._shown = parsed.render_as_string(hide_password=True)
        patience = {} if parsed.get_backend_name() == "sqlite" else {"connect_timeout": CONNECT_SECONDS}
        try:
            self._engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=patience)
        except (NoSuchModuleError, ModuleNotFoundError, ImportError) as error:
            missing = getattr(error, "name", None) or "psycopg"
            raise EnvironmentProblem(
                f"state.url: {shown} needs the driver {missing}; install it: pip install 'fedneuro[postgresql]', "
                "and begin the URL with postgresql+psycopg://"
            ) from error
        if parsed.get_backend_name() == "sqlite":
            listen(self._engine, "connect", _prepare_sqlite)
        try:
            with self._engine.begin() as connection:
                upgrade(connection)
        except DBAPIError as error:
            remedy = "correct the URL in server.toml, start the database, or bring the file back from a backup"
            raise EnvironmentProblem(f"state.url: {shown} cannot be opened: {_first(error)}; {remedy}") from error

    def close(self) -> None:
        """Release all connections."""
        self._engine.dispose()

    @property
    def revision(self) -> int:
        """Grows with every change: the number of events.

        Not the highest number of an event: PostgreSQL gives numbers out before it commits, so that a change with a
        lower one can appear later.
        """
        with self._read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one())

    # -- reading ---------------------------------------------------------------------------------------

    def sites(self) -> list[SiteRecord]:
        """All sites by name."""
        newest = (
            sa.select(certificates.c.site, sa.func.max(certificates.c.not_after).label("expires"))
            .where(certificates.c.revoked.is_(None))
            .group_by(certificates.c.site)
            .subquery()
        )
        query = (
            sa.select(sites, sa.func.coalesce(newest.c.expires, 0).label("expires"))
            .outerjoin(newest, newest.c.site == sites.c.name)
            .order_by(sites.c.name)
        )
        with self._read() as connection:
            return [_site(row) for row in connection.execute(query)]

    def site(self, name: str) -> SiteRecord | None:
        """One site, or None."""
        return next((found for found in self.sites() if found.name == name), None)

    def certificates(self) -> list[CertificateRecord]:
        """All client certificates that were ever issued."""
        with self._read() as connection:
            rows = connection.execute(sa.select(certificates).order_by(certificates.c.serial))
            return [CertificateRecord(**row._mapping) for row in rows]

    def certificate(self, serial: str) -> CertificateRecord | None:
        """The certificate with this serial number, or None."""
        query = sa.select(certificates).where(certificates.c.serial == serial)
        with self._read() as connection:
            row = connection.execute(query).first()
        return CertificateRecord(**row._mapping) if row else None

    def events(self, after: int = 0) -> list[tuple[int, int, str, str, str]]:
        """Number, time, kind, site and text of what happened, oldest first."""
        query = sa.select(events).where(events.c.id > after).order_by(events.c.id)
        with self._read() as connection:
            return [(row.id, row.at, row.kind, row.site, row.text) for row in connection.execute(query)]

    def invited(self, token_hash: str, site: str) -> Role:
        """The role that the unused, unexpired invitation with this hash grants to ``site``.

        Raises:
            Refused: there is none; the text does not say which of the reasons it was.
        """
        query = sa.select(invitations).where(invitations.c.token_hash == token_hash)
        with self._read() as connection:
            row = connection.execute(query).first()
        if row is None or row.used is not None or row.expires <= time.time() or row.site != site:
            raise Refused("the invitation is unknown, used, expired or another site's")
        return Role(row.role)

    # -- changing --------------------------------------------------------------------------------------

    def invite(self, site: str, role: Role, token_hash: str, expires: int) -> None:
        """Save an invitation; earlier unused ones for this site end.

        Raises:
            Refused: the site is there under a name that differs in capitals only.
        """
        now = int(time.time())
        with self._change("invited", site, f"as {role.value}") as connection:
            for (name,) in connection.execute(sa.select(sites.c.name)):
                if name != site and name.lower() == site.lower():
                    raise Refused(f"site {name} is there already, and {site} differs in capitals only; use one name")
            values = {"role": role.value, "state": "invited", "changed": now}
            known = connection.execute(sa.select(sites.c.state).where(sites.c.name == site)).scalar()
            if known is None:
                connection.execute(sites.insert().values(name=site, **values))
            elif known == "revoked":
                connection.execute(sites.update().where(sites.c.name == site).values(**values))
            unused = (invitations.c.site == site) & invitations.c.used.is_(None)
            connection.execute(invitations.delete().where(unused))
            row = {"token_hash": token_hash, "site": site, "role": role.value, "expires": expires, "created": now}
            connection.execute(invitations.insert().values(**row))

    def enrol(self, token_hash: str, node_key: str, node_id: int, certificate: CertificateRecord) -> None:
        """Use up an invitation: the site has this node and this certificate; all its earlier ones are revoked.

        Raises:
            Refused: the invitation was used or withdrawn meanwhile; nothing is changed.
        """
        now, site = int(time.time()), certificate.site
        with self._change("enrolled", site, f"certificate {certificate.serial}") as connection:
            row = connection.execute(sa.select(invitations).where(invitations.c.token_hash == token_hash)).first()
            free = (invitations.c.token_hash == token_hash) & invitations.c.used.is_(None)
            if row is None or connection.execute(invitations.update().where(free).values(used=now)).rowcount != 1:
                raise Refused("the invitation is unknown, used, expired or another site's")
            _revoke_certificates(connection, site, now)
            values = {"state": "enrolled", "node_key": node_key, "node_id": str(node_id), "changed": now}
            connection.execute(sites.update().where(sites.c.name == site).values(role=row.role, **values))
            connection.execute(certificates.insert().values(**_columns(certificate)))

    def renew(self, certificate: CertificateRecord) -> None:
        """Add a certificate; the present one holds to its own end."""
        with self._change("renewed", certificate.site, f"certificate {certificate.serial}") as connection:
            connection.execute(certificates.insert().values(**_columns(certificate)))

    def set_node(self, site: str, node_id: int) -> None:
        """Note under which id the site's node is registered; 0: it is not."""
        with self._change("node", site, str(node_id)) as connection:
            connection.execute(sites.update().where(sites.c.name == site).values(node_id=str(node_id or "")))

    def revoke(self, site: str) -> None:
        """End all certificates and open invitations of a site.

        Raises:
            BadInput: there is no such site.
        """
        now = int(time.time())
        with self._change("revoked", site, "") as connection:
            found = sites.update().where(sites.c.name == site).values(state="revoked", changed=now)
            if connection.execute(found).rowcount != 1:
                known = ", ".join(name for (name,) in connection.execute(sa.select(sites.c.name).order_by("name")))
                raise BadInput(f"there is no site {site[:64]!r}; known: {known or 'none yet'}")
            _revoke_certificates(connection, site, now)
            connection.execute(invitations.delete().where((invitations.c.site == site) & invitations.c.used.is_(None)))

    def take_back(self, issuers: Collection[int]) -> None:
        """End all certificates that these issuing keys signed."""
        numbers = ", ".join(map(str, sorted(issuers)))
        with self._change("taken-back", "", f"issuing keys {numbers}, and all they signed") as connection:
            held = certificates.c.issuer.in_(issuers) & certificates.c.revoked.is_(None)
            connection.execute(certificates.update().where(held).values(revoked=int(time.time())))

    def note(self, kind: str, site: str = "", text: str = "") -> None:
        """Save an event."""
        with self._change(kind, site, text):
            pass

    @contextmanager
    def _change(self, kind: str, site: str, text: str) -> Iterator[sa.Connection]:
        with self._answering(), self._engine.begin() as connection:
            yield connection
            values = {"at": int(time.time()), "kind": kind, "site": site[:64], "text": text[:500]}
            connection.execute(events.insert().values(**values))

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._answering(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, InterfaceError) as error:
            text = f"state.url: {self._shown} does not answer: {_first(error)}; start the database, or look at its disk"
            raise StoreAway(text) from error


def _revoke_certificates(connection: sa.Connection, site: str, now: int) -> None:
    held = (certificates.c.site == site) & certificates.c.revoked.is_(None)
    connection.execute(certificates.update().where(held).values(revoked=now))


def _columns(record: CertificateRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("serial", "site", "issuer", "not_after", "pem")}


def _site(row: "sa.Row[tuple[object, ...]]") -> SiteRecord:
    found = row._mapping
    return SiteRecord(
        name=found["name"],
        role=Role(found["role"]),
        state=found["state"],
        node_key=found["node_key"],
        node_id=int(found["node_id"] or 0),
        expires=int(found["expires"]),
    )


def _prepare_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _first(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0][:200]
