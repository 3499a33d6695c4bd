# SPDX-License-Identifier: Apache-2.0
"""Private keys on the machine that uses them, certificate requests, and fingerprints: what both sides need of X.509.

A hospital makes its keys itself (:func:`new_key`) and sends only public halves: a PKCS #10 request
(:func:`signing_request`, RFC 2986) for its TLS certificate and the public key of its Flower node. Keys are ECDSA on
P-384 (FIPS 186-5), which Flower's node authentication asks for. Every private file is created with mode 0600 and
is never overwritten.
"""

import hashlib
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from .errors import BadInput, EnvironmentProblem

__all__ = [
    "SITE_NAME",
    "fingerprint",
    "identity_of_pem",
    "is_p384",
    "make_node_key",
    "new_key",
    "openssh",
    "pkcs8",
    "public_identity",
    "public_pem",
    "replace_file",
    "require_private",
    "signing_request",
    "write_private",
]

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""What a site may be called. It becomes part of file names: no separator, no leading dot."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new private key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def is_p384(key: object) -> bool:
    """Whether ``key`` is a public key on P-384."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as PEM without passphrase, for TLS."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key in OpenSSH form, as Flower's SuperNode reads it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half as Flower registers it (X.509 PEM)."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def make_node_key(path: Path) -> bytes:
    """Write a new private key to ``path`` in OpenSSH form; returns the public key as Flower registers it."""
    key = new_key()
    write_private(path, openssh(key))
    return public_pem(key)


def signing_request(key: ec.EllipticCurvePrivateKey, site: str) -> bytes:
    """A PKCS #10 request in PEM for a certificate in the name of ``site``, signed with ``key``."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    return (
        x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)
    )


def public_identity(key: ec.EllipticCurvePublicKey) -> bytes:
    """A node's public key as its peers hold it: a compressed point of P-384 (SEC 1, section 2.3.3), 49 bytes."""
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def identity_of_pem(pem: bytes) -> bytes:
    """The public identity in a PEM file of a public P-384 key.

    Raises:
        EnvironmentProblem: it holds another kind of key.
    """
    key = load_pem_public_key(pem)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EnvironmentProblem("a node's public key is of another kind: expected P-384")
    return public_identity(key)


def fingerprint(of: x509.Certificate | bytes) -> str:
    """What people compare by telephone, and ``[[peer]]`` in node.toml pins: SHA-256, 64 hexadecimal digits.

    Args:
        of: a certificate, taken in its DER form; or a node's public identity (:func:`public_identity`).
    """
    return hashlib.sha256(of if isinstance(of, bytes) else of.public_bytes(Encoding.DER)).hexdigest()


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on.

    Raises:
        FileExistsError: the file is there already.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Put ``content`` in place of ``path`` in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    write_private(temporary, content)
    temporary.chmod(mode)
    temporary.replace(path)


def require_private(path: Path) -> None:
    """Check that only its owner can read ``path``.

    Raises:
        BadInput: the file is not there, or others can read it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise BadInput(f"{path}: can be read by others; run chmod 600 on it, and renew the key if anyone else was here")
