# SPDX-License-Identifier: Apache-2.0
"""The commands by which a hospital joins a consortium: ``enrol`` and ``renew``."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["register"]

Config = Annotated[Path, typer.Option("--config", help="The node's settings (node.toml); keys are written beside it.")]
NODE_TOML = Path("node.toml")


def enrol(
    invitation: Annotated[Path, typer.Argument(metavar="INVITATION", help="File that the coordinator gave you.")],
    config: Config = NODE_TOML,
) -> None:
    """Join a consortium: makes this node's keys here, and gets a certificate for them."""
    from ..privacy.enrolment import read_invitation
    from ..privacy.secagg.keys import fingerprint, identity_of_pem
    from .enrolment import enrol as join

    found = read_invitation(invitation)
    print(f"consortium {found.consortium}, site {found.site}, role {found.role.value}")
    print(f"root certificate {found.fingerprint[:32]}: the same that the coordinator reads to you?", flush=True)
    done = join(found, config)
    print(f"enrolled until {done.expires:%Y-%m-%d}; `fedneuro-node renew` before then")
    print("the invitation is used up: delete it")
    print(f"this node's key   {fingerprint(identity_of_pem(done.node_key.encode()))}")
    print(f"studies signed by {done.credentials.study_key}")
    print(f"keys and settings in {config.resolve().parent}")


def renew(config: Config = NODE_TOML) -> None:
    """Get a new certificate with the present one, before it expires. Restart the node to use it."""
    from .enrolment import renew as again

    done = again(config)
    print(f"{done.credentials.site}: certificate renewed until {done.expires:%Y-%m-%d}; restart the node to use it")


def register(app: typer.Typer) -> None:
    """Add the commands to ``fedneuro-node``."""
    app.command()(enrol)
    app.command()(renew)
