# SPDX-License-Identifier: Apache-2.0
"""Sealed JSON files: content and an Ed25519 signature in one file, of which no byte can change unseen.

    {"content": {…}, "seal": {"key": …, "signature": …, "voucher": {"key": …, "signature": …} or null}}

The signature covers the purpose of the file, the study hash and the SHA-256 of the content, and the file must stand
in exactly the form in which :func:`write_sealed` writes it; so white space, the order of keys and the spelling of a
number are covered, too. A signature made for one purpose or study is none for another.

A run takes hours and ends without a person, while the consortium's key lies sealed under a passphrase. So a
deployment gives each run a key of its own, and the consortium's key *vouches* for it, for this study only
(:func:`vouch`), when a person launches the study. Without a voucher a run's key proves that nothing was changed
since the file was written, and not who wrote it.

Reference: RFC 8032 (Ed25519).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import BadInput, Refused
from .signing import public_text

__all__ = [
    "Hex64",
    "Hex128",
    "Seal",
    "Signer",
    "Voucher",
    "as_text",
    "check_seal",
    "public_key",
    "read_sealed",
    "vouch",
    "write_sealed",
]

MAX_BYTES: Final = 64 << 20
"""A file beyond this is no manifest of ours."""
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Voucher(_Part):
    """That the owner of ``key`` lets a run's key sign for one study."""

    key: Hex64
    signature: Hex128


class Seal(_Part):
    """Who signed, and the signature."""

    key: Hex64
    signature: Hex128
    voucher: Voucher | None


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key, and who vouches for it."""

    key: Ed25519PrivateKey
    voucher: Voucher | None = None


def vouch(coordinator: Ed25519PrivateKey, run_key: str, study_hash: str) -> Voucher:
    """The coordinator's word that ``run_key`` (64 hexadecimal digits) may sign for the study."""
    signature = coordinator.sign(_vouched(run_key, study_hash))
    return Voucher(key=public_text(coordinator), signature=signature.hex())


def as_text(values: Mapping[str, Any]) -> str:
    """The one form in which sealed content stands in a file: indented JSON, UTF-8, keys in their order, no NaN."""
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed(path: Path, purpose: str, study_hash: str, content: Mapping[str, Any], signer: Signer) -> None:
    """Write ``content`` with its seal, in one step."""
    signature = signer.key.sign(_signed(purpose, study_hash, content))
    seal = Seal(key=public_text(signer.key), signature=signature.hex(), voucher=signer.voucher)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(as_text({"content": content, "seal": seal.model_dump()}), encoding="utf-8")
    temporary.replace(path)


def read_sealed(path: Path) -> tuple[dict[str, Any], Seal]:
    """Content and seal of a file; the signature is not looked at yet.

    Raises:
        BadInput: the file cannot be read.
        Refused: it does not stand in the form in which it was written.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path}: is larger than {MAX_BYTES >> 20} MiB; it is not a file that FedNeuro sealed")
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    try:
        values = json.loads(raw)
        if as_text(values).encode() != raw:
            raise ValueError("another form")
        content, seal = values["content"], Seal.model_validate(values["seal"])
        if set(values) != {"content", "seal"} or not isinstance(content, dict):
            raise ValueError("other parts")
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError) as error:
        raise Refused(f"{path}: is not in the form in which FedNeuro writes it; it was changed, or cut off") from error
    return content, seal


def check_seal(
    seal: Seal, purpose: str, study_hash: str, content: Mapping[str, Any], *, expected: str | None = None
) -> str:
    """Check signature and voucher; returns in words who signed.

    Args:
        seal: as :func:`read_sealed` gave it.
        purpose: of the file.
        study_hash: of the study that the content belongs to.
        content: as :func:`read_sealed` gave it.
        expected: public key, 64 hexadecimal digits, that must have signed or vouched; None: whoever did.

    Raises:
        Refused: another key, or the content is not what was signed.
    """
    _verify(seal.key, seal.signature, _signed(purpose, study_hash, content), "the content is not what was signed")
    if seal.voucher is not None:
        text = _vouched(seal.key, study_hash)
        _verify(seal.voucher.key, seal.voucher.signature, text, "nobody vouches for the key that signed")
    owner = seal.voucher.key if seal.voucher else seal.key
    if expected is not None and expected not in (owner, seal.key):
        raise Refused(f"signed by key {owner[:16]}…, not by {expected[:16]}…")
    if expected is not None:
        return f"by {expected[:16]}…, as expected"
    if seal.voucher is not None:
        return f"by the run's key, for which key {owner[:16]}… vouches; whose that is, --key PUB shows"
    return f"by key {owner[:16]}…; whose that is, --key PUB shows"


def public_key(text: str) -> str:
    """A public Ed25519 key as 64 hexadecimal digits, from those digits, or from a file with them, PEM or OpenSSH.

    Raises:
        BadInput: it is none of these.
    """
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text
    try:
        content = Path(text).read_bytes()[:10_000].strip()
    except OSError as error:
        raise BadInput(f"--key {text[:80]}: neither 64 hexadecimal digits nor a file ({error.strerror})") from error
    if re.fullmatch(rb"[0-9a-f]{64}", content):
        return content.decode("ascii")
    try:
        key = (load_ssh_public_key if content.startswith(b"ssh-") else load_pem_public_key)(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(
            f"{text}: is not a public key; expected study.pub, or an Ed25519 key in PEM or OpenSSH"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BadInput(f"{text}: is not an Ed25519 key, with which coordinators sign")
    return key.public_bytes_raw().hex()


def _verify(key: str, signature: str, text: bytes, otherwise: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), text)
    except (InvalidSignature, ValueError) as error:
        raise Refused(f"the signature does not hold: {otherwise}") from error


def _signed(purpose: str, study_hash: str, content: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(as_text(content).encode()).hexdigest()
    return b"fedneuro seal 1\0" + "\0".join((purpose, study_hash, digest)).encode()


def _vouched(run_key: str, study_hash: str) -> bytes:
    return b"fedneuro run key 1\0" + f"{run_key}\0{study_hash}".encode("ascii")
