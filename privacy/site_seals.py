# SPDX-License-Identifier: Apache-2.0
"""Sealed JSON files of a hospital: content and a signature of its node's key, in one file of one form.

    {"content": {…}, "seal": {"key": …, "signature": …}}

The key is the one under which the node is enrolled (P-384), so the coordinator knows it already, and hospitals have
compared its fingerprint. As in :mod:`.seals`, the signature covers the purpose of the file, the study and the SHA-256
of the content, and the file must stand in exactly the form in which it was written. It covers the hospital's name too:
a file is none in another's name, for another study or for another purpose.

What a coordinator does with such a file:

    1. read it (:func:`read_site_sealed`): form and size
    2. find the fingerprint under which the hospital of that name is enrolled, in the registry or by telephone
    3. check key and signature (:func:`check_site_seal`); only then look at the content

Reference: FIPS 186-5 (ECDSA), SEC 1 section 2.3.3 (compressed points).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import BadInput, EnvironmentProblem, Refused
from .identity import fingerprint, is_p384, public_identity
from .seals import as_text

__all__ = ["SiteSeal", "SiteSealed", "check_site_seal", "content_digest", "read_site_sealed", "sealed_by_site"]

MAX_BYTES: Final = 1 << 20
"""A file beyond this is none of ours."""


class SiteSeal(BaseModel):
    """Which node signed (its public key as a compressed point), and the signature (DER), in hexadecimal digits."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    key: Annotated[str, Field(pattern=r"^0[23][0-9a-f]{96}$")]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{16,220}$")]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key, as ``fedneuro-server sites`` and ``fedneuro-node identity`` show it."""
        return fingerprint(bytes.fromhex(self.key))


@dataclass(frozen=True, slots=True)
class SiteSealed:
    """A file as it was read; ``seal`` None: it carries none. Nothing of it is checked but its form."""

    content: dict[str, Any]
    seal: SiteSeal | None


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content in its one form: what both sides may note down, 64 hexadecimal digits."""
    return hashlib.sha256(as_text(content).encode()).hexdigest()


def sealed_by_site(
    content: Mapping[str, Any],
    purpose: str,
    *,
    site: str,
    study_hash: str,
    sign: Callable[[bytes], str],
    public: object,
) -> str:
    """The text of a sealed file.

    Args:
        content: JSON values.
        purpose: what the file is, such as ``statistics``.
        site: the hospital's name.
        study_hash: of the study that it belongs to, or empty.
        sign: gives the node's signature under a text, in hexadecimal digits (ECDSA on P-384 with SHA-384).
        public: the public half of the node's key.

    Raises:
        EnvironmentProblem: the node's key is of another kind.
    """
    if not isinstance(public, ec.EllipticCurvePublicKey) or not is_p384(public):
        raise EnvironmentProblem("the node's key is not on P-384, so no coordinator can know it; enrol the node again")
    signature = sign(_signed(content, purpose, site, study_hash))
    seal = SiteSeal(key=public_identity(public).hex(), signature=signature)
    return as_text({"content": content, "seal": seal.model_dump()})


def read_site_sealed(path: Path) -> SiteSealed:
    """A file of this form, or one that holds the content alone.

    Raises:
        BadInput: the file cannot be read, is too large, or is no JSON object.
        Refused: it carries a seal and does not stand in the form in which it was written.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a file that a hospital released") from error
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{path}: over {MAX_BYTES >> 20} MiB; give a file that a hospital released")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is no JSON file; give a file that a hospital released") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: is no JSON object; give a file that a hospital released")
    if "seal" not in values:
        return SiteSealed(values, None)
    try:
        content, seal = values["content"], SiteSeal.model_validate(values["seal"])
        if set(values) != {"content", "seal"} or not isinstance(content, dict) or as_text(values).encode() != raw:
            raise ValueError("another form")
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise Refused(f"{path}: is not in the form in which the hospital's node wrote it; ask for it again") from error
    return SiteSealed(content, seal)


def check_site_seal(
    seal: SiteSeal, content: Mapping[str, Any], purpose: str, *, site: str, study_hash: str, expected: str
) -> None:
    """Check that the node with a known key signed.

    Args:
        seal: as it was read.
        content: as it was read.
        purpose: what the file should be.
        site: the hospital whose it should be.
        study_hash: of the study that it should belong to, or empty.
        expected: fingerprint of the hospital's node, 64 hexadecimal digits, known by another way than this file.

    Raises:
        Refused: another key, or the content is not what was signed.
    """
    if seal.fingerprint != expected:
        raise Refused(
            f"signed by the node {seal.fingerprint[:16]}…, and {site} is known by {expected[:16]}…; ask {site} for it"
        )
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), bytes.fromhex(seal.key))
        text = _signed(content, purpose, site, study_hash)
        key.verify(bytes.fromhex(seal.signature), text, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise Refused(f"the signature does not hold: the content is not what the node of {site} signed") from error


def _signed(content: Mapping[str, Any], purpose: str, site: str, study_hash: str) -> bytes:
    return b"fedneuro site seal 1\0" + "\0".join((purpose, site, study_hash, content_digest(content))).encode()
