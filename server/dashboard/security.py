# SPDX-License-Identifier: Apache-2.0
"""What stands between a browser and the dashboard.

    1. the Host header names this machine, else 421: a name that an attacker points at 127.0.0.1 (DNS rebinding) is
       not ours
    2. every answer carries the headers of :data:`HEADERS`: no script, style or picture but our own files, no frame
    3. where a password is set, every page but the login asks for it; it is kept as a scrypt hash, and an address that
       fails five times is locked out
    4. a form counts only with the token of its own session, from our own origin, and is small

A session is a random name in a cookie that scripts cannot read and other sites cannot send. It ends with the
process, so nothing of it is ever written down.
"""

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...privacy.errors import BadInput, Refused
from ...privacy.identity import replace_file, require_private
from ..limits import Doorkeeper, TooMany

__all__ = ["HEADERS", "MAX_FORM", "PASSWORD_FILE", "REPORT_HEADERS", "Door", "Password", "Shield", "read_form"]

PASSWORD_FILE: Final = "dashboard.json"  # noqa: S105 - a file's name
HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # "no-referrer" would make the browser hide the origin of our own forms
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
REPORT_HEADERS: Final = {
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "unsafe-none",  # browsers refuse a sandboxed page with another value
}
"""For ``report.html`` alone: one file that holds its own styles. It may run nothing and belongs to no origin."""
MAX_FORM: Final = 8192
MAX_SESSIONS: Final = 1000
SESSION_SECONDS: Final = 12 * 3600.0
_SCRYPT_N, _SCRYPT_R = 2**17, 8
"""128 MB and about half a second per guess."""


class Password:
    """The dashboard's password, as a salted scrypt hash (RFC 7914) in a file that only its owner can read.

    Args:
        path: where it is, or would be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.Lock()

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return self.path.is_file()

    def set(self, password: str) -> None:
        """Replace it."""
        salt = secrets.token_bytes(16)
        found = Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=1).derive(password.encode())
        values = {"format": "fedneuro-dashboard-1", "n": _SCRYPT_N, "r": _SCRYPT_R, "salt": _text(salt)}
        replace_file(self.path, json.dumps({**values, "hash": _text(found)}, indent=1).encode() + b"\n")

    def check(self, password: str) -> None:
        """Compare, one guess at a time: a guess takes 128 MB.

        Raises:
            Refused: it is another one, or none is set.
            BadInput: the file can be read by others, or is not as it was written.
        """
        if not self.is_set:
            raise Refused("no password is set; fedneuro-server dashboard --set-password")
        require_private(self.path)
        try:
            values = json.loads(self.path.read_bytes())
            salt, wanted = base64.b64decode(values["salt"]), base64.b64decode(values["hash"])
            scrypt = Scrypt(salt=salt, length=32, n=int(values["n"]), r=int(values["r"]), p=1)
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{self.path}: is not a password file ({type(error).__name__})"
            raise BadInput(f"{text}; fedneuro-server dashboard --set-password makes it anew") from error
        with self._turn:
            try:
                scrypt.verify(password.encode(), wanted)
            except InvalidKey as error:
                raise Refused("the password is wrong") from error


class Door:
    """Sessions and their tokens.

    Args:
        password: if one is set, pages are for those who gave it.
        required: whether nobody may enter without, set or not: beyond this machine.
        secure: whether the dashboard is reached by TLS.
        doorkeeper: how often an address may try.
    """

    def __init__(
        self, password: Password, *, required: bool = False, secure: bool = False, doorkeeper: Doorkeeper | None = None
    ) -> None:
        self.password, self.secure, self._required = password, secure, required
        self.cookie = "__Host-fedneuro" if secure else "fedneuro"
        self._doorkeeper = doorkeeper or Doorkeeper()
        self._key = secrets.token_bytes(32)
        self._open: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def is_locked(self) -> bool:
        """Whether a login is asked for."""
        return self._required or self.password.is_set

    def session(self, request: Request) -> str:
        """The session's name, or a new one."""
        found = request.cookies.get(self.cookie, "")
        return found if len(found) == 43 and found.isascii() else secrets.token_urlsafe(32)

    def admits(self, request: Request) -> bool:
        """Whether this session may see pages."""
        if not self.is_locked:
            return True
        with self._lock:
            return self._open.get(request.cookies.get(self.cookie, ""), 0.0) > time.monotonic()

    def log_in(self, address: str, password: str) -> str:
        """A new session that is let in.

        Raises:
            Refused: wrong password, or too many attempts.
        """
        self.try_password(address, password)
        name = secrets.token_urlsafe(32)
        with self._lock:
            now = time.monotonic()
            self._open = {known: end for known, end in self._open.items() if end > now}
            while len(self._open) >= MAX_SESSIONS:
                del self._open[min(self._open, key=lambda known: self._open[known])]
            self._open[name] = now + SESSION_SECONDS
        return name

    def try_password(self, address: str, password: str) -> None:
        """Check a password for a caller at ``address``.

        Raises:
            TooMany: it tries too often; the password was not looked at.
            Refused: wrong password.
        """
        self._doorkeeper.admit(address)
        try:
            self.password.check(password)
        except Refused as error:
            if self._doorkeeper.failed(address):
                raise TooMany("too many failed attempts; wait a quarter of an hour") from error
            raise

    def log_out(self, request: Request) -> None:
        """End the session."""
        with self._lock:
            self._open.pop(request.cookies.get(self.cookie, ""), None)

    def token(self, session: str) -> str:
        """What the forms of this session carry: 64 hexadecimal digits."""
        return hmac.new(self._key, session.encode(), hashlib.sha256).hexdigest()

    def remember(self, response: Response, session: str) -> None:
        """Give the browser its session."""
        response.set_cookie(self.cookie, session, path="/", secure=self.secure, httponly=True, samesite="strict")

    def check_form(self, request: Request, form: Mapping[str, str]) -> None:
        """Whether a form comes from a page of ours in the same session.

        Raises:
            Refused: it does not.
        """
        origin, where = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        if origin is not None and urlsplit(origin).netloc != request.headers["host"]:
            raise Refused("the form comes from another site")
        if where not in ("same-origin", "none"):
            raise Refused("the form comes from another site")
        wanted = self.token(request.cookies.get(self.cookie, ""))
        if not hmac.compare_digest(wanted.encode(), form.get("token", "").encode()):
            raise Refused("the page is too old; go back, load it again, and repeat what you did")


async def read_form(request: Request, most: int = MAX_FORM) -> dict[str, str]:
    """The fields of a form of at most ``most`` bytes; of a field that comes twice the first.

    Raises:
        BadInput: it is no form, or too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    length = request.headers.get("content-length", "")
    if kind != "application/x-www-form-urlencoded" or not length.isdecimal() or int(length) > most:
        raise BadInput(f"a form of at most {most // 1024} kB is expected")
    try:
        fields = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=20)
    except ValueError as error:
        raise BadInput("the form cannot be read") from error
    return {name: values[0] for name, values in fields.items()}


class Shield:
    """Steps 1 and 2, around the whole application.

    Args:
        app: what is shielded.
        hosts: names by which this machine may be called, in lower case, without port.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        response: ASGIApp = self._app
        called = Headers(scope=scope).getlist("host")
        if len(called) != 1 or _name(called[0]) not in self._hosts:
            response = PlainTextResponse("this dashboard goes by another name\n", status_code=421)

        async def shielded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await response(scope, receive, shielded)


def _name(host: str) -> str:
    """The name in a Host header, without port."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.partition(":")[0].lower()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
