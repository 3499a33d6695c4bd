# SPDX-License-Identifier: Apache-2.0
"""A coordinator with a certificate of a stolen issuing key, which the root has taken back: over real TLS and gRPC."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from fedneuro.client import enrolment
from fedneuro.client.mutual_tls import client_context
from fedneuro.client.revocations import Revocations, seen_certificate
from fedneuro.privacy.contract import Role
from fedneuro.privacy.enrolment import RENEW, SERVICE, Credentials, encode
from fedneuro.privacy.errors import BadInput, EnvironmentProblem
from fedneuro.privacy.identity import new_key, pkcs8, write_private
from fedneuro.server.authority import Authority

DAY = timedelta(days=1)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass


@dataclass
class World:
    """A root, its two issuing keys, a hospital's files, and servers with a certificate of either key."""

    folder: Path
    root: Authority
    issuing: dict[str, Authority]
    ports: dict[str, int]

    def list_of(self, *taken_back: str, signer: Authority | None = None) -> Path:
        path = self.folder / f"{'-'.join(taken_back) or 'empty'}.crl"
        entries = [(self.issuing[name].certificate.serial_number, datetime.now(UTC)) for name in taken_back]
        path.write_bytes((signer or self.root).revocations(entries, number=2, lifetime=DAY))
        return path

    def ask(self, server: str, revocations: Path | None) -> int:
        """As the SuperNode does: Flower's client is httpx with this context."""
        folder = self.folder
        context = client_context(str(folder / "ca.crt"), folder / "site.crt", folder / "site.key", revocations)
        return httpx.get(f"https://localhost:{self.ports[server]}/", verify=context).status_code


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    root = Authority.root("glioma-net root")
    issuing = {name: root.issuing(f"glioma-net {name}") for name in ("stolen", "new")}
    (tmp_path / "ca.crt").write_bytes(root.certificate.public_bytes(Encoding.PEM))
    key = new_key()
    chain = issuing["new"].site(key.public_key(), "north"), issuing["new"].certificate
    (tmp_path / "site.crt").write_bytes(b"".join(found.public_bytes(Encoding.PEM) for found in chain))
    write_private(tmp_path / "site.key", pkcs8(key))
    servers = []
    for name, authority in issuing.items():
        key = new_key()
        chain = authority.server(key.public_key(), ["localhost"]), authority.certificate
        (tmp_path / f"{name}.crt").write_bytes(b"".join(found.public_bytes(Encoding.PEM) for found in chain))
        write_private(tmp_path / f"{name}.key", pkcs8(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / f"{name}.crt", tmp_path / f"{name}.key")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    ports = {name: int(server.server_address[1]) for name, server in zip(issuing, servers, strict=True)}
    yield World(tmp_path, root, issuing, ports)
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_stolen_issuing_key_is_refused_once_the_root_took_it_back(world: World) -> None:
    assert world.ask("stolen", None) == 200, "without the list nothing tells it from the coordinator"
    assert world.ask("stolen", world.list_of()) == 200
    listed = world.list_of("stolen")
    with pytest.raises(httpx.ConnectError, match="certificate revoked"):
        world.ask("stolen", listed)
    assert world.ask("new", listed) == 200


def test_a_list_of_another_authority_is_not_used(world: World) -> None:
    forged = world.list_of("new", signer=Authority.root("glioma-net root"))
    with pytest.raises(BadInput, match="was not signed by the pinned authority"):
        world.ask("new", forged)
    forged.write_text("nothing")
    with pytest.raises(BadInput, match=r"ask the coordinator for its ca/root\.crl"):
        Revocations(forged, world.folder / "ca.crt")


# -- enrolment and renewal, over gRPC ---------------------------------------------------------------------------


@pytest.fixture
def renewals(world: World) -> Iterator[dict[str, int]]:
    """The renewal service of either coordinator, which asks for the hospital's certificate; ports."""
    root = (world.folder / "ca.crt").read_text()
    answer = encode(
        Credentials(
            consortium="glioma-net", site="north", role=Role.TRAIN, chain=(world.folder / "site.crt").read_text(),
            authority=root, study_key="0" * 64, bundle="0" * 64, superlink="localhost:1", renewal="localhost:1",
        )
    )  # fmt: skip
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(lambda _, __: answer)
    servers, ports = [], {}
    for name in world.issuing:
        pair = (world.folder / f"{name}.key").read_bytes(), (world.folder / f"{name}.crt").read_bytes()
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {RENEW: handler}),))
        asks = grpc.ssl_server_credentials([pair], root.encode(), require_client_auth=True)
        ports[name] = server.add_secure_port("localhost:0", asks)
        server.start()
        servers.append(server)
    yield ports
    for server in servers:
        server.stop(None).wait()


def renew(world: World, port: int, revoked: Path | None) -> str:
    folder = world.folder
    pair = (folder / "site.key").read_bytes(), (folder / "site.crt").read_bytes()
    return enrolment._call(f"localhost:{port}", RENEW, b"{}", world.root.certificate, pair, revoked).site


def test_neither_is_a_certificate_renewed_there(world: World, renewals: dict[str, int]) -> None:
    assert renew(world, renewals["stolen"], None) == "north", "without the list nothing tells it from the coordinator"
    listed = world.list_of("stolen")
    with pytest.raises(EnvironmentProblem, match=r"the root took CN=glioma-net stolen back.*telephone"):
        renew(world, renewals["stolen"], listed)
    assert renew(world, renewals["new"], listed) == "north"
    with pytest.raises(EnvironmentProblem, match="cannot be reached"):
        renew(world, 1, listed)


def test_who_stands_between_cannot_show_one_certificate_and_use_another(
    world: World, renewals: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake that is looked at goes to the coordinator, the call to who holds the stolen key."""
    listed = world.list_of("stolen")
    aside = f"localhost:{renewals['new']}"
    monkeypatch.setattr(enrolment, "seen_certificate", lambda _, root, revoked: seen_certificate(aside, root, revoked))
    with pytest.raises(EnvironmentProblem):
        renew(world, renewals["stolen"], listed)
    assert renew(world, renewals["new"], listed) == "north"
