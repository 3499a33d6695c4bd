# SPDX-License-Identifier: Apache-2.0
"""Enrolment, apart from how it travels: an invitation becomes a certificate and a registered Flower node.

``enrol`` in order; whatever fails, nothing of it holds:

    1. the caller is not too frequent and not locked out
    2. the message is exactly an :class:`EnrolRequest`
    3. its token is of an invitation that is unused, unexpired and of this very site
    4. the certificate request is signed by its key, on P-384, asks for the site's name and nothing else
    5. the node's public key is registered at the SuperLink, under the site's name
    6. invitation used up, certificate and node saved, earlier ones revoked: one transaction
    7. the guard learns of it, then the reply goes out

The hospital's private keys never come here: step 4 proves that it holds the one, Flower's own handshake the other.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from ..privacy.contract import Role
from ..privacy.enrolment import Credentials, EnrolRequest, RenewRequest, decode, encode, token_hash
from ..privacy.errors import ContractViolation, EnvironmentProblem, FedNeuroError, Refused
from ..privacy.identity import is_p384
from .authority import common_name, requested_key, serial_text
from .consortium import Consortium, Issuer
from .limits import Doorkeeper

__all__ = ["Enrolment", "Nodes"]

_log = logging.getLogger("fedneuro.enrolment")


class Nodes(Protocol):
    """The part of :class:`fedneuro.server.control.Control` that enrolment needs."""

    def register(self, public_key: bytes, name: str) -> int:
        """Admit a node; returns its id."""
        ...

    def unregister(self, node_id: int) -> None:
        """Put a node out."""
        ...


class Enrolment:
    """Signs what hospitals ask for.

    Args:
        consortium: whose.
        issuer: its unlocked issuing keys.
        nodes: where Flower nodes are registered.
        bundle: SHA-256 of the app bundle that runs are started with.
        changed: called after a change, before the reply: lets the guard know.
        doorkeeper: rate limit and lockout.
    """

    def __init__(
        self,
        consortium: Consortium,
        issuer: Issuer,
        nodes: Nodes,
        bundle: str,
        changed: Callable[[], None],
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self._consortium, self._issuer, self._nodes = consortium, issuer, nodes
        self._bundle, self._changed = bundle, changed
        self._doorkeeper = doorkeeper or Doorkeeper()
        self._lock = threading.Lock()

    def enrol(self, content: bytes, address: str) -> bytes:
        """The reply to an ``Enrol`` call of ``address``.

        Raises:
            ContractViolation: the message or its certificate request is not as agreed.
            Refused: too many calls, or no such invitation.
            EnvironmentProblem: the SuperLink does not answer; the invitation still holds.
        """
        self._doorkeeper.admit(address)
        try:
            request = decode(EnrolRequest, content)
            role = self._consortium.registry.invited(token_hash(request.token), request.site)
            key = requested_key(request.request.encode(), request.site)
            node_key = _node_key(request.node_key)
        except (ContractViolation, Refused) as error:
            self._count(address, error)
            raise
        self._check_key()
        with self._lock:
            return encode(self._enrol(request, role, key, node_key))

    def _enrol(self, request: EnrolRequest, role: Role, key: ec.EllipticCurvePublicKey, node_key: str) -> Credentials:
        registry = self._consortium.registry
        earlier = registry.site(request.site)
        node_id = self._nodes.register(node_key.encode(), request.site)
        certificate = self._issuer.current.site(key, request.site)
        try:
            record = self._issuer.record(certificate, request.site)
            registry.enrol(token_hash(request.token), node_key, node_id, record)
        except FedNeuroError:
            self._nodes.unregister(node_id)
            raise
        if earlier is not None and earlier.node_id:
            with suppress(Exception):  # it is revoked already; `start` tries again
                self._nodes.unregister(earlier.node_id)
        self._changed()
        _log.info("%s enrolled as %s, certificate %s", request.site, role.value, record.serial)
        return self._credentials(request.site, role, certificate)

    def renew(self, content: bytes, present: bytes, address: str) -> bytes:
        """The reply to a ``Renew`` call with the client certificate ``present`` (PEM, checked by TLS).

        Raises:
            ContractViolation: the message or its certificate request is not as agreed.
            Refused: too many calls, or the certificate is revoked or not one of ours.
        """
        self._doorkeeper.admit(address)
        try:
            site = self._holder(x509.load_pem_x509_certificate(present))
            key = requested_key(decode(RenewRequest, content).request.encode(), site)
        except (ContractViolation, Refused) as error:
            self._count(address, error)
            raise
        known = self._consortium.registry.site(site)
        if known is None:
            raise Refused("this certificate does not hold here; ask the coordinator for an invitation")
        self._check_key()
        certificate = self._issuer.current.site(key, site)
        with self._lock:
            self._consortium.registry.renew(self._issuer.record(certificate, site))
            self._changed()
        _log.info("%s renewed, certificate %s", site, serial_text(certificate))
        return encode(self._credentials(site, known.role, certificate))

    def _check_key(self) -> None:
        """Sign with no key that the root has taken back since this process opened it.

        Raises:
            EnvironmentProblem: it has.
        """
        if self._issuer.number not in dict(self._consortium.issuing()):
            raise EnvironmentProblem("the issuing key was taken back: stop fedneuro-server start, and start it again")

    def _holder(self, certificate: x509.Certificate) -> str:
        """The site of a certificate that holds now."""
        record = self._consortium.registry.certificate(serial_text(certificate))
        good = (
            record is not None
            and record.revoked is None
            and record.pem == certificate.public_bytes(Encoding.PEM).decode("ascii")
            and certificate.not_valid_after_utc > datetime.now(UTC)
            and common_name(certificate) == record.site
        )
        if record is None or not good:
            raise Refused("this certificate does not hold here; ask the coordinator for an invitation")
        return record.site

    def _credentials(self, site: str, role: Role, certificate: x509.Certificate) -> Credentials:
        settings = self._consortium.settings
        return Credentials(
            consortium=self._consortium.name,
            site=site,
            role=role,
            chain=self._issuer.chain(certificate),
            authority=self._consortium.root.public_bytes(Encoding.PEM).decode("ascii"),
            study_key=self._consortium.study_key,
            bundle=self._bundle,
            superlink=settings.outer(settings.ports.guard),
            renewal=settings.outer(settings.ports.renewal),
        )

    def _count(self, address: str, error: FedNeuroError) -> None:
        _log.warning("refused %s: %s", address, error)
        if self._doorkeeper.failed(address):
            self._consortium.registry.note("locked-out", text=f"{address}: too many failed attempts to enrol")


def _node_key(text: str) -> str:
    """The node's public key, written anew in the one form that Flower sends.

    Raises:
        ContractViolation: it is not a public key on P-384.
    """
    try:
        key = load_pem_public_key(text.encode())
    except (ValueError, TypeError) as error:
        raise ContractViolation("the node's key cannot be read") from error
    if not is_p384(key):
        raise ContractViolation("the node's key is of another kind than P-384")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
