# SPDX-License-Identifier: Apache-2.0
"""Keys of secure aggregation: a site's lasting identity, its two key pairs of one round, sealed shares, mask keys.

The identity is an ECDSA key on P-384: at a hospital the key of its Flower node, in a simulation one that the site
makes for itself. It signs the two X25519 public keys that live for one round. Everything symmetric derives from
X25519 through HKDF-SHA-256 with the round's context, so no key serves twice, and nonces may be constant.

References: RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20-Poly1305), FIPS 186-5 (ECDSA).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
)

from ..errors import ContractViolation, EnvironmentProblem
from ..identity import fingerprint, identity_of_pem, public_identity
from .messages import Advert

__all__ = [
    "IDENTITY_BYTES",
    "Identity",
    "RoundKeys",
    "fingerprint",
    "identity_of_pem",
    "mask_key",
    "public_masking_key",
    "self_mask_key",
    "verify_advert",
]

IDENTITY_BYTES = 49
"""A public identity: a compressed point of P-384 (SEC 1, section 2.3.3)."""

_DOMAIN = b"fedneuro secure aggregation 1"  # in every signature and derived key: none serves another protocol
_NONCE = bytes(12)  # each sealing key seals one message


class Identity:
    """A site's lasting signing key, by :meth:`at` or for tests and benchmarks :meth:`fresh`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = public_identity(key.public_key())

    @classmethod
    def fresh(cls) -> "Identity":
        """A new identity in memory."""
        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def at(cls, path: Path, *, create: bool = False) -> "Identity":
        """The identity in a file of OpenSSH form, mode 0600; made there first if ``create`` and it is missing.

        Raises:
            EnvironmentProblem: the file cannot be read, or does not hold a P-384 key.
        """
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            key = cls.fresh()._key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key)
            temporary.replace(path)
        try:
            found = load_ssh_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(
                f"identity key {path} cannot be read ({type(error).__name__}): expected a P-384 key in OpenSSH form"
            ) from error
        if not isinstance(found, ec.EllipticCurvePrivateKey) or not isinstance(found.curve, ec.SECP384R1):
            raise EnvironmentProblem(f"identity key {path} is of another kind: expected P-384 in OpenSSH form")
        return cls(found)

    def advertise(self, study_hash: str, number: int, site: str, keys: "RoundKeys") -> Advert:
        """The public keys of a round, signed."""
        encryption, masking = keys.public
        text = _signed(study_hash, number, site, encryption, masking)
        return Advert(encryption=encryption, masking=masking, signature=self._key.sign(text, ec.ECDSA(hashes.SHA384())))


@dataclass(frozen=True, slots=True)
class RoundKeys:
    """The two X25519 private keys of a site in one round, 32 bytes each; the second is shared among the peers."""

    encryption: bytes
    masking: bytes

    @classmethod
    def fresh(cls) -> "RoundKeys":
        """New keys from the operating system's generator."""
        return cls(os.urandom(32), os.urandom(32))

    @property
    def public(self) -> tuple[bytes, bytes]:
        """Both public keys, in the same order."""
        return _public(self.encryption), _public(self.masking)

    def seal(self, theirs: Advert, content: bytes, context: str, sender: str, recipient: str) -> bytes:
        """Encrypt ``content`` so that only the recipient reads it and knows who sent it, and for which aggregation.

        Raises:
            ContractViolation: the recipient's key is not a usable one.
        """
        return self._cipher(theirs, context, sender, recipient).encrypt(_NONCE, content, None)

    def open(self, theirs: Advert, sealed: bytes, context: str, sender: str, recipient: str) -> bytes:
        """Undo :meth:`seal`.

        Raises:
            ContractViolation: it was not sealed by this sender for this recipient in this aggregation.
        """
        try:
            return self._cipher(theirs, context, sender, recipient).decrypt(_NONCE, sealed, None)
        except InvalidTag as error:
            text = f"the shares that {sender} sealed for {recipient} were changed on the way"
            raise ContractViolation(text) from error

    def _cipher(self, theirs: Advert, context: str, sender: str, recipient: str) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(_derive(_agree(self.encryption, theirs.encryption), "seal", context, sender, recipient))


def mask_key(private: bytes, public: bytes, context: str, one: str, other: str) -> bytes:
    """Key of the mask that two sites share; the same from either side.

    Args:
        private: masking key of one of them.
        public: public masking key of the other.
        context: of the aggregation.
        one: name of a site.
        other: name of the other.

    Raises:
        ContractViolation: the public key is not a usable one.
    """
    return _derive(_agree(private, public), "mask", context, *sorted((one, other)))


def self_mask_key(seed: bytes, context: str, site: str) -> bytes:
    """Key of the mask that a site lays over its own vector."""
    return _derive(seed, "self", context, site)


def verify_advert(advert: Advert, identity: bytes, study_hash: str, number: int, site: str) -> None:
    """Check that ``site``, known by ``identity``, signed these keys for this round.

    Raises:
        ContractViolation: it did not.
    """
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), identity)
        text = _signed(study_hash, number, site, advert.encryption, advert.masking)
        key.verify(advert.signature, text, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise ContractViolation(f"the keys of site {site} for round {number} are not signed by its identity") from error


def public_masking_key(private: bytes) -> bytes:
    """The public key of a masking key that was put together from shares."""
    return _public(private)


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _agree(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ContractViolation("a public key of the aggregation is not a usable X25519 key") from error


def _derive(secret: bytes, *labels: str) -> bytes:
    info = _join(_DOMAIN, *(label.encode() for label in labels))
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def _signed(study_hash: str, number: int, site: str, encryption: bytes, masking: bytes) -> bytes:
    return _join(_DOMAIN, b"advert", study_hash.encode(), str(number).encode(), site.encode(), encryption, masking)


def _join(*parts: bytes) -> bytes:
    """Parts with their lengths before them, so that two lists never give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
