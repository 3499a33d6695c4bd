# SPDX-License-Identifier: Apache-2.0
"""One hospital's real node under a coordinator whose part the caller plays: for benchmarks and for hostile tests.

    start_superlink   Flower's SuperLink on this machine, with TLS, node authentication and SQLite
    take_run          submits a run and takes it as the coordinator's runner would; what is then sent, the caller says
    LiveNode          ``fedneuro-node start`` with all of its processes, and who starts it again, as systemd would

Everything that the hospital runs is what a hospital runs; only the coordinator's ServerApp is left out.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import tomlkit

from ...client.node_init import Answers, init_node
from ...client.policy_edit import approve
from ...client.run_folder import RunFolder
from ...privacy.contract import Role
from ...privacy.errors import EnvironmentProblem
from ...privacy.flower_tasks import TaskSource, heartbeat
from ...privacy.study import Study
from ...server.superlink import SUPERLINK, superlink_arguments
from ..certificates import make_certificates, make_node_key, write_private
from ..control import Control
from ..processes import Processes, claim_port

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["LiveNode", "SuperLink", "make_node", "start_superlink", "take_run", "wait_until"]

PATIENCE = 180.0
"""Seconds until a process is up; imports are slow on a busy machine."""
RESTART_SECONDS = 2.0
"""``RestartSec`` of the service file."""


def wait_until(what: str, done: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until ``done`` gives something true; returns it.

    Raises:
        EnvironmentProblem: it did not, within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > deadline:
            raise EnvironmentProblem(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)
    return found


# -- the coordinator's side ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SuperLink:
    """A SuperLink that runs, with what its operator holds."""

    address: str
    authority: Path
    secret: Path
    control: Control


@contextmanager
def start_superlink(folder: Path, processes: Processes) -> Iterator[SuperLink]:
    """A SuperLink on a free port of 127.0.0.1, with files in the new ``folder``.

    Raises:
        EnvironmentProblem: it does not start.
    """
    folder.mkdir(parents=True, mode=0o700)
    files, secret, port = make_certificates(folder), folder / "runner.secret", claim_port()
    write_private(secret, secrets.token_hex(32).encode())
    words = superlink_arguments(
        f"127.0.0.1:{port}", folder / "superlink.db", authority=files.authority, certificate=files.server,
        key=files.server_key, secret=secret,
    )  # fmt: skip
    processes.start("superlink", SUPERLINK, words, {"FLWR_HOME": str(folder / "home")})
    with closing(Control(f"127.0.0.1:{port}", files.authority)) as control:
        wait_until("the SuperLink starts", control.is_healthy)
        yield SuperLink(f"127.0.0.1:{port}", files.authority, secret, control)


@contextmanager
def take_run(link: SuperLink, content: bytes, settings: Mapping[str, str | int] | None = None) -> Iterator["Grid"]:
    """Submit a run of the bundle ``content`` and take it, in the place of the coordinator's runner, which must not run.

    Args:
        link: where.
        content: any bundle that the SuperLink accepts.
        settings: the run's configuration.
    """
    from flwr.common.serde import run_from_proto
    from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    with closing(TaskSource(link.address, "flwr-serverapp", link.secret, link.authority)) as source:
        link.control.start_run(content, settings or {})
        token = wait_until("the run is given out", source.acquire)
        with closing(source.task_client(token)) as client, heartbeat(client):
            task = client.PullTaskInput(PullTaskInputRequest())
            named = (task.task_id, task.run.run_id, task.context.node_id)
            TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = named
            grid = HttpGrid(link.address, False, link.authority.read_bytes(), token=token)
            grid.set_run(run_from_proto(task.run))
            try:
                yield grid
            finally:
                grid.close()
                with suppress(httpx.HTTPError, RuntimeError):
                    client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed", details=""))
                for name in ("_task_id", "_run_id", "_node_id"):
                    setattr(TaskIdentity, name, None)


# -- the hospital's side -------------------------------------------------------------------------------------


def make_node(
    folder: Path, data: Path, link: SuperLink, bundle: str, *studies: Study, address: str = "", **limits: float
) -> Path:
    """A node as after enrolment: its files, its key registered, ``studies`` approved; returns ``node.toml``.

    Args:
        folder: new; its name is the site's.
        data: BIDS folder.
        link: the coordinator's SuperLink.
        bundle: SHA-256 of the only bundle that it serves.
        studies: approved by their hash; a study without privacy makes the policy permit that.
        address: where the node finds the SuperLink, if not at its own address.
        limits: of the policy's section ``[limits]``.
    """
    name = folder.name
    init_node(folder, Answers(name=name, role=Role.TRAIN, public_size=10, data=data, epsilon=1000.0, port=claim_port()))
    link.control.register(make_node_key(folder / "node.key"), name)
    shutil.copyfile(link.authority, folder / "ca.crt")
    node = tomlkit.parse((folder / "node.toml").read_text(encoding="utf-8"))
    superlink = {"address": address or link.address, "root_certificate": "ca.crt", "key": "node.key"}
    for section, values in (("superlink", superlink), ("runner", {"bundle": bundle})):
        part = node.setdefault(section, tomlkit.table())
        for key, value in values.items():
            part[key] = value
    (folder / "node.toml").write_text(tomlkit.dumps(node), encoding="utf-8")
    policy = tomlkit.parse((folder / "policy.toml").read_text(encoding="utf-8"))
    modes = sorted({study.privacy.mode for study in studies} | {"local", "distributed"})
    rules: dict[str, dict[str, Any]] = {"privacy": {"modes": modes}, "limits": limits}
    for section, values in rules.items():
        for key, value in values.items():
            policy[section][key] = value
    (folder / "policy.toml").write_text(tomlkit.dumps(policy), encoding="utf-8")
    for study in studies:
        approve(folder / "policy.toml", study.hash)
    return folder / "node.toml"


class LiveNode:
    """A running ``fedneuro-node start``. A context manager: leaving it ends the node.

    Args:
        config: its ``node.toml``.
        keep: start it again when it ends, after :data:`RESTART_SECONDS`, as its service file says.
        env: variables beside this process's own.
    """

    def __init__(self, config: Path, *, keep: bool = False, env: Mapping[str, str] | None = None) -> None:
        self.config, self._env = config, {**os.environ, **(env or {})}
        self.folder = RunFolder(config.parent / "state")
        self.starts = 0
        self._leaving = threading.Event()
        self._log = (config.parent / "start.log").open("ab")
        self.process = self._start()
        self._keeper = threading.Thread(target=self._keep, daemon=True) if keep else None
        if self._keeper:
            self._keeper.start()

    def __enter__(self) -> "LiveNode":
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        if self._keeper:
            self._keeper.join()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            self.process.kill()
        self.process.wait()
        self._log.close()

    def command(self, *words: str, rc: int | None = 0) -> subprocess.CompletedProcess[str]:
        """``fedneuro-node WORDS --config …`` as a person types it.

        Raises:
            EnvironmentProblem: it ended with another code than ``rc``.
        """
        full = [_program(), *words, "--config", str(self.config)]
        done = subprocess.run(full, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 - our own
        if rc is not None and done.returncode != rc:
            raise EnvironmentProblem(f"{' '.join(words)}: ended with {done.returncode}: {done.stderr[-300:]}")
        return done

    def pids(self) -> dict[str, int]:
        """Of node, runner, supernode and training, once all of them live; until then nothing."""
        runner, node = self.folder.read("runner"), self.folder.read("node")
        children = {name: child["pid"] for name, child in node.get("children", {}).items()}
        found = {"node": self.process.pid, **children, "training": runner.get("child", {}).get("pid")}
        whole = node.get("pid") == self.process.pid and runner.get("pid") == children.get("runner")
        return found if whole and all(pid and _alive(pid) for pid in found.values()) else {}

    def _start(self) -> "subprocess.Popen[bytes]":
        self.starts += 1
        return subprocess.Popen(  # noqa: S603 - our own command
            [_program(), "start", "--config", str(self.config)], stdout=self._log, stderr=self._log, env=self._env
        )

    def _keep(self) -> None:
        while not self._leaving.wait(0.1):
            if self.process.poll() is not None and not self._leaving.wait(RESTART_SECONDS):
                self.process = self._start()


def _program() -> str:
    return str(Path(sys.executable).parent / "fedneuro-node")


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
