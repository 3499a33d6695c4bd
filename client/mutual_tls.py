# SPDX-License-Identifier: Apache-2.0
"""Lets Flower's SuperNode show a client certificate, which the coordinator's guard asks for.

Flower 1.41 has no option for it: ``FleetHttpClient.from_server_address`` makes a TLS context from root certificates
alone. But its constructor takes any context, so one class method is replaced, in the one module that calls it
(``flwr/supernode/fleet_http_connection.py``), and no forwarder is needed beside the node. Every request of a
SuperNode goes through that client. A contract test reads Flower's source and fails if that is no longer so.
"""

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ..privacy.errors import BadInput
from ..privacy.identity import require_private
from .revocations import Revocations, refuse_revoked

__all__ = ["client_context", "present_certificate"]


def client_context(roots: bytes | str, certificate: Path, key: Path, revocations: Path | None = None) -> ssl.SSLContext:
    """A TLS context that trusts ``roots`` (PEM, or a file of it) only, and shows ``certificate``.

    Args:
        roots: what is trusted.
        certificate: with its chain.
        key: its private key.
        revocations: the root's list of what it took back, if the hospital has one.

    Raises:
        BadInput: a file is missing, does not fit the other, or the key can be read by others.
    """
    require_private(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if isinstance(roots, bytes):
            context.load_verify_locations(cadata=roots.decode("ascii"))
        else:
            context.load_verify_locations(cafile=roots)
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError, UnicodeDecodeError) as error:
        text = f"{certificate} and {key}: cannot be used as certificate and key ({error})"
        raise BadInput(f"{text}; fedneuro-node renew, or enrol again") from error
    if revocations is not None:
        refuse_revoked(context, Revocations(revocations, roots))
    return context


def present_certificate(certificate: Path, key: Path, revocations: Path | None = None) -> None:
    """From now on, the SuperNode of this process shows ``certificate`` to the SuperLink; see :func:`client_context`.

    Raises:
        BadInput: a file is missing, does not fit the other, or the key can be read by others.
    """
    from flwr.supernode import fleet_http_connection as connection

    require_private(key)

    class MutualFleetHttpClient(connection.FleetHttpClient):  # type: ignore[misc,name-defined]
        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            insecure: bool,
            root_certificates: bytes | str | None,
            interceptors: Sequence[Any],
            *,
            retry_invoker: Any = None,
        ) -> Self:
            if insecure or root_certificates is None:
                raise BadInput("a client certificate needs TLS and --root-certificates")
            context = client_context(root_certificates, certificate, key, revocations)
            address = f"https://{server_address}"
            made: Self = cls(address, interceptors=interceptors, verify=context, retry_invoker=retry_invoker)
            return made

    connection.__dict__["FleetHttpClient"] = MutualFleetHttpClient
