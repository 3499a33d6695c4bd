# SPDX-License-Identifier: Apache-2.0
"""The state store in a real PostgreSQL, and an issuing key that is taken back: both with everything running.

PostgreSQL is Debian's (``apt-get install postgresql``), started for this test on a port of its own.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from fedneuro.client.enrolment import enrol, renew
from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import EnvironmentProblem, FedNeuroError
from fedneuro.privacy.processes import claim_port
from fedneuro.server import cli
from fedneuro.server.consortium import ROOT_KEY, Consortium
from fedneuro.server.invitations import invite
from fedneuro.server.registry import Registry
from fedneuro.server.registry_tables import metadata
from fedneuro.server.sealed_keys import Passphrase
from tests.needs import lacking, need_nginx, need_package
from tests.server.conftest import PASSPHRASE, ROOT_PASSPHRASE, coordinator_up, free_ports
from tests.server.doors import post
from tests.server.test_consortium import one_of_four_enrols

pytestmark = pytest.mark.walk

HOUR = timedelta(hours=1)


class Postgres:
    """A database server of this test; PostgreSQL does not run as root, so root lends it a user's rights."""

    def __init__(self, folder: Path, programs: Path) -> None:
        (self.port,) = free_ports(1)
        self.url = f"postgresql+psycopg://fedneuro@127.0.0.1:{self.port}/postgres"
        self._data, self._programs = folder / "data", programs
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        words = ["-D", str(self._data), "--auth=trust", "--username=fedneuro", "--no-sync", "--encoding=UTF8"]
        subprocess.run([str(programs / "initdb"), *words], check=True, capture_output=True, user=self._user, cwd=folder)

    @contextmanager
    def up(self) -> Iterator[None]:
        """Runs, until the block ends."""
        options = [f"port={self.port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        command = [
            str(self._programs / "postgres"),
            "-D",
            str(self._data),
            *(word for o in options for word in ("-c", o)),
        ]
        with (self._data / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, user=self._user, cwd=self._data)
        try:
            wait_for("PostgreSQL answers", self._answers)
            yield
        finally:
            process.send_signal(2)  # "fast": connections are cut
            process.wait(30)

    def _answers(self) -> bool:
        engine = sa.create_engine(self.url)
        try:
            engine.connect().close()
        except OperationalError:
            return False
        finally:
            engine.dispose()
        return True


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    need_package("psycopg", "postgresql")
    found = shutil.which("postgres") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))), None)
    if found is None:
        lacking("PostgreSQL is not installed (apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="fn-pg-", ignore_cleanup_errors=True) as folder:
        yield Postgres(Path(folder), Path(found).resolve().parent)


def wait_for(what: str, done: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def call(*words: object) -> str:
    """``fedneuro-server``."""
    env = {"FEDNEURO_PASSPHRASE": PASSPHRASE, "FEDNEURO_ROOT_PASSPHRASE": ROOT_PASSPHRASE}
    done = CliRunner().invoke(cli.app, [str(word) for word in words], standalone_mode=False, env=env)
    if done.exception:
        raise done.exception
    return done.stdout


def test_a_consortium_in_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    need_nginx()
    folder, north, (superlink,) = tmp_path / "c", tmp_path / "north", free_ports(1)
    log = folder.with_suffix(".start.log")
    with ExitStack() as stack:
        with postgres.up():
            call("init", "net", "--out", folder, "--port", _first_of_three(), "--superlink-port", superlink,
                 "--database", postgres.url)  # fmt: skip
            (folder / ROOT_KEY).rename(tmp_path / "root.json")
            consortium = Consortium(folder)
            engine = sa.create_engine(postgres.url)
            with engine.connect() as connection:
                assert compare_metadata(MigrationContext.configure(connection), metadata) == []
            engine.dispose()
            other = Registry(postgres.url.replace("/postgres", "/template1"))  # a second database of every server
            one_of_four_enrols(other)
            other.close()
            stack.enter_context(coordinator_up(consortium, "--no-dashboard"))
        with pytest.raises(EnvironmentProblem, match=r"state.url: postgresql\+psycopg://fedneuro@.* cannot be opened"):
            call("sites", "--config", folder)
        wait_for("start lives on, and says so", lambda: "until then nobody can enrol" in log.read_text())
        with postgres.up():
            wait_for("start sees it again", lambda: "the state store answers again" in log.read_text())
            enrol(invite(consortium, "north", Role.TRAIN, HOUR)[0], north / "node.toml")
            assert post(consortium, north, "activate-node") == 200
            listed = {site["site"]: site["state"] for site in json.loads(call("sites", "--json", "--config", folder))}
            assert listed == {"north": "enrolled"}
            call("revoke", "north", "--config", folder)
            wait_for("north is out", lambda: post(consortium, north, "activate-node") in (400, 403))
            consortium.registry.close()
    assert "Traceback" not in log.read_text()


def _first_of_three() -> int:
    """A port that is free with the two after it."""
    while True:
        (first,) = free_ports(1)
        with suppress(EnvironmentProblem, OverflowError):
            return claim_port(first + 2) - 2 if claim_port(first + 1) else 0


def command_of(unit: str) -> list[str]:
    """As systemd reads it (systemd.service(5)): lines are joined, ``$$`` and ``%%`` are one."""
    found = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", unit, re.MULTILINE)
    assert found is not None
    words = shlex.split(found[1].replace("\\\n", " "))
    return [word.replace("$$", "$").replace("%%", "%") for word in words]


def test_an_issuing_key_is_taken_back(
    tmp_path: Path, make_consortium: Callable[[Path], Consortium], passphrase: Passphrase
) -> None:
    need_nginx()
    consortium = make_consortium(tmp_path / "c")
    old, new = tmp_path / "old", tmp_path / "new"
    with coordinator_up(consortium, "--no-dashboard"):
        enrol(invite(consortium, "north", Role.TRAIN, HOUR)[0], old / "node.toml")
        assert post(consortium, old, "activate-node") == 200
        said = call("rotate", "--root-key", tmp_path / "c.root.json", "--take-back", "--config", consortium.folder)
        assert "issuing key 2 is in use; all hospitals must be invited again" in said
        wait_for("the old certificate is refused", lambda: post(consortium, old, "activate-node") in (400, 403))
        with pytest.raises(FedNeuroError, match="does not hold"):
            renew(old / "node.toml")
        with pytest.raises(EnvironmentProblem, match="try again in a minute"):  # it still holds the old key
            enrol(invite(consortium, "north", Role.TRAIN, HOUR)[0], new / "node.toml")
    (site,) = json.loads(call("sites", "--json", "--config", consortium.folder))
    assert site["certificate"] == "", "the list of hospitals says that it has none"
    (tmp_path / "fedneuro-passphrase").write_text(PASSPHRASE)
    service = command_of(call("unit", "systemd", "--config", consortium.folder))
    with coordinator_up(consortium, command=service, env={"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        assert post(consortium, old, "activate-node") in (400, 403)
        with pytest.raises(FedNeuroError):
            renew(old / "node.toml")
        enrol(invite(consortium, "north", Role.TRAIN, HOUR)[0], new / "node.toml")
        assert post(consortium, new, "activate-node") == 200
    assert sorted(consortium.unlock(passphrase).authorities) == [2]
