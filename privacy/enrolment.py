# SPDX-License-Identifier: Apache-2.0
"""What hospital and coordinator say to each other at enrolment: the invitation, and the messages of two calls.

The service is gRPC over TLS with two methods; messages are JSON of the strict models below, so that each side
reads exactly the agreed keys, types and lengths and nothing else (no generated code, no reflection).

    1. ``invite`` writes an :class:`Invitation`: one-time token, and the authority that the hospital pins
    2. ``Enrol``: the hospital sends the token, a certificate request and its node's public key; private keys stay
    3. the reply (:class:`Credentials`) brings its certificate and what its node needs to know
    4. ``Renew``, over mTLS with the present certificate: a new request, a new certificate

The token is 256 bits from the operating system; the coordinator keeps its SHA-256 only.
"""

import base64
import binascii
import hashlib
import hmac
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .contract import Role
from .errors import BadInput, ContractViolation
from .identity import SITE_NAME, fingerprint

__all__ = [
    "ENROL",
    "MAX_MESSAGE_BYTES",
    "RENEW",
    "SERVICE",
    "Credentials",
    "EnrolRequest",
    "Invitation",
    "RenewRequest",
    "decode",
    "encode",
    "read_invitation",
    "token_hash",
]

SERVICE = "fedneuro.Enrolment"
ENROL, RENEW = "Enrol", "Renew"
MAX_MESSAGE_BYTES = 32 * 1024
"""A request is about 2 kB, a reply about 4 kB."""

Site = Annotated[str, Field(pattern=SITE_NAME)]
Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-\[\]:]{1,253}:[0-9]{1,5}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pem = Annotated[str, Field(min_length=1, max_length=12_000, pattern=r"^-----BEGIN ")]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Invitation(_Message):
    """What ``fedneuro-server invite`` hands to one hospital; whoever holds it may enrol once under its name."""

    format: Annotated[str, Field(pattern=r"^fedneuro-invitation-1$")] = "fedneuro-invitation-1"
    consortium: Annotated[str, Field(min_length=1, max_length=64)]
    site: Site
    role: Annotated[Role, Field(strict=False)]
    expires: int
    """Seconds since 1970, UTC."""
    enrolment: Address
    superlink: Address
    token: Token
    fingerprint: Sha256
    """SHA-256 of the consortium's root certificate: compare it with the coordinator's by telephone."""
    authority: Annotated[str, Field(max_length=4096)]
    """The root certificate, DER in base64."""

    def root(self) -> x509.Certificate:
        """The pinned root certificate.

        Raises:
            BadInput: it is not a certificate, or not the one of the fingerprint.
        """
        try:
            root = x509.load_der_x509_certificate(base64.b64decode(self.authority, validate=True))
        except (ValueError, binascii.Error) as error:
            raise BadInput("its authority is not a certificate; ask the coordinator for a new invitation") from error
        if not hmac.compare_digest(fingerprint(root), self.fingerprint):
            raise BadInput(
                f"its authority has fingerprint {fingerprint(root)[:16]}…, not {self.fingerprint[:16]}… "
                "as it says: the file was changed; ask the coordinator for a new one"
            )
        return root


class EnrolRequest(_Message):
    """First contact of a hospital."""

    token: Token
    site: Site
    request: Pem
    """PKCS #10 request for the TLS client certificate."""
    node_key: Pem
    """Public key of the Flower node: P-384, SubjectPublicKeyInfo."""


class RenewRequest(_Message):
    """A new certificate for the site of the present one."""

    request: Pem


class Credentials(_Message):
    """What the hospital gets: all of it public."""

    consortium: Annotated[str, Field(min_length=1, max_length=64)]
    site: Site
    role: Annotated[Role, Field(strict=False)]
    chain: Pem
    """The site's certificate, then the issuing one."""
    authority: Pem
    """The root certificate."""
    study_key: Sha256
    """Ed25519 public key with which the coordinator signs studies, 64 hexadecimal digits."""
    bundle: Sha256
    """SHA-256 of the app bundle that the coordinator submits."""
    superlink: Address
    renewal: Address


_Model = TypeVar("_Model", bound=_Message)


def encode(message: BaseModel) -> bytes:
    """``message`` as it travels."""
    return message.model_dump_json().encode()


def decode(model: type[_Model], content: bytes) -> _Model:
    """``content`` as ``model``.

    Raises:
        ContractViolation: too long, or anything but exactly what was agreed; the message repeats no content.
    """
    if len(content) > MAX_MESSAGE_BYTES:
        raise ContractViolation(f"a message of {len(content)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"])) or "JSON"
        raise ContractViolation(f"not a {model.__name__}: {where[:80]}") from error


def read_invitation(path: Path, *, now: float | None = None) -> Invitation:
    """The invitation in a file, or in the text of its QR code saved to a file.

    Raises:
        BadInput: it cannot be read, is not an invitation, was changed, or has expired.
    """
    try:
        content = path.read_bytes()[: MAX_MESSAGE_BYTES + 1]
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give the path of the invitation file") from error
    try:
        invitation = decode(Invitation, json.dumps(json.loads(content)).encode())
    except (ContractViolation, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not an invitation; ask the coordinator for a new one") from error
    try:
        invitation.root()
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    if invitation.expires <= (time.time() if now is None else now):
        day = datetime.fromtimestamp(invitation.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
        raise BadInput(f"{path}: the invitation expired on {day}; ask the coordinator for a new one")
    return invitation


def token_hash(token: str) -> str:
    """What the coordinator keeps of a token."""
    return hashlib.sha256(b"fedneuro enrolment token 1\0" + token.encode("ascii")).hexdigest()
