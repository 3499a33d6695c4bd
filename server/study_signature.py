# SPDX-License-Identifier: Apache-2.0
"""The coordinator's signature goes with every request, so that hospitals may approve by who asks.

``fedneuro-server sign STUDY --key KEY`` writes two files beside the study: its canonical form (``.json``), which
hospitals are sent for approval, and the signature (``.sig``). A run whose study lies beside its signature carries it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..privacy.contract import Reply, Request, Transport
from ..privacy.errors import StudyError
from ..privacy.signing import SIGNATURE_BYTES, load_signing_key, public_text, sign_study
from ..privacy.study import Study

__all__ = ["SignedTransport", "sign_files", "signed"]


def sign_files(study: Study, path: Path, key: Path) -> tuple[Path, Path, str]:
    """Write the canonical form and the signature of ``study`` beside its file ``path``.

    Returns:
        Both files, and the public key that hospitals write into ``policy.toml``.

    Raises:
        BadInput: the key cannot be used.
    """
    signing_key = load_signing_key(key)
    canonical, signature = path.with_suffix(".json"), path.with_suffix(".sig")
    canonical.write_bytes(study.canonical)
    signature.write_text(sign_study(study, signing_key).hex() + "\n", encoding="ascii")
    return canonical, signature, public_text(signing_key)


def signed(transport: Transport, study: Path) -> Transport:
    """``transport`` with the signature that lies beside the file ``study``, where there is one.

    Raises:
        StudyError: the file is not a signature.
    """
    path = study.with_suffix(".sig")
    if not path.is_file():
        return transport
    try:
        signature = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        signature = b""
    if len(signature) != SIGNATURE_BYTES:
        raise StudyError(f"{path}: is not a signature; sign the study again: fedneuro-server sign")
    return SignedTransport(transport, signature)


class SignedTransport:
    """A transport that adds a signature to every request."""

    def __init__(self, transport: Transport, signature: bytes) -> None:
        self._transport = transport
        self._signature = signature

    def sites(self) -> list[str]:
        """Names of the sites that can be asked now, sorted."""
        return self._transport.sites()

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        """See :class:`~fedneuro.privacy.contract.Transport`. Sites that share a request go on sharing it."""
        made = {id(request): replace(request, signature=self._signature) for request in requests.values()}
        yield from self._transport.exchange({site: made[id(r)] for site, r in requests.items()}, timeout)
