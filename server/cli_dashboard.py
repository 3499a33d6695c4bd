# SPDX-License-Identifier: Apache-2.0
"""The command ``dashboard``: a consortium, or a run, in a browser."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]


def dashboard(
    home: Annotated[
        Path,
        typer.Option("--home", "--config", metavar="DIR", help="A consortium's folder, a run's, or one of runs."),
    ] = Path(),
    port: Annotated[int | None, typer.Option("--port", help="8450 if not set.", min=1, max=65535)] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="Address; beyond this machine it needs a password.")
    ] = None,
    set_password: Annotated[
        bool, typer.Option("--set-password", help="Ask for a password, save its hash, and end.")
    ] = False,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="With --set-password: file that has it, mode 0600.")
    ] = None,
) -> None:
    """Show a consortium or a run in a browser. `start` does so by itself; this is for when it does not run."""
    from .dashboard.home import Home
    from .dashboard.security import PASSWORD_FILE, Password
    from .dashboard.serve import log_to_stderr, serve
    from .sealed_keys import Passphrase

    if set_password:
        folder = Home(home).folder
        given = Passphrase("the dashboard", "FEDNEURO_DASHBOARD_PASSPHRASE", password_file).get(new=True)
        Password(folder / PASSWORD_FILE).set(given)
        print(f"{folder / PASSWORD_FILE}: holds the password's hash; from now on the dashboard asks for it")
        return
    log_to_stderr()
    serve(home, listen, port, lambda address: print(f"{address}\nstop it with Ctrl-C", flush=True))


def register(app: typer.Typer) -> None:
    """Add the command to ``fedneuro-server``."""
    app.command()(dashboard)
