# SPDX-License-Identifier: Apache-2.0
"""One hospital, one file: makes an invitation, as JSON and as a QR code."""

import base64
import re
import secrets
import time
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from ..privacy.contract import Role
from ..privacy.enrolment import Invitation, encode, token_hash
from ..privacy.errors import BadInput
from ..privacy.identity import SITE_NAME, fingerprint, replace_file
from .consortium import Consortium

__all__ = ["invite", "lifetime", "write_qr"]

_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
MAX_LIFETIME = timedelta(days=60)


def lifetime(text: str) -> timedelta:
    """``30m``, ``12h`` or ``7d``.

    Raises:
        BadInput: something else, or more than 60 days.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text)
    if match is None or (found := int(match[1]) * _UNITS[match[2]]) > MAX_LIFETIME:
        raise BadInput(f"--expires {text[:40]!r}: write a number and m, h or d, at most {MAX_LIFETIME.days}d; e.g. 7d")
    return found


def invite(consortium: Consortium, site: str, role: Role, expires: timedelta) -> tuple[Invitation, Path]:
    """A one-time invitation for ``site``, saved to ``invitations/SITE.json``; earlier unused ones end.

    Raises:
        BadInput: the name cannot be a site's.
        Refused: a site of nearly the same name is there.
    """
    if re.fullmatch(SITE_NAME, site) is None:
        raise BadInput(f"site {site[:80]!r}: letters, digits, _ . - only, beginning with a letter or digit, at most 64")
    settings, token = consortium.settings, secrets.token_urlsafe(32)
    invitation = Invitation(
        consortium=consortium.name,
        site=site,
        role=role,
        expires=int(time.time() + expires.total_seconds()),
        enrolment=settings.outer(settings.ports.enrolment),
        superlink=settings.outer(settings.ports.guard),
        token=token,
        fingerprint=fingerprint(consortium.root),
        authority=base64.b64encode(consortium.root.public_bytes(Encoding.DER)).decode("ascii"),
    )
    consortium.registry.invite(site, role, token_hash(token), invitation.expires)
    path = consortium.folder / "invitations" / f"{site}.json"
    replace_file(path, encode(invitation))
    return invitation, path


def write_qr(invitation: Invitation, path: Path) -> str:
    """Write the invitation as a QR code (PNG, mode 0600); returns it in characters for a terminal."""
    import io

    import segno

    code = segno.make_qr(encode(invitation), error="l")
    png, text = io.BytesIO(), io.StringIO()
    code.save(png, kind="png", scale=4)
    code.terminal(out=text, compact=True)
    replace_file(path, png.getvalue())
    return text.getvalue()
