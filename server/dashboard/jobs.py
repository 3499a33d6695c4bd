# SPDX-License-Identifier: Apache-2.0
"""Work that takes longer than a page may: a release or a report, each a command of ours in a process of its own.

So a release's memory is given back when it is made, and a page never waits for it. The process ends with the
dashboard (:mod:`fedneuro.privacy.processes`). A passphrase goes to its standard input: never to the command line or
the environment, which other processes can read.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ...privacy.errors import StateError
from ...privacy.processes import ending

__all__ = ["Job", "Jobs"]

_PROCESSES = "fedneuro.privacy.processes"
_COMMAND = "fedneuro.server.cli:main"
PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Job:
    """One command: ``what`` it makes, since when (seconds since 1970), and, once it ended, why it failed."""

    what: str
    began: float
    running: bool = True
    fault: str = ""


class Jobs:
    """The commands of one dashboard, one at a time: a release takes as much memory as the model twice."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], Job] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def find(self, what: str, run: str) -> Job | None:
        """The last one of this kind for this run; None: there was none since the dashboard started."""
        with self._lock:
            return self._jobs.get((what, run))

    def start(self, what: str, run: str, arguments: Sequence[str], secret: str = "") -> None:
        """Run ``fedneuro-server ARGUMENTS`` for ``run``; ``secret`` is given on standard input.

        Raises:
            StateError: another one is under way.
        """
        with self._lock:
            if busy := next((key for key, job in self._jobs.items() if job.running), None):
                raise StateError(f"the {busy[0]} of run {busy[1]} is being made; wait until it is done")
            self._jobs[what, run] = Job(what, time.time())
        # A thread of its own, not one of the server's: the kernel ends the child with the thread that started it.
        self._thread = threading.Thread(target=self._work, args=(what, run, arguments, secret), name="job", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what is under way."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def _work(self, what: str, run: str, arguments: Sequence[str], secret: str) -> None:
        fault = "it could not be started"
        try:
            command = [sys.executable, "-P", "-m", _PROCESSES, str(os.getpid()), "fedneuro-server", _COMMAND]
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            said, _ = self._process.communicate(f"{secret}\n".encode())
            fault = _fault(self._process.returncode, said.decode("utf-8", errors="replace"))
        except OSError as error:
            fault = f"it could not be started: {error.strerror}"
        finally:
            with self._lock:
                self._jobs[what, run] = replace(self._jobs[what, run], running=False, fault=fault)


def _fault(code: int, said: str) -> str:
    """Why a command failed: its own one line, or how it ended; nothing where it did not fail."""
    if code == 0:
        return ""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ")[:1000] if lines else ending(code)
