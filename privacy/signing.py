# SPDX-License-Identifier: Apache-2.0
"""A coordinator's signature under a study: Ed25519 over the study hash, so a hospital may approve by who asks.

The study hash is the SHA-256 of the canonical form, so the signature holds for every digit of the study. The signed
text begins with words of its own: a signature made for anything else is none here. Reference: RFC 8032.
"""

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from .errors import BadInput, Reason, Refused
from .study import Study

__all__ = ["SIGNATURE_BYTES", "load_signing_key", "public_text", "sign_study", "verify_study", "verify_study_hash"]

SIGNATURE_BYTES = 64


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 private key in ``path``, PEM or OpenSSH, without a passphrase.

    Raises:
        BadInput: there is no such file, others can read it, or it holds another kind of key.
    """
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise BadInput(f"{path}: the signing key cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise BadInput(f"{path}: the signing key can be read by others; run chmod 600 on it")
    load = load_ssh_private_key if b"OPENSSH" in content[:40] else load_pem_private_key
    try:
        key = load(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: is not a private key without passphrase; make one: ssh-keygen -t ed25519") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{path}: is not an Ed25519 key; make one: ssh-keygen -t ed25519")
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half as 64 hexadecimal digits: what a hospital writes into ``policy.toml``."""
    return key.public_key().public_bytes_raw().hex()


def sign_study(study: Study, key: Ed25519PrivateKey) -> bytes:
    """The signature of ``key`` under ``study``: 64 bytes."""
    return key.sign(_signed(study.hash))


def verify_study(study: Study, signature: bytes, public_key: str) -> None:
    """Check that the owner of ``public_key`` (64 hexadecimal digits) signed ``study``.

    Raises:
        Refused: another study, another key, or no signature at all; reason ``study-not-approved``.
    """
    verify_study_hash(study.hash, signature, public_key)


def verify_study_hash(study_hash: str, signature: bytes, public_key: str) -> None:
    """As :func:`verify_study`, for a study of which the hash is known."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, _signed(study_hash))
    except (InvalidSignature, ValueError) as error:
        raise Refused(
            f"study {study_hash[:12]} is not signed by the coordinator's key {public_key[:12]}",
            reason=Reason.STUDY_NOT_APPROVED,
        ) from error


def _signed(study_hash: str) -> bytes:
    return b"fedneuro study signature 1\0" + study_hash.encode("ascii")
