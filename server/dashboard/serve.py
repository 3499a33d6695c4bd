# SPDX-License-Identifier: Apache-2.0
"""The dashboard's process: beside a running ``start``, which looks after it, or by itself.

On 127.0.0.1 it needs no password, as everybody with an account on the coordinator's machine is trusted with it. Beyond
it asks for one, and for TLS with the server's own certificate; there is no way to leave either out.
"""

import argparse
import ipaddress
import logging
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import uvicorn

from ...privacy.errors import BadInput, FedNeuroError, Refused
from ...privacy.processes import claim_port
from ..consortium import Consortium
from ..consortium_settings import DashboardPart
from .app import create_app
from .home import Home
from .jobs import Jobs
from .security import PASSWORD_FILE, Door, Password

__all__ = ["LOOPBACK", "check_open", "log_to_stderr", "main", "serve"]

_log = logging.getLogger("fedneuro.dashboard")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
CLIENTS = 256
"""Open connections; more are refused."""


def check_open(listen: str, consortium: Consortium | None, folder: Path) -> bool:
    """Whether the dashboard is to be reached from other machines.

    Raises:
        BadInput: ``listen`` is no address, or there is no certificate for other machines.
        Refused: it is, and no password is set.
    """
    try:
        beyond = not ipaddress.ip_address(listen).is_loopback
    except ValueError as error:
        raise BadInput(
            f"dashboard.listen = {listen[:60]!r}: is not an IP address; 127.0.0.1 is this machine"
        ) from error
    if beyond and consortium is None:
        raise BadInput(f"--listen {listen}: only a consortium has a certificate for other machines; use an SSH tunnel")
    if beyond and not Password(folder / PASSWORD_FILE).is_set:
        text = f"dashboard.listen = {listen} reaches beyond this machine: set a password first"
        raise Refused(f"{text}: fedneuro-server dashboard --set-password --config {folder}")
    return beyond


def serve(
    folder: Path, listen: str | None = None, port: int | None = None, ready: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until interrupted.

    Args:
        folder: see :class:`~.home.Home`.
        listen: address, in place of the consortium's setting.
        port: in place of the consortium's setting.
        ready: what is told the address.

    Raises:
        BadInput: nothing to show in ``folder``.
        Refused: a password is missing.
        EnvironmentProblem: the port is in use.
    """
    with closing(Home(folder)) as home, closing(Jobs()) as jobs:
        settings = home.consortium.settings if home.consortium else None
        wanted = settings.dashboard if settings else DashboardPart()
        host, number = listen or wanted.listen, port or wanted.port
        beyond = check_open(host, home.consortium, home.folder)
        claim_port(number)
        home.warm()
        hosts, name = LOOPBACK, host
        if beyond and settings:
            name = settings.server.host
            hosts = LOOPBACK | {name.lower(), host}
        door = Door(Password(home.folder / PASSWORD_FILE), required=beyond, secure=beyond)
        tls = home.folder / "tls"
        config = uvicorn.Config(
            create_app(home, door, hosts, jobs),
            host=host,
            port=number,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            limit_concurrency=CLIENTS,
            timeout_graceful_shutdown=1,
            ssl_certfile=tls / "server.crt" if beyond else None,
            ssl_keyfile=tls / "server.key" if beyond else None,
        )
        ready(f"{'https' if beyond else 'http'}://{name}:{number}/")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run()


def log_to_stderr() -> None:
    """What the dashboard itself says, and warnings of others."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("fedneuro").setLevel(logging.INFO)


def main() -> int:
    """The process that ``start`` looks after; returns the exit code."""
    parser = argparse.ArgumentParser(description="Serve the dashboard of a consortium.")
    parser.add_argument("--home", required=True, type=Path, help="the consortium's folder")
    options = parser.parse_args()
    log_to_stderr()
    try:
        serve(options.home, ready=lambda address: _log.info("dashboard at %s", address))
    except FedNeuroError as error:
        _log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
