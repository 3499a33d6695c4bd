# SPDX-License-Identifier: Apache-2.0
"""The commands of a consortium: ``init``, ``invite``, ``sites``, ``revoke``, ``rotate``, ``start``, its files."""

import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ..privacy.errors import BadInput

__all__ = ["register"]

Folder = Annotated[Path, typer.Option("--config", metavar="DIR", help="The consortium's folder, made by init.")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the issuing key, mode 0600.")
]
PassphraseFd = Annotated[
    int | None, typer.Option("--passphrase-fd", help="Open file descriptor that gives the passphrase.")
]
RootFile = Annotated[
    Path | None, typer.Option("--root-passphrase-file", help="File with the passphrase of the root key, mode 0600.")
]
HERE = Path()
REVOKE_SECONDS = 5.0
"""How long revoke waits for a running start, which looks every quarter of a second."""


def init(
    name: Annotated[str, typer.Argument(help="What the consortium is called.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for keys, certificates and state.")],
    host: Annotated[str, typer.Option("--host", help="Name by which hospitals reach this machine.")] = "localhost",
    port: Annotated[
        int, typer.Option("--port", help="First of three ports in a row: guard, enrolment, renewal.", min=1, max=65533)
    ] = 8443,
    superlink_port: Annotated[int, typer.Option("--superlink-port", help="Flower's port, on 127.0.0.1.")] = 8000,
    dashboard_port: Annotated[
        int | None, typer.Option("--dashboard-port", help="8450; with --port seven above that.", min=1, max=65535)
    ] = None,
    database: Annotated[str, typer.Option("--database", help="sqlite:///FILE or postgresql+psycopg://...")] = (
        "sqlite:///state.db"
    ),
    passphrase_file: PassphraseFile = None,
    passphrase_fd: PassphraseFd = None,
    root_passphrase_file: RootFile = None,
) -> None:
    """Make a consortium: certificate authority, server certificate, study-signing key, state store."""
    from pydantic import ValidationError

    from ..privacy.identity import fingerprint
    from ..privacy.settings_faults import explain
    from .consortium import ROOT_KEY, create_consortium
    from .consortium_settings import ServerSettings

    values: dict[str, Any] = {
        "consortium": {"name": name},
        "server": {"host": host, "listen": "127.0.0.1" if host == "localhost" else "0.0.0.0"},  # noqa: S104
        "ports": {"guard": port, "enrolment": port + 1, "renewal": port + 2, "superlink": superlink_port},
        "dashboard": {"port": dashboard_port or _beside(port, superlink_port)},
        "state": {"url": database},
    }
    try:
        settings = ServerSettings.model_validate(values)
    except ValidationError as error:
        raise BadInput(explain(error, ServerSettings)) from error
    consortium = create_consortium(
        out, settings, _root_passphrase(root_passphrase_file), _passphrase(passphrase_file, passphrase_fd)
    )
    print(f"consortium {name} in {out}; fingerprint of its root certificate:\n  {fingerprint(consortium.root)}")
    print(f"1. move {out / ROOT_KEY} to a medium that you lock away, and its passphrase elsewhere")
    print(f"2. fedneuro-server start --config {out}")
    print(f"3. fedneuro-server invite SITE --role train --config {out}")
    if host == "localhost":
        print("host is localhost: only this machine can reach it; --host NAME makes one for hospitals")


def invite(
    site: Annotated[str, typer.Argument(help="The hospital's name in this consortium.")],
    role: Annotated[str, typer.Option("--role", help="train or heldout; the hospital itself must grant it too.")],
    config: Folder = HERE,
    expires: Annotated[str, typer.Option("--expires", help="30m, 12h, 7d: until then it can be used once.")] = "7d",
    show: Annotated[bool, typer.Option("--qr/--no-qr", help="Also show the QR code here.")] = False,
) -> None:
    """Invite a hospital: a file and a QR code, to be handed over on a way that you trust."""
    from ..privacy.contract import Role
    from .consortium import Consortium
    from .invitations import invite as make
    from .invitations import lifetime, write_qr

    try:
        granted = Role(role)
    except ValueError as error:
        raise BadInput(f"--role {role[:40]!r}: train or heldout") from error
    invitation, path = make(Consortium(config), site, granted, lifetime(expires))
    code = write_qr(invitation, path.with_suffix(".png"))
    if show:
        print(code)
    print(f"{path}\n{path.with_suffix('.png')}")
    print(f"valid once, until {_day(invitation.expires)}; whoever holds it can enrol as {site}")
    print(f"the hospital: fedneuro-node enrol {path.name}; compare by telephone: {invitation.fingerprint[:32]}")


def sites(config: Folder = HERE, json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List the sites: role, state, until when its certificate holds, fingerprint of its node's key."""
    import json

    from .consortium import Consortium
    from .roster import key_fingerprint

    found = Consortium(config).registry.sites()
    rows = [
        {
            "site": site.name,
            "role": site.role.value,
            "state": site.state,
            "certificate": _day(site.expires) if site.expires else "",
            "key": key_fingerprint(site.node_key) if site.node_key else "",
        }
        for site in found
    ]
    if json_:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "role", "state", "certificate until", "key")
    for row in rows:
        table.add_row(row["site"], row["role"], row["state"], row["certificate"], row["key"][:16])
    Console().print(table if rows else "no sites yet: fedneuro-server invite SITE --role train")


def revoke(
    site: Annotated[str, typer.Argument(help="The hospital to put out.")],
    config: Folder = HERE,
    passphrase_file: PassphraseFile = None,
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Put a hospital out, at once and also from running studies."""
    from .consortium import Consortium
    from .guard import publish, reload_guard

    consortium = Consortium(config)
    consortium.registry.revoke(site)
    given = passphrase_file is not None or passphrase_fd is not None
    publish(consortium, consortium.unlock(_passphrase(passphrase_file, passphrase_fd)) if given else None)
    print(f"{site}: certificates and open invitations are revoked")
    print("guard: reads the change now" if reload_guard(consortium) else "guard: not running; it reads it at its start")
    deadline = time.monotonic() + REVOKE_SECONDS
    while (found := consortium.registry.site(site)) and found.node_id and time.monotonic() < deadline:
        time.sleep(0.1)
    out = not (found and found.node_id)
    print("node: unregistered, its next request fails" if out else "node: no start is running; it unregisters it then")


def rotate(
    config: Folder = HERE,
    root_key: Annotated[
        Path | None, typer.Option("--root-key", help="The root's sealed key: makes a new issuing key too.")
    ] = None,
    take_back: Annotated[
        bool, typer.Option("--take-back", help="With --root-key: the old issuing keys, and all they signed, end now.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    passphrase_fd: PassphraseFd = None,
    root_passphrase_file: RootFile = None,
) -> None:
    """Make a new server certificate; with the root's key, a new issuing key as well."""
    from .consortium import Consortium
    from .guard import publish

    consortium, passphrase = Consortium(config), _passphrase(passphrase_file, passphrase_fd)
    if take_back and root_key is None:
        raise BadInput("--take-back: needs --root-key FILE, for only the root can take an issuing key back")
    if root_key is not None:
        # One passphrase seals both; issuing keys that end now may be lost already.
        (consortium.unlock_study_key if take_back else consortium.unlock)(passphrase)
        root_passphrase = _root_passphrase(root_passphrase_file)
        number = consortium.replace_issuing(root_key, root_passphrase, passphrase, take_back=take_back)
        print(f"issuing key {number} is in use" + ("; all hospitals must be invited again" if take_back else ""))
    issuer = consortium.unlock(passphrase)
    consortium.renew_server(issuer)
    publish(consortium, issuer)
    consortium.registry.note("rotated")
    print("new server certificate; stop and start the coordinator to use it (hospitals need do nothing)")


def start(
    config: Folder = HERE,
    passphrase_file: PassphraseFile = None,
    passphrase_fd: PassphraseFd = None,
    dashboard: Annotated[bool, typer.Option("--dashboard/--no-dashboard", help="A web page on this machine.")] = True,
    resume_private: Annotated[
        bool,
        typer.Option(
            "--resume-private", help="Let interrupted private runs go on too: the round under way is charged again."
        ),
    ] = False,
) -> None:
    """Run the coordinator until stopped: SuperLink, ServerApp runner, guard, enrolment service and dashboard.

    Runs whose process died go on by themselves where that costs no patient anything; see runs.resume in server.toml.
    """
    from .consortium import Consortium
    from .supervisor import Supervisor, serve

    consortium = Consortium(config)
    consortium.check_secure()
    issuer = consortium.unlock(_passphrase(passphrase_file, passphrase_fd))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for loud in ("alembic", "httpx"):
        logging.getLogger(loud).setLevel(logging.WARNING)

    def ready(supervisor: Supervisor) -> None:
        settings = consortium.settings
        print(f"consortium {consortium.name} is up; stop it with Ctrl-C", flush=True)
        print(f"  hospitals: {settings.outer(settings.ports.guard)}, enrolment {settings.ports.enrolment}", flush=True)
        print(f"  bundle {supervisor.bundle[:12]}; logs in {consortium.folder / 'logs'}", flush=True)
        if dashboard:
            web = settings.dashboard
            here = web.listen.startswith("127.")
            address = f"http://{web.listen}:{web.port}/" if here else f"https://{settings.outer(web.port)}/"
            print(f"  dashboard {address}", flush=True)
        if not settings.guard.nginx:
            print("  no guard is started: run nginx with `fedneuro-server proxy nginx` yourself", flush=True)

    serve(consortium, issuer, ready, dashboard=dashboard, resume="all" if resume_private else None)


def proxy(
    kind: Annotated[str, typer.Argument(metavar="nginx", help="Which program's configuration.")], config: Folder = HERE
) -> None:
    """Print the configuration of the reverse proxy that guards the SuperLink."""
    from .consortium import Consortium
    from .guard import nginx_config

    if kind != "nginx":
        raise BadInput(f"{kind[:40]!r}: only nginx is known")
    print(nginx_config(Consortium(config)), end="")


def unit(
    kind: Annotated[str, typer.Argument(metavar="systemd", help="Which program's service file.")],
    config: Folder = HERE,
) -> None:
    """Print a hardened service file for `start`."""
    from .consortium import Consortium
    from .unit import unit_text

    if kind != "systemd":
        raise BadInput(f"{kind[:40]!r}: only systemd is known")
    print(unit_text(Consortium(config)), end="")


def register(app: typer.Typer) -> None:
    """Add the commands to ``fedneuro-server``."""
    for command in (init, start, invite, sites, revoke, rotate, proxy, unit):
        app.command()(command)


def _beside(port: int, superlink_port: int) -> int:
    """The dashboard's port where none is given: 8450 beside 8443, and another for a second consortium."""
    return next(found for found in (port + 7, port + 8, port - 1) if found <= 65535 and found != superlink_port)


def _passphrase(file: Path | None, descriptor: int | None) -> Any:
    from .sealed_keys import Passphrase

    return Passphrase("the issuing key", "FEDNEURO_PASSPHRASE", file, descriptor)


def _root_passphrase(file: Path | None) -> Any:
    from .sealed_keys import Passphrase

    return Passphrase("the root key", "FEDNEURO_ROOT_PASSPHRASE", file)


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
