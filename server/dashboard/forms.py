# SPDX-License-Identifier: Apache-2.0
"""What the forms for a person's three deeds share: invite a hospital, launch a study, release a run.

Each asks for the passphrase of the issuing key, also an invitation, which the command line makes without: there,
whoever can read the consortium's folder may, and here, whoever has a browser on this machine must not. A passphrase is
used for the one request that brought it and kept nowhere.
"""

import threading
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from starlette.requests import Request
from starlette.responses import Response

from ...privacy.errors import BadInput, EnvironmentProblem, FedNeuroError, Refused, StateError
from ..consortium import Consortium
from ..limits import Doorkeeper, TooMany
from ..sealed_keys import Passphrase
from .home import Home
from .pages import Pages

__all__ = ["Forms", "Typed", "code_of", "download"]

WHAT: Final = "the issuing key"
CODES: Final = ((TooMany, 429), (Refused, 403), (StateError, 409), (EnvironmentProblem, 503), (BadInput, 400))


class Typed(Passphrase):
    """A passphrase that came with a form."""

    def __init__(self, text: str) -> None:
        super().__init__(WHAT, "")
        self.text = text

    def _find(self, new: bool) -> str:  # noqa: ARG002 - it is never a new one
        return self.text


class Forms:
    """Of one dashboard.

    Args:
        home: what is shown.
        pages: makes the answers.
        doorkeeper: how often an address may try a passphrase.
    """

    def __init__(self, home: Home, pages: Pages, doorkeeper: Doorkeeper | None = None) -> None:
        self.home, self._pages = home, pages
        self._doorkeeper = doorkeeper or Doorkeeper()
        self._turn = threading.Lock()

    @property
    def consortium(self) -> Consortium:
        """The consortium.

        Raises:
            BadInput: a run or a folder of runs is shown.
        """
        if self.home.consortium is None:
            raise BadInput("only a consortium can do this; give the dashboard its folder")
        return self.home.consortium

    def show(self, request: Request, template: str, fault: FedNeuroError | None = None, **view: Any) -> Response:
        """A page with a form; after a fault with what was typed, but for the passphrase."""
        code, faults = (code_of(fault), str(fault).splitlines()) if fault else (200, [])
        return self._pages.show(request, template, status=code, faults=faults, **view)

    def unlock(self, request: Request) -> Typed:
        """The passphrase of the form, which opens the key that signs.

        Raises:
            TooMany: this address tries too often; the passphrase was not looked at.
            BadInput: there is none, or it is wrong.
        """
        typed = Typed(request.state.fields.get("passphrase", ""))
        if not typed.text:
            raise BadInput(f"give the passphrase of {WHAT}")
        address = request.client.host if request.client else ""
        self._doorkeeper.admit(address)
        try:
            with self._turn:  # a guess takes 128 MB
                self.consortium.unlock_study_key(typed)
        except BadInput as error:
            if self._doorkeeper.failed(address):
                raise TooMany("too many failed attempts; wait a quarter of an hour") from error
            if isinstance(error.__cause__, InvalidTag):
                raise BadInput(f"wrong passphrase for {WHAT}") from error
            raise
        return typed


def code_of(error: Exception) -> int:
    """The status with which a browser is told of an error."""
    return next((code for kind, code in CODES if isinstance(error, kind)), 409)


def download(name: str) -> dict[str, str]:
    """Headers of an answer that a browser saves under this name."""
    return {"content-disposition": f'attachment; filename="{name}"'}
