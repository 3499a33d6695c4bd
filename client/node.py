# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node start``: the SuperNode and the runner, kept running until the hospital says stop.

    supernode   Flower's, the only process with a connection to the outside: to the coordinator, outgoing
    runner      ours, the gates; its child trains, behind walls

A process that ends is started again after 1, 2, 4, 8, 16, 16 … 60 s, at once if it had lived for a while. (After a
kill -9 the coordinator takes the node for connected for up to a minute and refuses a second one; the pauses of 16 s
cover that.) What the
processes hold is on disk: ledger, audit log, rounds answered. Nothing outlives this process, not even a kill -9.

    SIGTERM, SIGINT   stop within 15 s; the round under way is abandoned, and the coordinator told
    SIGUSR1           finish the task in hand, send its reply, then stop; ``stop`` waits so long and no longer
"""

import logging
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from ..privacy.processes import Processes, claim_port, ending
from ..privacy.upkeep import QUIET_FLOWER, Kept
from .integrity import require_integrity
from .node_settings import NodeSettings
from .run_folder import RunFolder, claim_identity

__all__ = ["serve_node", "supernode_arguments"]

LOOK_SECONDS = 0.2
STEADY_SECONDS = 30.0
"""A process that lived this long failed for a new reason."""
SHORT_PAUSES, SHORT_PAUSE = 8, 16.0
LONGEST_PAUSE = 60.0
"""Seconds between two starts: at first at most the short pause, after so many failures in a row the longest."""
SEND_SECONDS = 120.0
"""For the last reply on its way to the coordinator."""
LOG_BYTES = 20 * 1024**2
"""A log that is longer when its process starts becomes ``NAME.log.1``."""
_log = logging.getLogger("fedneuro.start")


def supernode_arguments(settings: NodeSettings) -> list[str]:
    """Options of :mod:`.supernode` for a node."""
    link, runner = settings.superlink, settings.runner
    arguments = ["--superlink", link.address, "--root-certificates", link.root_certificate]
    arguments += ["--auth-supernode-private-key", link.key, "--host", "127.0.0.1", "--port", str(runner.port)]
    arguments += ["--isolation", "process", "--superexec-auth-secret-file", runner.secret, "--bundle", runner.bundle]
    if link.certificate and link.certificate_key:
        arguments += ["--client-certificate", link.certificate, "--client-key", link.certificate_key]
        arguments += ["--revocations", link.revocations] if link.revocations else []
    arguments += ["--lease", str(RunFolder(Path(settings.site.state)).path / "lease.json")]
    policy = settings.site_settings().policy
    return arguments + (["--policy", str(policy)] if policy else [])


def serve_node(settings: NodeSettings, config: Path) -> None:
    """Run the node until it is told to stop.

    Raises:
        EnvironmentProblem: it runs already; another node has its key; the port is in use; the state folder cannot be
            written; the installed code is not what was installed.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    require_integrity(record=settings.runner.require_record)
    folder = RunFolder(Path(settings.site.state))
    os.umask(0o077)
    with ExitStack() as stack:
        lock = folder.hold("node", "the node")
        stack.callback(lock.release)
        stack.callback(claim_identity(Path(settings.superlink.key)).close)
        claim_port(settings.runner.port)
        logs = Path(settings.site.state) / "logs"
        node = _Node(settings, config.resolve(), folder, stack.enter_context(Processes(logs, QUIET_FLOWER)))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, node.told)
        node.run()


class _Node:
    """The two processes of a node."""

    def __init__(self, settings: NodeSettings, config: Path, folder: RunFolder, processes: Processes) -> None:
        self._settings, self._folder, self._processes = settings, folder, processes
        home = {"FLWR_HOME": str(Path(settings.site.state) / "flower")}
        link, own = supernode_arguments(settings), ["run", "--config", str(config)]
        begin = processes.start
        self._children = [
            Kept("runner", partial(begin, "runner", "fedneuro.client.cli:main", own)),
            Kept("supernode", partial(begin, "supernode", "fedneuro.client.supernode:main", link, home)),
        ]
        self._ended: dict[str, str] = {}
        self._since = time.time()
        self._stop = ""

    def told(self, number: int, _: FrameType | None) -> None:
        """A signal came."""
        if self._stop != "now":
            self._stop = "drain" if number == signal.SIGUSR1 else "now"

    def run(self) -> None:
        """Look after the processes; returns when told to stop, all ended."""
        for child in self._children:
            self._begin(child)
        _log.info("node %s: started, coordinator %s", self._settings.site.name, self._settings.superlink.address)
        while not self._stop:
            for child in self._children:
                self._look_after(child)
            time.sleep(LOOK_SECONDS)
        if self._stop == "drain":
            self._drain()
        _log.info("stopping")
        self._processes.stop()
        self._publish("stopped")

    def _drain(self) -> None:
        """Let the task in hand be finished and its reply sent; a second signal ends the wait."""
        self._publish("stopping after the task in hand")
        for name in ("runner", "supernode"):
            if self._processes.code(name) is None:
                _log.info("%s: finishing", name)
                with suppress(ProcessLookupError):
                    os.kill(self._processes.pid(name), signal.SIGUSR1)
            patience = float("inf") if name == "runner" else SEND_SECONDS  # "stop" itself ends its patience
            deadline = time.monotonic() + patience
            while self._stop == "drain" and self._processes.code(name) is None and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)

    def _begin(self, child: Kept) -> None:
        log = self._processes.log(child.name)
        with suppress(OSError):
            if log.stat().st_size > LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
        try:
            child.begin()
        except OSError as error:  # a full disk, no more processes: try again later
            self._ended[child.name] = f"cannot be started ({error.strerror})"
            child.put_off(lambda _: LONGEST_PAUSE, steady=math.inf)
            return
        self._publish("running")

    def _look_after(self, child: Kept) -> None:
        if child.again is not None:
            if child.due:
                self._begin(child)
            return
        if (code := self._processes.code(child.name)) is None:
            return
        self._processes.stop(child.name)  # and what it left behind in its session
        pause = child.put_off(_pause, steady=STEADY_SECONDS)
        self._ended[child.name] = f"{ending(code)}: {self._processes.last_line(child.name)}"
        _log.warning("%s %s; again in %.0f s", child.name, self._ended[child.name], pause)
        self._publish("running")

    def _publish(self, state: str) -> None:
        children = {
            child.name: {
                "pid": self._processes.pid(child.name) if child.starts and child.again is None else None,
                "starts": child.starts,
                "failures": child.failures,
                "ended": self._ended.get(child.name, ""),
            }
            for child in self._children
        }
        self._folder.write("node", {"pid": os.getpid(), "state": state, "since": self._since, "children": children})


def _pause(failures: int) -> float:
    """Seconds until the next start after so many failures in a row, from 1."""
    return min(SHORT_PAUSE, 2.0 ** (failures - 1)) if failures <= SHORT_PAUSES else LONGEST_PAUSE
