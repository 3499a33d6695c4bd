# SPDX-License-Identifier: Apache-2.0
"""The hospital's side of Flower: each message goes through the same :class:`Site`, and nothing else.

In a deployment the hospital's own runner (:mod:`fedneuro.client.runner`) calls :func:`answer` itself. The
``app`` below is what the thin bundle names; Ray runs handlers made by :func:`serve` too. Whatever goes wrong, only a
reason code leaves: exceptions are never shown to Flower, which would send their text to the coordinator.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from ..privacy.contract import Refusal
from ..privacy.errors import BadInput, ContractViolation, FedNeuroError, Reason
from ..privacy.wire import MESSAGE_TYPES, decode_request, encode_reply
from ..privacy.wire_bytes import is_squeezed, squeeze, unsqueeze
from .node_settings import load_node_settings
from .site import Site

__all__ = ["answer", "app", "masked", "serve"]

_log = logging.getLogger("fedneuro.node")

SiteOf = Callable[[Context], Site]


def answer(message: Message, site: Site) -> Message:
    """Decode the request, let the site handle it, encode the reply in the form in which the request came.

    Raises:
        ContractViolation: the request is not what was agreed; the caller answers with :func:`masked`.
    """
    request = decode_request(unsqueeze(message.content))
    if MESSAGE_TYPES[request.kind] != message.metadata.message_type:
        raise ContractViolation(f"a {request.kind} request in a message of type {message.metadata.message_type[:40]!r}")
    reply = site.handle(request)
    try:
        content = encode_reply(reply)
    except ContractViolation as error:
        refusal = Refusal(site=site.settings.name, kind=request.kind, round=request.round, reason=error.reason)
        content = encode_reply(refusal)
    return Message(squeeze(content) if is_squeezed(message.content) else content, reply_to=message)


def masked(message: Message, error: Exception) -> Message:
    """A Flower error that says a reason code only; the full text goes to the node's own log."""
    if isinstance(error, FedNeuroError):
        _log.warning("refused: %s", error)
        reason = error.reason
    else:
        _log.error("unexpected error", exc_info=error)
        reason = Reason.INTERNAL
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason.value), reply_to=message)


def serve(client_app: ClientApp, site_of: SiteOf) -> None:
    """Register the handlers of all kinds of request on ``client_app``."""

    def handle(message: Message, context: Context) -> Message:
        site: Site | None = None
        try:
            site = site_of(context)
            return answer(message, site)
        except Exception as error:
            if site is not None:
                site.turn_away(message.metadata.message_type, error)
            return masked(message, error)

    for message_type in MESSAGE_TYPES.values():
        category, _, action = message_type.partition(".")
        register = {"query": client_app.query, "train": client_app.train, "evaluate": client_app.evaluate}[category]
        register(action or "default")(handle)


@cache
def _site(path: str) -> Site:
    return Site(load_node_settings(Path(path)).site_settings())


def _configured(_: Context) -> Site:
    """The site of the node file that the hospital named in its environment."""
    path = os.environ.get("FEDNEURO_NODE")
    if not path:
        raise BadInput("FEDNEURO_NODE is not set; let it name the node's settings file")
    return _site(path)


app = ClientApp()
serve(app, _configured)
