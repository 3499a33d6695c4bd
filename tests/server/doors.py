# SPDX-License-Identifier: Apache-2.0
"""The coordinator's doors as a client sees them: requests to the guard, calls to enrolment, with whatever credentials.

Those that open, for tests of what they refuse: ``test_coordinator_start.py`` one by one, ``siege.py`` during a study.
"""

import base64
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import grpc
import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_private_key

from fedneuro.client.mutual_tls import client_context
from fedneuro.privacy.enrolment import ENROL, SERVICE, Credentials
from fedneuro.privacy.identity import new_key, public_pem
from fedneuro.server.consortium import Consortium

Method: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"


def guard_of(consortium: Consortium) -> str:
    """Where hospitals reach the SuperLink."""
    return f"https://localhost:{consortium.settings.ports.guard}"


def csr(site: str, key: object = None, *, alternative: str = "") -> str:
    """A certificate request for ``site``, in PEM."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, site)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(alternative)]), critical=False)
    signer = key or new_key()
    assert isinstance(signer, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    return builder.sign(signer, hashes.SHA384()).public_bytes(Encoding.PEM).decode()


def signed(folder: Path) -> dict[str, str]:
    """Flower's headers, signed now with the node key in ``folder``."""
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import sign_message

    key = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    stamp = now().isoformat()
    return {
        "flwr-public-key": base64.b64encode(public_pem(key)).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(sign_message(key, stamp.encode())).decode(),
    }


def activate(folder: Path) -> bytes:
    """The body with which the node in ``folder`` says that it is there."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest

    key = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    content: bytes = ActivateNodeRequest(public_key=public_pem(key), heartbeat_interval=30.0).SerializeToString()
    return content


def shown_by(folder: Path) -> ssl.SSLContext:
    """TLS with the client certificate in ``folder``."""
    return client_context(str(folder / "ca.crt"), folder / "site.crt", folder / "site.key")


def roots(consortium: Consortium) -> ssl.SSLContext:
    """TLS without a client certificate."""
    return ssl.create_default_context(cafile=str(consortium.folder / "ca" / "root.crt"))


def post(
    consortium: Consortium,
    folder: Path,
    method: str,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    body: bytes | None = None,
) -> int:
    """Status of a request with the certificate in ``folder``; by default signed with its key too."""
    from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
    from flwr.supercore.version import package_name, package_version

    chosen = signed(folder) if headers is None else headers
    pairs = [*(chosen.items() if isinstance(chosen, dict) else chosen)]
    pairs += [("content-type", PROTOBUF_MEDIA_TYPE), ("accept", PROTOBUF_MEDIA_TYPE)]
    pairs += [("flwr-package-name", package_name), ("flwr-package-version", package_version)]
    pairs += [("flwr-component-name", "SuperNode")]
    content = activate(folder) if body is None else body
    url = f"{guard_of(consortium)}/v1/fleet/{method}"
    return httpx.post(url, verify=shown_by(folder), headers=pairs, content=content, timeout=20).status_code


@contextmanager
def channel(consortium: Consortium, port: int = 0) -> Iterator[grpc.Channel]:
    """A connection to the enrolment service without a client certificate."""
    root = (consortium.folder / "ca" / "root.crt").read_bytes()
    address = f"localhost:{port or consortium.settings.ports.enrolment}"
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(root)) as opened:
        yield opened


def raw_enrol(consortium: Consortium, content: bytes) -> bytes | grpc.StatusCode:
    """What an ``Enrol`` call with these bytes gets: the reply, or the status."""
    with channel(consortium) as line:
        try:
            method: Method = line.unary_unary(f"/{SERVICE}/{ENROL}")
            answer = method(content, timeout=20)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            assert "Traceback" not in str(error.details()) and "/" not in str(error.details())
            return code
    assert Credentials.model_validate_json(answer)
    return answer


def half_a_request(consortium: Consortium) -> socket.socket:
    """A client of the guard that shook hands and sent half a request."""
    context = ssl.create_default_context(cafile=str(consortium.folder / "ca" / "root.crt"))
    plain = socket.create_connection(("localhost", consortium.settings.ports.guard))
    secure = context.wrap_socket(plain, server_hostname="localhost")
    secure.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: loc")
    return secure
