# SPDX-License-Identifier: Apache-2.0
"""Certificates and keys for a rehearsal on this machine.

One certificate authority signs one server certificate for ``localhost`` and 127.0.0.1; its private key is
thrown away, so nothing else can ever be signed with it. Each node gets a P-384 key in OpenSSH form, which
Flower's SuperNode authentication asks for. Every private file is created with mode 0600.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from ..privacy.identity import make_node_key, new_key, pkcs8, write_private
from ..server.authority import Authority

__all__ = ["Certificates", "make_certificates", "make_node_key", "write_private"]

LIFETIME = timedelta(days=30)
"""A rehearsal is over long before."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM form."""

    authority: Path
    server: Path
    server_key: Path


def make_certificates(folder: Path) -> Certificates:
    """Write ``ca.crt``, ``server.crt`` and ``server.key`` into ``folder``."""
    root, key = Authority.root("FedNeuro rehearsal CA", path_length=0, lifetime=LIFETIME), new_key()
    server = root.server(key.public_key(), ["localhost", "127.0.0.1"], lifetime=LIFETIME)
    files = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    files.authority.write_bytes(root.certificate.public_bytes(Encoding.PEM))
    files.server.write_bytes(server.public_bytes(Encoding.PEM))
    write_private(files.server_key, pkcs8(key))
    return files
