# SPDX-License-Identifier: Apache-2.0
"""The doctor against real sockets: a coordinator with TLS, a proxy that wants a password, and everything gone wrong."""

import abc
import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from fedneuro.client import doctor
from fedneuro.client.doctor import Finding, examine
from fedneuro.client.doctor_network import network_checks
from fedneuro.client.node_settings import NodeSettings, load_node_settings
from fedneuro.client.way import Way
from fedneuro.simulations.certificates import Certificates, make_certificates
from tests.bids import write_site
from tests.client.test_node import enrolled

NODE = str(Path(sys.executable).parent / "fedneuro-node")


class Listener(abc.ABC):
    """A server on 127.0.0.1 that hands each connection to ``answer``."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._guarded, args=(connection,), daemon=True).start()

    def _guarded(self, connection: socket.socket) -> None:
        try:
            with connection:
                self.answer(connection)
        except OSError:
            return

    @abc.abstractmethod
    def answer(self, connection: socket.socket) -> None: ...


class Coordinator(Listener):
    """Speaks TLS and tells its time, ``ahead`` seconds off."""

    def __init__(self, files: Certificates) -> None:
        self.ahead = 0.0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(files.server, files.server_key)
        super().__init__()

    def answer(self, connection: socket.socket) -> None:
        with self.context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(4096)
            date = formatdate(time.time() + self.ahead, usegmt=True)
            secure.sendall(f"HTTP/1.1 403 Forbidden\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())


class Proxy(Listener):
    """CONNECT for one user; carries bytes both ways."""

    asked = ""

    def answer(self, connection: socket.socket) -> None:
        self.asked = connection.recv(4096).decode()
        wanted = base64.b64encode(b"user:pass word").decode()
        if f"Proxy-Authorization: Basic {wanted}\r\n" not in self.asked:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        host, _, port = self.asked.split(" ")[1].rpartition(":")
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection((host, int(port))) as onward:
            back = threading.Thread(target=self._carry, args=(onward, connection), daemon=True)
            back.start()
            self._carry(connection, onward)
            back.join(5)

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        while part := source.recv(4096):
            target.sendall(part)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def coordinator(files: Certificates) -> Iterator[Coordinator]:
    coordinator = Coordinator(files)
    yield coordinator
    coordinator.socket.close()


@pytest.fixture
def settings(
    tmp_path: Path, files: Certificates, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> NodeSettings:
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    data = write_site(tmp_path / "bids", shape=(18, 18, 4))
    path = enrolled(tmp_path / "node", data)
    (path.parent / "ca.crt").write_bytes(files.authority.read_bytes())
    text = path.read_text()
    start = text.index("[superlink]")
    path.write_text(text[:start] + text[start:].replace(text[start:].split('"')[1], f"127.0.0.1:{coordinator.port}"))
    coordinator.ahead = 0.0
    return load_node_settings(path)


def network(settings: NodeSettings) -> dict[str, Finding]:
    return {finding.check: finding for check in network_checks() for finding in check(settings)}


def verdicts(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in found.items()}


def test_a_good_way_passes(settings: NodeSettings) -> None:
    assert verdicts(network(settings)) == {"name": "pass", "connection": "pass", "TLS": "pass", "clock": "pass"}


@pytest.mark.parametrize(("ahead", "verdict"), [(-86400, "fail"), (86400, "fail"), (-8, "fail"), (60, "warn")])
def test_a_wrong_clock_is_told(settings: NodeSettings, coordinator: Coordinator, ahead: float, verdict: str) -> None:
    coordinator.ahead = ahead  # the coordinator's clock, so ours is behind where it is positive
    clock = network(settings)["clock"]
    assert clock.verdict == verdict and "NTP" in clock.remedy


def test_another_authority_fails(settings: NodeSettings, tmp_path: Path) -> None:
    other = make_certificates(tmp_path)
    Path(settings.superlink.root_certificate).write_bytes(other.authority.read_bytes())
    tls = network(settings)["TLS"]
    assert tls.verdict == "fail" and "telephone" in tls.remedy


def test_a_closed_port_and_an_unknown_name_fail(settings: NodeSettings) -> None:
    closed = settings.superlink.model_copy(update={"address": "127.0.0.1:1"})
    found = network(settings.model_copy(update={"superlink": closed}))
    assert verdicts(found) == {"name": "pass", "connection": "fail"} and "--ports" in found["connection"].remedy
    unknown = settings.superlink.model_copy(update={"address": "no-such-host.invalid:8000"})
    assert verdicts(network(settings.model_copy(update={"superlink": unknown}))) == {"name": "fail"}


def test_a_proxy_with_a_password(settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:pass%20word@127.0.0.1:{proxy.port}")
    assert set(verdicts(network(settings)).values()) == {"pass"}
    assert proxy.asked.startswith(f"CONNECT {settings.superlink.address} HTTP/1.1\r\n")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    refused = network(settings)["connection"]
    assert refused.verdict == "fail" and "407" in refused.seen and "USER:PASSWORD" in refused.seen
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert set(verdicts(network(settings)).values()) == {"pass"}
    proxy.socket.close()


def test_an_address_in_brackets() -> None:
    way = Way("[::1]:8000", proxy="")
    assert (way.host, way.port, way.first_hop) == ("::1", 8000, ("::1", 8000))


def test_a_user_who_may_start_containers_is_told(
    settings: NodeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = tmp_path / "docker.sock"
    monkeypatch.setattr(doctor, "DOORS", (str(door),))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [finding.verdict for finding in doctor._user(settings)] == ["pass"]
    door.touch()
    (finding,) = doctor._user(settings)
    assert finding.verdict == "warn" and str(door) in finding.seen and "group" in finding.remedy


def test_the_whole_report(settings: NodeSettings, tmp_path: Path) -> None:
    found = {finding.check: finding for finding in examine(settings)}
    assert not [finding for finding in found.values() if finding.verdict == "fail"], found
    assert all(finding.remedy for finding in found.values() if finding.verdict != "pass")
    (tmp_path / "bids" / "sub-P001" / "anat").rename(tmp_path / "gone")
    for folder in (tmp_path / "bids").glob("sub-*"):
        folder.rename(tmp_path / folder.name)
    (Path(settings.site.state) / "ledger.db").write_bytes(b"not a ledger")
    (Path(settings.site.state) / "audit.jsonl").write_text('{"n": 1}\n')
    with socket.create_server(("127.0.0.1", settings.runner.port)):
        found = {finding.check: finding for finding in examine(settings)}
    failed = {name for name, finding in found.items() if finding.verdict == "fail"}
    assert {"data", "privacy ledger", "audit log"} <= failed
    assert any("in use" in finding.seen for finding in found.values())


def test_the_command(settings: NodeSettings) -> None:
    config = Path(settings.runner.secret).parent / "node.toml"
    done = subprocess.run(
        [NODE, "doctor", "--json", "--config", str(config)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert {"check", "verdict", "seen", "remedy"} == set(json.loads(done.stdout)["findings"][0])
    sheet = subprocess.run(
        [NODE, "doctor", "--ports", "--config", str(config)], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert settings.superlink.address in sheet and "Outgoing TCP only" in sheet
