# SPDX-License-Identifier: Apache-2.0
"""A signed study carries its signature with every request, over the wire too."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedneuro.privacy.contract import Reply, Request
from fedneuro.privacy.errors import StudyError
from fedneuro.privacy.signing import verify_study
from fedneuro.privacy.wire import decode_request, encode_request
from fedneuro.server.study_signature import sign_files, signed
from tests.bids import make_study

STUDY = make_study()


class Ear:
    """Keeps what it is asked to send."""

    def __init__(self) -> None:
        self.heard: dict[str, Request] = {}

    def sites(self) -> list[str]:
        return ["north", "south"]

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        del timeout
        self.heard.update(requests)
        return iter(())


def test_a_signature_reaches_the_hospital(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "key").chmod(0o600)
    canonical, signature, public = sign_files(STUDY, tmp_path / "study.toml", tmp_path / "key")
    assert canonical.read_bytes() == STUDY.canonical
    ear, request = Ear(), Request(kind="hello", study=STUDY)
    transport = signed(ear, canonical)
    assert transport.sites() == ear.sites()
    assert list(transport.exchange({"north": request, "south": request}, 1.0)) == []
    assert ear.heard["north"] is ear.heard["south"], "packed once for all sites"
    received = decode_request(encode_request(ear.heard["north"]))
    verify_study(received.study, received.signature, public)
    signature.write_text("00")
    with pytest.raises(StudyError, match="is not a signature"):
        signed(ear, canonical)
    signature.unlink()
    assert signed(ear, canonical) is ear
