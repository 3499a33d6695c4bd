# SPDX-License-Identifier: Apache-2.0
"""Invite a hospital in a browser: a form, and the invitation as a file and a QR code.

An invitation is a secret: whoever holds it can enrol. So only the session that made it is given the file; the others
see whether the hospital has used it.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ...privacy.contract import Role
from ...privacy.enrolment import Invitation, decode, encode, token_hash
from ...privacy.errors import BadInput, FedNeuroError, Refused
from ..consortium import Consortium
from ..invitations import invite, lifetime, write_qr
from ..run_words import clock
from .forms import Forms, download
from .security import Door

__all__ = ["Inviting"]

MAX_MADE: Final = 1000
LIFETIMES: Final = {"1d": "1 day", "7d": "7 days", "30d": "30 days"}


class Inviting:
    """The pages of invitations.

    Args:
        forms: what all forms share.
        door: knows the sessions.
    """

    def __init__(self, forms: Forms, door: Door) -> None:
        self._forms, self._door = forms, door
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[str, str], None] = OrderedDict()
        """(session, site)."""

    def invite_page(self, request: Request) -> Response:
        """Ask who is invited."""
        _ = self._forms.consortium
        return self._invite_page(request, {})

    def invite(self, request: Request) -> Response:
        """Make an invitation."""
        consortium, fields = self._forms.consortium, request.state.fields
        try:
            role = Role(fields.get("role", ""))
        except ValueError:
            return self._invite_page(request, fields, BadInput("choose whether the hospital trains or is held out"))
        try:
            expires = lifetime(fields.get("expires", ""))
            self._forms.unlock(request)
            made, path = invite(consortium, fields.get("site", "").strip(), role, expires)
        except FedNeuroError as error:
            return self._invite_page(request, fields, error)
        write_qr(made, path.with_suffix(".png"))
        with self._lock:
            self._made[self._door.session(request), made.site] = None
            while len(self._made) > MAX_MADE:
                self._made.popitem(last=False)
        return RedirectResponse(f"/invitations/{made.site}", 303)

    def invitation(self, request: Request, site: str) -> Response:
        """An invitation, for the session that made it; whether the hospital has used it, for everybody."""
        import segno

        consortium = self._forms.consortium
        record = consortium.registry.site(site)
        if record is None:
            raise BadInput(f"nobody invited {site[:80]!r}")
        made = _read(consortium, site) if self._is_own(request, site) else None
        state = _state(consortium, made) if made else ""
        code = Markup("")
        if made and state == "open":
            code = Markup(segno.make_qr(encode(made), error="l").svg_inline(light="#fff", omitsize=True))  # noqa: S704
        return self._forms.show(
            request, "invitation.html",
            site=site, role="held out" if record.role is Role.HELDOUT else "trains", state=state, code=code,
            enrolled=record.state == "enrolled", fingerprint=made.fingerprint[:32] if made else "",
            until=clock(made.expires)[:16] if made else "", place=consortium.folder / "invitations" / f"{site}.json",
        )  # fmt: skip

    def invitation_file(self, request: Request, site: str) -> Response:
        """The file for the hospital.

        Raises:
            BadInput: this session did not make it, or it holds no longer.
        """
        consortium = self._forms.consortium
        made = _read(consortium, site) if self._is_own(request, site) else None
        if made is None or _state(consortium, made) != "open":
            raise BadInput("there is no such invitation of yours; make one, or find it in the consortium's folder")
        return Response(encode(made), media_type="application/json", headers=download(f"{site}.json"))

    def _invite_page(self, request: Request, given: Mapping[str, str], fault: FedNeuroError | None = None) -> Response:
        wanted = {"site": "", "role": "train", "expires": "7d"}
        kept = {name: given.get(name, value)[:200] for name, value in wanted.items()}
        return self._forms.show(request, "invite.html", fault, given=kept, lifetimes=LIFETIMES)

    def _is_own(self, request: Request, site: str) -> bool:
        with self._lock:
            return (self._door.session(request), site) in self._made


def _read(consortium: Consortium, site: str) -> Invitation | None:
    """The invitation of a site whose name was compared with those that are known."""
    try:
        return decode(Invitation, (consortium.folder / "invitations" / f"{site}.json").read_bytes())
    except (OSError, FedNeuroError):
        return None


def _state(consortium: Consortium, made: Invitation) -> str:
    """Whether an invitation is ``open`` or ``over``: used, expired, or a newer one took its place."""
    try:
        consortium.registry.invited(token_hash(made.token), made.site)
    except Refused:
        return "over"
    return "open"
