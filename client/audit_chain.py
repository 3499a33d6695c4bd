# SPDX-License-Identifier: Apache-2.0
"""The form of the audit log, and how anyone proves it with the node's public key alone.

One entry is one line: a JSON object with sorted keys. Each holds its number ``n`` (from 1, without gaps), the time
``at`` (UTC; nothing depends on it), its ``kind``, its fields, the hash of the entry before (``previous``) and its own
``hash``, the SHA-256 of all else. Entries of kind ``checkpoint`` carry the node's signature over all that stands before
them. Beside the log lies its *head*: number, hash and signature of the last entry. So

    an edit, a removal, an insertion or another order    breaks the chain of hashes
    a chain that was computed anew after an edit         has no valid signature
    a log that was cut short                             does not reach its head
    a log and a head that were both put back             contradict any head that was noted elsewhere (``expect``)

Method: Haber and Stornetta 1991, https://doi.org/10.1007/BF00196791. Signatures: ECDSA over P-384 with SHA-384 (the
node's own key) or Ed25519.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from ..privacy.errors import BadInput, Reason, Refused

__all__ = [
    "Entry", "Head", "Signer", "check_log", "distrust", "head_path", "line_of", "load_public_key", "read_lines",
    "seal", "verify_log",
]  # fmt: skip

Entry = Mapping[str, Any]
PublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey

START = "0" * 64
"""``previous`` of the first entry."""
REMEDY = (
    "nothing leaves this hospital until it is settled. Keep the log and its head for the inquiry and tell the data "
    "protection officer; once both are moved elsewhere, the node begins a new log"
)


def distrust(path: Path, what: str) -> Refused:
    """The error for a log that is not the one that was written."""
    return Refused(f"audit log {path}: {what}; {REMEDY}", reason=Reason.AUDIT_DISTRUSTED)


def head_path(log: Path) -> Path:
    """Where the head of the log ``log`` lies."""
    return log.with_suffix(".head")


# -- entries -------------------------------------------------------------------------------------------------


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def seal(values: Mapping[str, Any]) -> Entry:
    """``values`` with their hash."""
    return {**values, "hash": hashlib.sha256(_canonical(values).encode()).hexdigest()}


def line_of(entry: Entry) -> bytes:
    """The line of an entry, with its end."""
    return _canonical(entry).encode() + b"\n"


def read_lines(content: bytes, previous: str, first: int, path: Path) -> list[Entry]:
    """Entries of complete lines, chained to the hash ``previous``; the first has number ``first``.

    Raises:
        Refused: naming the first line that is not as it was written; reason ``audit-distrusted``.
    """
    entries: list[Entry] = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=first):
        entry = _entry(line)
        if entry is None:
            raise distrust(path, f"line {number} was changed after it was written")
        if entry.get("n") != number or entry.get("previous") != previous:
            raise distrust(path, f"line {number} is not the one that stood there: a line was moved, removed or added")
        entries.append(entry)
        previous = entry["hash"]
    return entries


def _entry(line: bytes) -> Entry | None:
    """The entry of a line, or None where the line is not as it was written."""
    try:
        entry: Entry = json.loads(line)
        values = {key: value for key, value in entry.items() if key != "hash"}
        return entry if line + b"\n" == line_of(entry) and seal(values) == entry else None
    except (ValueError, AttributeError, RecursionError):
        return None


# -- signatures ----------------------------------------------------------------------------------------------


class Signer:
    """Signs with a private key in ``path`` (the node's): P-384 or Ed25519, PEM or OpenSSH, without a passphrase.

    Raises:
        BadInput: it cannot be read, or is another kind of key.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            load = load_ssh_private_key if b"OPENSSH" in content[:40] else load_pem_private_key
            key = load(content, None)
        except OSError as error:
            raise BadInput(f"{path}: the node's key cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BadInput(f"{path}: is not a private key without passphrase, so the audit log cannot be signed") from (
                error
            )
        if not isinstance(key, ec.EllipticCurvePrivateKey | Ed25519PrivateKey):
            raise BadInput(f"{path}: is neither a P-384 nor an Ed25519 key, so the audit log cannot be signed")
        self._key = key

    def sign(self, text: bytes) -> str:
        """The signature, in hexadecimal digits."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(text).hex()
        return self._key.sign(text, ec.ECDSA(hashes.SHA384())).hex()

    @property
    def public(self) -> PublicKey:
        """The public half."""
        return self._key.public_key()

    @property
    def public_pem(self) -> str:
        """The public half as PEM, for the officer."""
        return self.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def load_public_key(path: Path) -> PublicKey:
    """A public key, PEM or OpenSSH.

    Raises:
        BadInput: it cannot be read, or is another kind of key.
    """
    try:
        content = path.read_bytes()
        load = load_pem_public_key if content.startswith(b"-----") else load_ssh_public_key
        key = load(content)
    except OSError as error:
        raise BadInput(f"--public-key {path}: cannot be read ({error.strerror})") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"--public-key {path}: is not a public key; fedneuro-node audit public-key prints it") from error
    if not isinstance(key, ec.EllipticCurvePublicKey | Ed25519PublicKey):
        raise BadInput(f"--public-key {path}: is neither a P-384 nor an Ed25519 key")
    return key


def _verify(key: PublicKey, signature: str, text: bytes) -> None:
    """Raises InvalidSignature or ValueError where ``signature`` is not the key's under ``text``."""
    if isinstance(key, Ed25519PublicKey):
        key.verify(bytes.fromhex(signature), text)
    else:
        key.verify(bytes.fromhex(signature), text, ec.ECDSA(hashes.SHA384()))


def checkpoint_text(site: str, number: int, previous: str) -> bytes:
    """What a checkpoint signs: the hospital, the entry's number, and the hash that covers all before it."""
    return f"fedneuro audit checkpoint 1\0{site}\0{number}\0{previous}".encode()


# -- head ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where a log ends: number and hash of an entry, the hospital's name, and the node's signature (or empty)."""

    n: int
    hash: str
    site: str
    signature: str = ""

    @property
    def text(self) -> bytes:
        """What the signature is over."""
        return f"fedneuro audit head 1\0{self.site}\0{self.n}\0{self.hash}".encode()

    def to_json(self) -> str:
        """As it is written beside the log."""
        return json.dumps({"n": self.n, "hash": self.hash, "site": self.site, "signature": self.signature}) + "\n"

    @classmethod
    def read(cls, log: Path) -> "Head | None":
        """The head beside ``log``, or None where there is none.

        Raises:
            Refused: it is not a head.
        """
        try:
            values = json.loads(head_path(log).read_bytes())
            head = cls(**values)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise distrust(log, f"its head {head_path(log).name} was changed") from error
        if not (type(head.n) is int and all(isinstance(t, str) for t in (head.hash, head.site, head.signature))):
            raise distrust(log, f"its head {head_path(log).name} was changed")
        return head


# -- verification --------------------------------------------------------------------------------------------


def check_log(entries: Sequence[Entry], head: Head | None, key: PublicKey | None, path: Path) -> None:
    """Refuse entries whose site, signatures or end are not right; the chain was checked by :func:`read_lines`.

    Args:
        entries: all entries.
        head: what was written beside the log.
        key: of the node; None checks no signature.
        path: of the log, for the message.

    Raises:
        Refused: reason ``audit-distrusted``.
    """
    if not entries or entries[0].get("kind") != "begin":
        raise distrust(path, "it does not begin with its first entry")
    if head is None:
        raise distrust(path, f"its head {head_path(path).name} is gone, so nothing says where it ends")
    site = str(entries[0].get("site"))
    if head.site != site:
        raise distrust(path, f"it is of hospital {site}, its head of {head.site}")
    if len(entries) < head.n or head.n < 1:
        raise distrust(path, f"it was cut short: it has {len(entries)} entries, its head says {head.n}")
    if entries[head.n - 1]["hash"] != head.hash:
        raise distrust(path, f"entry {head.n} is not the one that its head names")
    if key is None:
        return
    signed = [(e["n"], e.get("signature"), checkpoint_text(site, e["n"], e["previous"]))
              for e in entries if e.get("kind") == "checkpoint"]  # fmt: skip
    for number, signature, text in [*signed, (head.n, head.signature, head.text)]:
        try:
            _verify(key, str(signature), text)
        except (InvalidSignature, ValueError) as error:
            raise distrust(path, f"the signature at entry {number} is not of this node's key") from error


def verify_log(path: Path, key: PublicKey | None, *, expect: tuple[int, str] | None = None) -> list[Entry]:
    """All entries of a log that is whole, in order, signed and reaches its head.

    Args:
        path: the log; its head lies beside it.
        key: the node's public key; None checks no signature.
        expect: number of an entry, and the beginning of its hash, noted at an earlier time elsewhere.

    Raises:
        BadInput: the log cannot be read.
        Refused: it is not as it was written; reason ``audit-distrusted``.
    """
    head = Head.read(path)  # first: an entry that is written meanwhile must not look missing
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: the audit log cannot be read ({error.strerror})") from error
    entries = read_lines(content, START, 1, path)
    if torn := len(content) - (content.rfind(b"\n") + 1):
        raise distrust(
            path, f"its last line was cut short after {torn} bytes (a power cut?); the node mends it when it starts"
        )
    check_log(entries, head, key, path)
    if expect and (len(entries) < expect[0] or not entries[expect[0] - 1]["hash"].startswith(expect[1])):
        raise distrust(path, f"entry {expect[0]} does not begin with {expect[1]}: another log was put in its place")
    return entries
