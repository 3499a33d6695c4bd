# SPDX-License-Identifier: Apache-2.0
"""A consortium for tests: real keys, certificates and state, and passphrases that cost less to check."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedneuro.privacy.processes import claim_port
from fedneuro.server import sealed_keys
from fedneuro.server.consortium import ROOT_KEY, Consortium, create_consortium
from fedneuro.server.consortium_settings import ServerSettings
from fedneuro.server.sealed_keys import Passphrase

PASSPHRASE, ROOT_PASSPHRASE = "issuing passphrase", "root passphrase 1"


@pytest.fixture(scope="session")
def passphrase(tmp_path_factory: pytest.TempPathFactory) -> Passphrase:
    """Opens the issuing key."""
    return _saved(tmp_path_factory, PASSPHRASE, "the issuing key")


@pytest.fixture(scope="session")
def root_passphrase(tmp_path_factory: pytest.TempPathFactory) -> Passphrase:
    """Opens the root key."""
    return _saved(tmp_path_factory, ROOT_PASSPHRASE, "the root key")


@pytest.fixture(scope="session")
def make_consortium(passphrase: Passphrase, root_passphrase: Passphrase) -> Callable[[Path], Consortium]:
    """Makes a consortium on free ports of this machine; the root key is moved beside its folder."""

    def make(folder: Path) -> Consortium:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sealed_keys, "_SCRYPT_N", 2**14)
            names = ("guard", "enrolment", "renewal", "superlink", "dashboard")
            ports = dict(zip(names, free_ports(len(names)), strict=True))
            web = {"port": ports.pop("dashboard")}
            server = {"host": "localhost", "listen": "127.0.0.1"}
            settings = ServerSettings.model_validate(
                {"consortium": {"name": "test"}, "server": server, "ports": ports, "dashboard": web}
            )
            made = create_consortium(folder, settings, root_passphrase, passphrase)
        (folder / ROOT_KEY).rename(folder.with_suffix(".root.json"))
        return made

    return make


@contextmanager
def coordinator_up(
    consortium: Consortium, *words: str, command: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """``fedneuro-server start``, until it is told to stop; what it logs is in ``start.log`` beside the folder.

    ``command`` and ``env`` are what starts it instead, such as a service file.
    """
    log = consortium.folder.with_suffix(".start.log")
    usual = [str(Path(sys.executable).parent / "fedneuro-server"), "start", "--config", str(consortium.folder)]
    started = [*(command or usual), *words]
    values = {**os.environ, **({"FEDNEURO_PASSPHRASE": PASSPHRASE} if env is None else env)}
    with log.open("a") as errors:
        process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=errors, text=True, env=values)
    try:
        assert process.stdout is not None and "is up" in process.stdout.readline(), log.read_text()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that are free now."""
    with socket.socket() as hold:
        hold.bind(("127.0.0.1", 0))
        found: set[int] = set()
        while len(found) < count:
            found.add(claim_port())
        return sorted(found)


def _saved(factory: pytest.TempPathFactory, text: str, what: str) -> Passphrase:
    path = factory.mktemp("passphrase") / "passphrase"
    path.write_text(text + "\n")
    path.chmod(0o600)
    return Passphrase(what, "FEDNEURO_UNSET", path)
