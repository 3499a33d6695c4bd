# SPDX-License-Identifier: Apache-2.0
"""Everybody who should stay outside, at all doors of a running coordinator at once.

Three attackers: a stranger without credentials, one with certificates that look right, and *mole*, a hospital that is
enrolled and hostile. Each attack has one answer that refuses it. docs/threats.md lists them with their defences.
"""

import json
import socket
from collections.abc import Callable, Collection
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import grpc
import httpx
from cryptography.hazmat.primitives.serialization import Encoding

from fedneuro.client.enrolment import enrol
from fedneuro.privacy.contract import Role
from fedneuro.privacy.enrolment import RENEW, SERVICE, EnrolRequest, encode
from fedneuro.privacy.identity import new_key, pkcs8, public_pem, write_private
from fedneuro.server.authority import Authority
from fedneuro.server.consortium import Consortium, Issuer
from fedneuro.server.invitations import invite
from tests.server.doors import Method, activate, csr, guard_of, half_a_request, post, raw_enrol, roots, shown_by, signed

Answer = int | grpc.StatusCode
Attack = tuple[Callable[[], Answer | bytes], Collection[Answer]]
"""What is tried, and the answers that refuse it."""

SLOW = 60
"""Clients that connect and say nothing, at each door, and as many that stop in the middle of a request."""
TRIES = 5
"""Failures at the enrolment service after which an address is locked out."""


class Siege:
    """The attackers and their credentials. A context manager: while it is open, slow clients hold connections.

    Args:
        consortium: that runs.
        issuer: its keys, for certificates that nobody else could make.
        folder: new.
        victim: folder of a node that is enrolled, whose identity is misused.
        node_id: under which the SuperLink knows it.
    """

    def __init__(self, consortium: Consortium, issuer: Issuer, folder: Path, victim: Path, node_id: int) -> None:
        self.consortium, self.victim, self.node_id = consortium, victim, node_id
        self.invitation = invite(consortium, "mole", Role.TRAIN, timedelta(hours=1))[0]
        self.mole = folder / "mole"
        enrol(self.invitation, self.mole / "node.toml")
        other, key = Authority.root("other", path_length=0), new_key()
        made = {
            "another authority": other.site(key.public_key(), "north"),
            "expired": issuer.current.site(key.public_key(), "north", lifetime=timedelta(seconds=-5)),
            "never written down": issuer.current.site(key.public_key(), "north"),
        }
        for name, certificate in made.items():
            (folder / name).mkdir(parents=True)
            chain = certificate.public_bytes(Encoding.PEM) + issuer.current.certificate.public_bytes(Encoding.PEM)
            (folder / name / "site.crt").write_bytes(chain)
            write_private(folder / name / "site.key", pkcs8(key))
            (folder / name / "ca.crt").write_bytes((consortium.folder / "ca" / "root.crt").read_bytes())
        self.folder = folder
        self._slow = ExitStack()

    def __enter__(self) -> "Siege":
        ports = self.consortium.settings.ports
        for _ in range(SLOW):
            self._slow.enter_context(half_a_request(self.consortium))
            for port in (ports.guard, ports.enrolment, ports.renewal):
                self._slow.enter_context(socket.create_connection(("localhost", port)))
        return self

    def __exit__(self, *_: object) -> None:
        self._slow.close()

    def guard(self) -> dict[str, Attack]:
        """Attacks on what hospitals reach during a study; they can be repeated for ever."""
        link = f"https://localhost:{self.consortium.settings.ports.superlink}"
        return {
            "no certificate": (lambda: self._stranger("activate-node"), {400}),
            "not TLS": (lambda: httpx.get(guard_of(self.consortium).replace("https", "http")).status_code, {400}),
            "another authority's certificate": (lambda: self._shown("another authority"), {400}),
            "an expired certificate": (lambda: self._shown("expired"), {400}),
            "a certificate that was never written down": (lambda: self._shown("never written down"), {403}),
            "another hospital's key and signature": (
                lambda: post(self.consortium, self.mole, "activate-node", signed(self.victim), activate(self.victim)),
                {403},
            ),
            "another hospital's node, own signature": (
                lambda: post(self.consortium, self.mole, "pull-messages", body=self._pull(self.node_id)), {401},
            ),
            "Control": (lambda: self._as_mole("/v1/control/start-run"), {403}),
            "Runtime": (lambda: self._as_mole("/v1/runtime/acquire-task"), {403}),
            "a path around the guard": (lambda: self._as_mole("/v1/fleet/%2e%2e/control/list-nodes"), {403}),
            "Runtime from this machine, without the secret": (lambda: self._runtime(link), {401}),
            "an oversized message": (lambda: self._as_mole("/v1/fleet/push-object", self._too_long()), {413}),
        }  # fmt: skip

    @staticmethod
    def needs_mole(name: str) -> bool:
        """Whether an attack of :meth:`guard` is refused otherwise once mole has no certificate that holds."""
        return name.startswith(("another hospital's", "Control", "Runtime", "a path", "an oversized"))

    def enrolment(self) -> dict[str, Attack]:
        """Attacks on the enrolment service, in the order in which they lock this address out."""
        forged = EnrolRequest(token="A" * 43, site="mole", request=csr("mole"), node_key=public_pem(new_key()).decode())
        used = forged.model_copy(update={"token": self.invitation.token})
        path = json.dumps({**forged.model_dump(), "site": "../../north"}).encode()
        long = json.dumps({**forged.model_dump(), "request": "x" * 40_000}).encode()
        right = invite(self.consortium, "late", Role.TRAIN, timedelta(hours=1))[0]
        good = forged.model_copy(update={"token": right.token, "site": "late", "request": csr("late")})

        def guess() -> Answer | bytes:
            return [raw_enrol(self.consortium, encode(forged)) for _ in range(TRIES - 3)][-1]

        return {
            "an oversized message to enrolment": (
                lambda: raw_enrol(self.consortium, long), {grpc.StatusCode.RESOURCE_EXHAUSTED},
            ),
            "a token that was used": (
                lambda: raw_enrol(self.consortium, encode(used)), {grpc.StatusCode.PERMISSION_DENIED},
            ),
            "a path as a site's name": (
                lambda: raw_enrol(self.consortium, path), {grpc.StatusCode.INVALID_ARGUMENT},
            ),
            "renewal for another site": (self._renew_as_victim, {grpc.StatusCode.INVALID_ARGUMENT}),
            "guessing tokens": (guess, {grpc.StatusCode.PERMISSION_DENIED}),
            "the right token, by who guessed": (
                lambda: raw_enrol(self.consortium, encode(good)), {grpc.StatusCode.RESOURCE_EXHAUSTED},
            ),
        }  # fmt: skip

    def revoked(self) -> dict[str, Attack]:
        """Mole again, once it was put out."""
        return {"a revoked certificate": (lambda: post(self.consortium, self.mole, "activate-node"), {400, 403})}

    def _stranger(self, method: str) -> int:
        url = f"{guard_of(self.consortium)}/v1/fleet/{method}"
        return httpx.post(url, verify=roots(self.consortium)).status_code

    def _shown(self, name: str) -> int:
        return post(self.consortium, self.folder / name, "activate-node", signed(self.victim), activate(self.victim))

    def _as_mole(self, path: str, content: bytes = b"") -> int:
        with httpx.Client(verify=shown_by(self.mole), headers=signed(self.mole)) as client:
            return client.post(guard_of(self.consortium) + path, content=content).status_code

    def _runtime(self, link: str) -> int:
        from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

        headers = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
        url = f"{link}/v1/runtime/acquire-task"
        return httpx.post(url, verify=roots(self.consortium), headers=headers, content=b"").status_code

    def _too_long(self) -> bytes:
        return bytes((self.consortium.settings.guard.max_request_mib << 20) + 1)

    @staticmethod
    def _pull(node_id: int) -> bytes:
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.node_pb2 import Node

        content: bytes = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
        return content

    def _renew_as_victim(self) -> Answer | bytes:
        """Mole's certificate, and a request for the victim's name."""
        pair = ((self.mole / "site.key").read_bytes(), (self.mole / "site.crt").read_bytes())
        trusted = (self.consortium.folder / "ca" / "root.crt").read_bytes()
        address = f"localhost:{self.consortium.settings.ports.renewal}"
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted, *pair)) as line:
            try:
                renew: Method = line.unary_unary(f"/{SERVICE}/{RENEW}")
                return renew(json.dumps({"request": csr("north")}).encode(), timeout=20)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code


def attack(attacks: dict[str, Attack]) -> dict[str, Answer | bytes]:
    """Try all, in order; what got through, and what it got, which should be nothing."""
    got = {name: (call(), refused) for name, (call, refused) in attacks.items()}
    return {name: answer for name, (answer, refused) in got.items() if answer not in refused}
