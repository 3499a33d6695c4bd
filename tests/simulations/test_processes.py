# SPDX-License-Identifier: Apache-2.0
"""Children end with the command that started them, however it ends; ports and certificates are what they claim."""

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key

from fedneuro.privacy.errors import EnvironmentProblem
from fedneuro.simulations.certificates import make_certificates, make_node_key, write_private
from fedneuro.simulations.processes import Processes, claim_port, ending

PARENT = """
import sys, time
from pathlib import Path
from fedneuro.simulations.processes import Processes
processes = Processes(Path(sys.argv[1]), {})
print(processes.start("sleeper", "signal:pause", []), flush=True)
time.sleep(60)
"""


def gone(pid: int, patience: float = 10.0) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        assert psutil.pid_exists(child)
        parent.send_signal(number)
    assert gone(child)


def test_leaving_ends_all_and_says_how_they_ended(tmp_path: Path) -> None:
    with Processes(tmp_path, {"ODD": "x"}) as processes:
        pids = [processes.start(name, "signal:pause", []) for name in ("a", "b")]
        processes.start("c", "nowhere:main", [])
        assert processes.code("a") is None
        deadline = time.monotonic() + 20
        while processes.code("c") is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes.code("c") == 1
        assert processes.last_line("c") == "ModuleNotFoundError: No module named 'nowhere'"
        os.kill(pids[0], signal.SIGKILL)
        assert gone(pids[0])
    assert all(gone(pid, 0.1) for pid in pids)
    assert processes.code("a") == -signal.SIGKILL
    assert ending(-signal.SIGKILL) == "was ended by SIGKILL"
    assert ending(3) == "ended with code 3"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"port {port} of 127\.0\.0\.1 is in use.*another port"):
            claim_port(port)
    assert claim_port(port) == port
    assert 1024 <= claim_port() <= 65535


def test_certificates_are_private_and_prove_the_server(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    assert stat.S_IMODE(files.server_key.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ca.crt", "server.crt", "server.key"]  # no key of the CA
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(files.server, files.server_key)
    listener = socket.create_server(("127.0.0.1", 0))
    client = ssl.create_default_context(cafile=str(files.authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT

    def accept() -> None:
        for _ in range(3):
            connection, _ = listener.accept()
            try:
                server.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        for name in ("127.0.0.1", "localhost"):
            with (
                socket.create_connection(listener.getsockname()) as plain,
                client.wrap_socket(plain, server_hostname=name),
            ):
                pass
        with socket.create_connection(listener.getsockname()) as plain, pytest.raises(ssl.SSLCertVerificationError):
            client.wrap_socket(plain, server_hostname="other.example.org")
    finally:
        thread.join()
        listener.close()


def test_a_nodes_key_is_p384_in_openssh_form(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node.key")
    private = load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert private.curve.name == "secp384r1"  # type: ignore[union-attr]
    assert load_pem_public_key(public) == private.public_key()
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "node.key", b"another")
