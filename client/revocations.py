# SPDX-License-Identifier: Apache-2.0
"""A coordinator whose issuing key was stolen: the root took it back, and no connection to who holds it comes about.

The node trusts what the consortium's root vouches for. Where an issuing key became known to others, the coordinator
makes a new one and the root signs a list of those that it took back (``fedneuro-server rotate --take-back`` writes
``ca/root.crl``). The list is handed to hospitals like an invitation; it proves itself, since the pinned root signed it:

    [superlink]
    revocations = "root.crl"

OpenSSL's own check would ask for a list of every authority in the chain, each renewed every two weeks. So the chain is
compared with the one list after the handshake and before the first byte (RFC 5280, section 5; Python offers the
verified chain from 3.13 on by name, before that under a private one).

gRPC, which carries enrolment and renewal, shows no chain. So its call is made twice over: a handshake by Python, whose
chain is compared as above, and then gRPC's, which trusts that very certificate and no other (:func:`seen_certificate`).
Who stands in between and holds the stolen key cannot use the first for the second: it lacks that certificate's key.
"""

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ..privacy.errors import BadInput
from .way import Way

__all__ = ["Revocations", "refuse_revoked", "seen_certificate"]


class Revocations:
    """Serial numbers that the root took back.

    Args:
        path: the list, PEM.
        root: the pinned root certificate, PEM: a file, or its content.

    Raises:
        BadInput: it is not a list, or another authority's.
    """

    def __init__(self, path: Path, root: Path | str | bytes) -> None:
        try:
            content = root if isinstance(root, bytes) else Path(root).read_bytes()
            authority = x509.load_pem_x509_certificate(content)
            listed = x509.load_pem_x509_crl(path.read_bytes())
        except (OSError, ValueError) as error:
            text = f"{path}: is not a list of revoked certificates ({error})"
            raise BadInput(f"{text}; ask the coordinator for its ca/root.crl") from error
        key = authority.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not listed.is_signature_valid(key):
            raise BadInput(f"{path}: was not signed by the pinned authority; do not use it, telephone the coordinator")
        self._issuer = authority.subject
        self._serials = {entry.serial_number for entry in listed}

    def check(self, chain: Iterator[bytes]) -> None:
        """Refuse a chain of DER certificates that holds one of the list.

        Raises:
            ssl.SSLCertVerificationError: it does.
        """
        for der in chain:
            certificate = x509.load_der_x509_certificate(der)
            if certificate.issuer == self._issuer and certificate.serial_number in self._serials:
                name = certificate.subject.rfc4514_string()
                error = ssl.SSLCertVerificationError(1, f"certificate revoked: {name}")
                error.verify_message = f"certificate revoked: the root took {name} back"
                raise error


def refuse_revoked(context: ssl.SSLContext, revocations: Revocations) -> None:
    """Let every connection of ``context`` end in its handshake where the other side's chain holds a revoked one."""

    class CheckedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            revocations.check(_verified_chain(self))

    context.sslsocket_class = CheckedSocket


def seen_certificate(address: str, root: bytes, revocations: Path) -> bytes:
    """The certificate that the gRPC server at ``address`` shows; no certificate above it was taken back.

    Args:
        address: ``host:port``.
        root: the pinned root certificate, PEM.
        revocations: the root's list.

    Returns:
        PEM, to be trusted in the root's place for one call.

    Raises:
        BadInput: the list is none.
        ssl.SSLCertVerificationError: the chain does not reach the root, is another host's, or holds a revoked one.
        OSError: nobody answers.
    """
    way = Way(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=root.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    refuse_revoked(context, Revocations(revocations, root))
    with way.connect() as connection, context.wrap_socket(connection, server_hostname=way.host) as secure:
        return ssl.DER_cert_to_PEM_cert(next(_verified_chain(secure))).encode("ascii")


def _verified_chain(connection: ssl.SSLSocket) -> Iterator[bytes]:
    """The chain up to the root that OpenSSL found, DER."""
    public: Any = getattr(connection, "get_verified_chain", None)
    if public is not None:
        yield from public()
        return
    handshake: Any = connection._sslobj  # type: ignore[attr-defined]
    for certificate in handshake.get_verified_chain():
        yield ssl.PEM_cert_to_DER_cert(certificate.public_bytes())
