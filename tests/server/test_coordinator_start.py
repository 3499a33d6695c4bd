# SPDX-License-Identifier: Apache-2.0
"""A coordinator that really runs: enrolment over gRPC, a SuperNode through the guard, and everybody else kept out.

One ``fedneuro-server start`` serves all tests here. Where a test locks its address out, or wants a limit of its own,
it runs a second enrolment service in this process over the same store and the same SuperLink.
"""

import base64
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, load_ssh_private_key

from fedneuro.client.enrolment import Enrolled, enrol, renew
from fedneuro.client.node_settings import load_node_settings
from fedneuro.privacy.contract import Role
from fedneuro.privacy.enrolment import SERVICE, EnrolRequest, Invitation, encode, token_hash
from fedneuro.privacy.errors import BadInput, EnvironmentProblem, Refused
from fedneuro.privacy.identity import new_key, pkcs8, public_pem, write_private
from fedneuro.server.authority import Authority
from fedneuro.server.bundle import bundle, bundle_hash
from fedneuro.server.consortium import Consortium
from fedneuro.server.control import Control
from fedneuro.server.enrolment import Enrolment
from fedneuro.server.enrolment_service import EnrolmentService
from fedneuro.server.guard import FLEET_PATHS
from fedneuro.server.invitations import invite
from fedneuro.server.limits import Doorkeeper
from fedneuro.server.roster import identities
from fedneuro.server.sealed_keys import Passphrase
from tests.needs import need_nginx
from tests.server.conftest import PASSPHRASE, coordinator_up, free_ports
from tests.server.doors import (
    Method,
    activate,
    channel,
    csr,
    guard_of,
    half_a_request,
    post,
    raw_enrol,
    roots,
    shown_by,
    signed,
)  # fmt: skip

pytestmark = pytest.mark.deployment

HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Coordinator:
    """The running one, and what the tests do with it."""

    consortium: Consortium
    process: subprocess.Popen[str]
    control: Control
    slow: socket.socket
    """A client that shook hands and sent half a request when the guard came up, and nothing since."""
    slow_since: float

    @property
    def guard(self) -> str:
        return guard_of(self.consortium)

    def invited(self, site: str, role: Role = Role.TRAIN) -> Invitation:
        return invite(self.consortium, site, role, HOUR)[0]

    def enrolled(self, site: str, folder: Path) -> Enrolled:
        return enrol(self.invited(site), folder / "node.toml")


@pytest.fixture(scope="module")
def coordinator(
    tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[[Path], Consortium]
) -> Iterator[Coordinator]:
    need_nginx()
    consortium = make_consortium(tmp_path_factory.mktemp("coordinator") / "c")
    with coordinator_up(consortium) as process:
        slow = half_a_request(consortium)
        control = Control(f"127.0.0.1:{consortium.settings.ports.superlink}", consortium.folder / "ca" / "root.crt")
        yield Coordinator(consortium, process, control, slow, time.monotonic())
        control.close()
        slow.close()


@contextmanager
def second_service(
    coordinator: Coordinator, passphrase: Passphrase, doorkeeper: Doorkeeper, control: Control | None = None
) -> Iterator[Consortium]:
    """An enrolment service of this process, over the same store and SuperLink, with limits of its own."""
    consortium = Consortium(coordinator.consortium.folder)
    ports: dict[str, int] = dict(zip(("enrolment", "renewal"), free_ports(2), strict=True))
    consortium.settings = consortium.settings.model_copy(
        update={"ports": consortium.settings.ports.model_copy(update=ports)}
    )
    issuer, nodes = consortium.unlock(passphrase), control or coordinator.control
    enrolment = Enrolment(consortium, issuer, nodes, bundle_hash(bundle()), lambda: None, doorkeeper)
    with EnrolmentService(consortium, enrolment):
        yield consortium


# -- the whole way -----------------------------------------------------------------------------------------


def test_from_invitation_to_a_node_at_work_and_out_again(coordinator: Coordinator, tmp_path: Path) -> None:
    north = tmp_path / "north"
    north.mkdir()
    (north / "node.toml").write_text('# ours\n[site]\npublic_size = 40 # rounded\ndata = "bids"\nstate = "state"\n')
    (north / "bids").mkdir()
    done = coordinator.enrolled("north", north)
    settings = load_node_settings(north / "node.toml")
    assert "# ours" in (north / "node.toml").read_text() and "# rounded" in (north / "node.toml").read_text()
    assert settings.site.name == "north" and settings.runner.bundle == done.credentials.bundle
    assert settings.coordinator is not None and settings.coordinator.study_key == coordinator.consortium.study_key
    assert all((north / name).stat().st_mode & 0o077 == 0 for name in ("node.key", "site.key", "runner.secret"))
    assert len(identities(coordinator.consortium.registry)["north"]) == 49
    _no_private_key_at_the_coordinator(coordinator.consortium, north)

    with _supernode(north) as node:
        _wait("north online", lambda: "north" in coordinator.control.online())
        revoked = time.monotonic()
        call("revoke", "north", "--config", str(coordinator.consortium.folder))
        assert node.wait(20) == 1  # it is sent away, says so and ends
        assert time.monotonic() - revoked < 20
    known = coordinator.consortium.registry.site("north")
    assert known is not None and known.state == "revoked"
    _wait("north unregistered", lambda: "north" not in coordinator.control.registered())
    assert post(coordinator.consortium, north, "pull-messages") in (400, 403)
    with pytest.raises(Refused, match="does not hold"):
        renew(north / "node.toml")


def test_a_signature_helps_nobody_but_its_maker(coordinator: Coordinator, tmp_path: Path) -> None:
    """Flower's own signature covers a timestamp only: seen once, it is good for 305 s with any request."""
    east, west = tmp_path / "east", tmp_path / "west"
    for folder in (east, west):
        coordinator.enrolled(folder.name, folder)
    headers = signed(east)
    assert post(coordinator.consortium, east, "activate-node", headers) == 200
    assert post(coordinator.consortium, west, "activate-node", headers, body=activate(east)) == 403
    both = [*signed(west).items(), *headers.items()]
    assert post(coordinator.consortium, west, "activate-node", both, body=activate(east)) != 200


def test_renewal_keeps_the_node_and_takes_the_certificate_at_once(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.enrolled("renewing", tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("node.key", "site.key", "site.crt")}
    renew(tmp_path / "node.toml")
    assert (tmp_path / "node.key").read_bytes() == before["node.key"]
    assert (tmp_path / "site.key").read_bytes() != before["site.key"]
    assert post(coordinator.consortium, tmp_path, "activate-node") == 200
    (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(BadInput, match="can be read by others; run chmod 600"):
        renew(tmp_path / "node.toml")


def test_a_new_invitation_ends_the_old_node(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.enrolled("moved", tmp_path / "old")
    with pytest.raises(BadInput, match="is there already"):
        coordinator.enrolled("moved", tmp_path / "old")
    coordinator.enrolled("moved", tmp_path / "new")
    assert post(coordinator.consortium, tmp_path / "old", "activate-node") in (400, 403)
    assert post(coordinator.consortium, tmp_path / "new", "activate-node") == 200


# -- the guard ---------------------------------------------------------------------------------------------


def test_without_a_certificate_of_ours_there_is_no_way_in(coordinator: Coordinator, tmp_path: Path) -> None:
    """No certificate, another authority's, one that has expired, one that we never wrote down."""
    issuing = coordinator.consortium.unlock(_passphrase(tmp_path)).current
    other = Authority.root("other", path_length=0)
    key = new_key()
    shown = {
        "other": other.site(key.public_key(), "east"),
        "expired": issuing.site(key.public_key(), "east", lifetime=timedelta(seconds=-5)),
        "unknown": issuing.site(key.public_key(), "east"),
    }
    assert (
        httpx.post(f"{coordinator.guard}/v1/fleet/activate-node", verify=roots(coordinator.consortium)).status_code
        == 400
    )
    for name, certificate in shown.items():
        folder = tmp_path / name
        folder.mkdir()
        chain = certificate.public_bytes(Encoding.PEM) + issuing.certificate.public_bytes(Encoding.PEM)
        (folder / "site.crt").write_bytes(chain)
        write_private(folder / "site.key", pkcs8(key))
        (folder / "ca.crt").write_bytes((coordinator.consortium.folder / "ca" / "root.crt").read_bytes())
        expected = 403 if name == "unknown" else 400
        assert post(coordinator.consortium, folder, "activate-node", {}, body=b"") == expected, name


def test_a_hospital_reaches_the_fleet_paths_and_nothing_else(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.enrolled("curious", tmp_path)
    headers = signed(tmp_path)
    with httpx.Client(base_url=coordinator.guard, verify=shown_by(tmp_path), headers=headers) as client:
        from flwr.superlink.main import create_app

        paths = set(create_app().openapi()["paths"])  # all that Flower serves on this port
        assert len(paths) > 30 and {f"/v1/fleet/{name}" for name in FLEET_PATHS} < paths
        outside = [*sorted(paths - {f"/v1/fleet/{name}" for name in FLEET_PATHS}), "/docs", "/openapi.json", "/"]
        answers = {path: client.post(path).status_code for path in outside}
        assert set(answers.values()) == {403}, answers
        for path in ("/v1/fleet/../control/list-nodes", "/v1/fleet/get-run/../../runtime/acquire-task", "//v1/control"):
            assert client.post(path).status_code in (400, 403)
        assert client.get("/v1/fleet/pull-messages").status_code == 403
        too_long = b"x" * ((coordinator.consortium.settings.guard.max_request_mib << 20) + 1)
        assert client.post("/v1/fleet/push-object", content=too_long).status_code == 413


def test_the_superlink_itself_gives_no_task_away(coordinator: Coordinator) -> None:
    """Also behind the guard, on this machine, a task needs the runner's secret."""
    address = f"https://localhost:{coordinator.consortium.settings.ports.superlink}"
    from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

    headers = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
    answer = httpx.post(
        f"{address}/v1/runtime/acquire-task", verify=roots(coordinator.consortium), headers=headers, content=b""
    )
    assert answer.status_code == 401, answer.text


# -- enrolment ---------------------------------------------------------------------------------------------


def _tampered(site: str) -> str:
    """A request whose signature is of another key."""
    lines = csr(site).splitlines()
    der = bytearray(base64.b64decode("".join(lines[1:-1])))
    der[-1] ^= 1
    return "\n".join([lines[0], base64.b64encode(der).decode(), lines[-1], ""])


FORGERIES: dict[str, tuple[dict[str, Callable[[], str]], grpc.StatusCode]] = {
    "forged token": ({"token": lambda: "A" * 43}, grpc.StatusCode.PERMISSION_DENIED),
    "another site": ({"site": lambda: "nobody", "request": lambda: csr("nobody")}, grpc.StatusCode.PERMISSION_DENIED),
    "another name in the request": ({"request": lambda: csr("north")}, grpc.StatusCode.INVALID_ARGUMENT),
    "alternative names": (
        {"request": lambda: csr("patient", alternative="coordinator.example.org")},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a weak key": (
        {"request": lambda: csr("patient", rsa.generate_private_key(65537, 2048))},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "another curve": (
        {"request": lambda: csr("patient", ec.generate_private_key(ec.SECP256R1()))},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "a broken signature": ({"request": lambda: _tampered("patient")}, grpc.StatusCode.INVALID_ARGUMENT),
    "a path as name": ({"site": lambda: "../../etc"}, grpc.StatusCode.INVALID_ARGUMENT),
    "no node key": ({"node_key": lambda: "-----BEGIN nothing"}, grpc.StatusCode.INVALID_ARGUMENT),
    "an unknown key": ({"extra": lambda: "1"}, grpc.StatusCode.INVALID_ARGUMENT),
    "an oversized message": ({"request": lambda: "-----BEGIN " + "x" * 40_000}, grpc.StatusCode.RESOURCE_EXHAUSTED),
}


def test_what_enrolment_refuses_changes_nothing(coordinator: Coordinator, passphrase: Passphrase) -> None:
    invitation = coordinator.invited("patient")
    good = EnrolRequest(
        token=invitation.token, site="patient", request=csr("patient"), node_key=public_pem(new_key()).decode()
    )
    before = coordinator.consortium.registry.sites(), coordinator.control.registered()
    with second_service(coordinator, passphrase, Doorkeeper(calls=100, failures=100)) as consortium:
        for name, (changes, code) in FORGERIES.items():
            values = {**good.model_dump(), **{key: make() for key, make in changes.items()}}
            answer = raw_enrol(consortium, json.dumps(values).encode())
            assert answer is code, name
        assert raw_enrol(consortium, b"\xff not JSON") is grpc.StatusCode.INVALID_ARGUMENT
        assert (coordinator.consortium.registry.sites(), coordinator.control.registered()) == before
        late = coordinator.invited("late")
        coordinator.consortium.registry.invite("late", Role.TRAIN, token_hash(late.token), int(time.time()) - 1)
        expired = {**good.model_dump(), "site": "late", "request": csr("late"), "token": late.token}
        assert raw_enrol(consortium, json.dumps(expired).encode()) is grpc.StatusCode.PERMISSION_DENIED
        assert isinstance(raw_enrol(consortium, encode(good)), bytes)  # the invitation still held
        assert raw_enrol(consortium, encode(good)) is grpc.StatusCode.PERMISSION_DENIED  # and now it is used up


def test_without_a_superlink_the_invitation_holds(coordinator: Coordinator, passphrase: Passphrase) -> None:
    invitation = coordinator.invited("early")
    good = EnrolRequest(
        token=invitation.token, site="early", request=csr("early"), node_key=public_pem(new_key()).decode()
    )
    nobody = Control(f"127.0.0.1:{free_ports(1)[0]}", coordinator.consortium.folder / "ca" / "root.crt")
    with second_service(coordinator, passphrase, Doorkeeper(), nobody) as consortium:
        assert raw_enrol(consortium, encode(good)) is grpc.StatusCode.UNAVAILABLE
    nobody.close()
    with second_service(coordinator, passphrase, Doorkeeper()) as consortium:
        assert isinstance(raw_enrol(consortium, encode(good)), bytes)


def test_guessing_is_locked_out_also_for_the_right_token(coordinator: Coordinator, passphrase: Passphrase) -> None:
    clock = [0.0]
    doorkeeper = Doorkeeper(failures=3, clock=lambda: clock[0])
    invitation = coordinator.invited("guessed")
    good = EnrolRequest(
        token=invitation.token, site="guessed", request=csr("guessed"), node_key=public_pem(new_key()).decode()
    )
    with second_service(coordinator, passphrase, doorkeeper) as consortium:
        for _ in range(3):
            forged = good.model_copy(update={"token": "B" * 43})
            assert raw_enrol(consortium, encode(forged)) is grpc.StatusCode.PERMISSION_DENIED
        assert raw_enrol(consortium, encode(good)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "locked-out" in {kind for _, _, kind, _, _ in coordinator.consortium.registry.events()}
        clock[0] = 901.0
        assert isinstance(raw_enrol(consortium, encode(good)), bytes)


def test_health_is_told_and_methods_are_not(coordinator: Coordinator) -> None:
    from grpc_health.v1 import health_pb2

    with channel(coordinator.consortium) as line:
        check: Method = line.unary_unary("/grpc.health.v1.Health/Check")
        content = check(health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString(), timeout=10)
        answer = health_pb2.HealthCheckResponse.FromString(content)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        listing: Method = line.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as refused:
            listing(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_renewal_needs_a_client_certificate(coordinator: Coordinator) -> None:
    with channel(coordinator.consortium, port=coordinator.consortium.settings.ports.renewal) as line:
        method: Method = line.unary_unary(f"/{SERVICE}/Renew")
        with pytest.raises(grpc.RpcError) as refused:
            method(b"{}", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # the handshake fails


def test_a_hospital_does_not_talk_to_another_authority(coordinator: Coordinator, tmp_path: Path) -> None:
    invitation, other = coordinator.invited("pinned"), Authority.root("other").certificate
    der = base64.b64encode(other.public_bytes(Encoding.DER)).decode()
    with pytest.raises(BadInput, match="fingerprint"):
        enrol(invitation.model_copy(update={"authority": der}), tmp_path / "node.toml")
    forged = {"authority": der, "fingerprint": other.fingerprint(hashes.SHA256()).hex()}
    with pytest.raises(EnvironmentProblem, match=r"not vouched for by the pinned authority .*telephone"):
        enrol(invitation.model_copy(update=forged), tmp_path / "node.toml")
    assert list(tmp_path.iterdir()) == []  # no key is left behind
    assert coordinator.consortium.registry.invited(token_hash(invitation.token), "pinned") is Role.TRAIN


def test_a_hospital_grants_its_role_itself(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('[site]\nrole = "heldout"\n')
    with pytest.raises(BadInput, match=r"site.role is 'heldout', the invitation is for 'train'"):
        coordinator.enrolled("judge", tmp_path)


# -- supervision: these two come last, the first of them disturbs the others --------------------------------


def test_a_guard_that_was_killed_is_back(coordinator: Coordinator) -> None:
    path = coordinator.consortium.folder / "guard" / "nginx.pid"
    first = int(path.read_text())
    os.kill(first, signal.SIGKILL)
    _wait("a new guard", lambda: path.exists() and path.read_text().strip() not in ("", str(first)))
    _wait("the guard answers", lambda: _answers(coordinator))


def test_a_client_that_sends_slowly_is_hung_up_on(coordinator: Coordinator) -> None:
    coordinator.slow.settimeout(max(1.0, 20.0 - (time.monotonic() - coordinator.slow_since)))
    assert coordinator.slow.recv(4096)[:12] in (b"", b"HTTP/1.1 408", b"HTTP/1.1 400")


# -- contracts with Flower ---------------------------------------------------------------------------------


def test_flowers_supernode_has_one_client_and_these_paths() -> None:
    from flwr.supernode import fleet_http_client, fleet_http_connection

    assert inspect.getsource(fleet_http_connection).count("FleetHttpClient.from_server_address(") == 1
    source = inspect.getsource(fleet_http_client)
    paths = {line.split('"/v1/fleet/')[1].split('"')[0] for line in source.splitlines() if '"/v1/fleet/' in line}
    assert paths - set(FLEET_PATHS) == {"register-node", "unregister-node"}
    assert set(FLEET_PATHS) < paths


# -- helpers -----------------------------------------------------------------------------------------------


def call(*words: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "fedneuro-server"), *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _wait(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@contextmanager
def _supernode(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    settings = load_node_settings(folder / "node.toml")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "fedneuro.client.supernode", "--superlink", settings.superlink.address]
    command += ["--client-certificate", str(settings.superlink.certificate)]
    command += ["--client-key", str(settings.superlink.certificate_key)]
    command += ["--root-certificates", settings.superlink.root_certificate]
    command += ["--auth-supernode-private-key", settings.superlink.key, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--isolation", "process", "--superexec-auth-secret-file", settings.runner.secret]
    with (folder / "supernode.log").open("wb") as log:
        env = {**os.environ, "FLWR_HOME": str(folder / "home")}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _no_private_key_at_the_coordinator(consortium: Consortium, folder: Path) -> None:
    tls = load_pem_private_key((folder / "site.key").read_bytes(), None)
    node = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(tls, ec.EllipticCurvePrivateKey) and isinstance(node, ec.EllipticCurvePrivateKey)
    needles = [key.private_numbers().private_value.to_bytes(48, "big") for key in (tls, node)]
    needles += [line for name in ("site.key", "node.key") for line in (folder / name).read_bytes().splitlines()[2:-1]]
    files = [path for path in consortium.folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files for needle in needles if needle in path.read_bytes()] == []


def _answers(coordinator: Coordinator) -> bool:
    try:
        return httpx.get(coordinator.guard, verify=roots(coordinator.consortium)).status_code == 400
    except httpx.TransportError:
        return False


def _passphrase(folder: Path) -> Passphrase:
    path = folder / "passphrase"
    path.write_text(PASSPHRASE)
    path.chmod(0o600)
    return Passphrase("the issuing key", "FEDNEURO_UNSET", path)
