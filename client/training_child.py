# SPDX-License-Identifier: Apache-2.0
"""The runner's side of the process that trains: start it, ask it, hold it, replace it.

The child (:mod:`.training_main`) is started before the first request, loads torch with it, and serves one study;
another study gets a new one. While it computes, the runner looks five times a second:

    - it died: the request is answered with ``training-crashed`` or ``out-of-memory``; the next starts a new child
    - its memory passes ``memory``: it is killed before the kernel has to choose; ``out-of-memory``
    - it took longer than ``seconds``: it is killed; ``over-time``
    - :class:`~.manners.Manners` say hold: it is stopped (SIGSTOP) in the middle of a step, and continued (SIGCONT) when
      they do not; held time does not count

Address-space limits would be simpler, but CUDA maps far more addresses than it uses memory.
"""

import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..privacy.contract import Reply, Request
from ..privacy.errors import EnvironmentProblem, FedNeuroError, Reason, Refused
from ..privacy.wire import decode_reply, encode_request
from ..privacy.wire_bytes import read_frame, write_frame
from .audit_chain import head_path
from .network_layout import COUNT_SECONDS, Layout
from .sandbox import Walls
from .settings import SiteSettings, settings_text

__all__ = ["Caps", "ChildFault", "TrainingChild"]

LOOK_SECONDS = 0.2
START_SECONDS = 120.0
_log = logging.getLogger("fedneuro.runner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What the child may take.

    Args:
        memory: bytes of resident memory.
        seconds: of work on one request.
        isolate: put up the walls of :mod:`.sandbox`.
        require_walls: do not serve without both walls.
    """

    memory: float = float("inf")
    seconds: float = float("inf")
    isolate: bool = True
    require_walls: bool = False


class ChildFault(FedNeuroError):
    """The child could not do it; ``exit_code`` is that of the error over there."""

    def __init__(self, text: str, reason: Reason, exit_code: int = EnvironmentProblem.exit_code) -> None:
        super().__init__(text, reason=reason)
        self.__dict__["exit_code"] = exit_code


class TrainingChild:
    """At most one child process.

    Args:
        settings: the site's; where it may write.
        caps: what it may take.
        scratch: its folder of temporary files.
        hold: why it must hold now, or nothing.
        changed: is called when a child starts, holds, goes on or ends.
    """

    def __init__(
        self,
        settings: SiteSettings,
        caps: Caps,
        scratch: Path,
        hold: Callable[[], str] = lambda: "",
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self._caps, self._scratch, self._hold, self._changed = settings, caps, scratch, hold, changed
        self._process: subprocess.Popen[bytes] | None = None
        self._study = ""
        self.walls: Walls | None = None
        self.held = ""
        self.crashes = 0

    @property
    def pid(self) -> int | None:
        """Process id of the living child."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start a child, unless one lives; returns as soon as its walls stand.

        Raises:
            EnvironmentProblem: it does not start.
            Refused: a wall is missing and ``caps.require_walls`` is set.
        """
        if self.pid is not None:
            return
        self.close()
        writable = [self.settings.state, self.settings.cache or self.settings.state / "cache"]
        for folder in (*writable, self._scratch):
            folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-I", "-u", "-m", "fedneuro.client.training_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._process, self._study = process, ""
        source, sink = self._pipes()
        start = {
            "writable": [str(path.resolve()) for path in writable],
            "scratch": str(self._scratch.resolve()),
            "readable": [str(self.settings.data.resolve())],
            "kept": [str(path) for path in (self.settings.audit, head_path(self.settings.audit))],  # the runner's alone
            "isolate": self._caps.isolate,
        }
        try:
            sink.write(json.dumps(start).encode() + b"\n")
            sink.flush()
            if not select.select([source], [], [], START_SECONDS)[0]:
                raise EOFError("it says nothing")
            self.walls = Walls(**json.loads(source.readline()))
        except (OSError, EOFError, ValueError, TypeError) as error:
            self.close()
            raise EnvironmentProblem(f"the process that trains does not start: {error}") from error
        if self._caps.require_walls and not self.walls.complete:
            self.close()
            raise Refused(
                f'{self.walls.why}: [sandbox] isolation = "required" forbids to train; see fedneuro-node doctor',
                reason=Reason.ENVIRONMENT,
            )
        self._changed()

    def ask(self, request: Request, settings: SiteSettings) -> Reply:
        """Let the child do the work of ``request``.

        Raises:
            ChildFault: the child raised an error, died, or was killed for what it took.
            ContractViolation: what it answered is no reply.
        """
        if self._study not in ("", request.study.hash):
            self.close()  # a study's child sees no other study's data, model or budget in its memory
        self.start()
        self._study = request.study.hash
        head = {"settings": settings_text(settings)}
        try:
            content = encode_request(request)
            answer, records = self._exchange(lambda sink: write_frame(sink, head, content))
        except (OSError, EOFError) as error:
            raise self._died() from error
        except BaseException:
            self.close()  # also Ctrl-C: half an exchange cannot be taken up again
            raise
        if not answer.get("ok"):
            raise ChildFault(str(answer["text"]), Reason(answer["reason"]), int(answer["exit_code"]))
        if records is None:
            raise ChildFault("the process that trains answered without a reply", Reason.INTERNAL, 1)
        return decode_reply(records)

    def count(self, section: str, in_channels: int, channels: int) -> Layout | None:
        """The arrays of a study's network, for the gate: from a child that lives and was asked for nothing else yet.

        Args, Returns: see :func:`~.network_layout.network_layout`; None where there is no such child, or it fails.
        """
        if self._study or self.pid is None:
            return None
        head = {"count": [section, in_channels, channels]}
        try:
            answer, _ = self._exchange(lambda sink: write_frame(sink, head), COUNT_SECONDS)
            return tuple((str(name), int(numbers), int(size)) for name, numbers, size in answer["layout"])
        except KeyError:  # it cannot; another process will say why
            return None
        except (OSError, EOFError, ValueError, TypeError, FedNeuroError):
            self.close()
            return None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        self.held = ""
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                if stream:
                    stream.close()
        self._changed()

    # -- one exchange ----------------------------------------------------------------------------------

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        process = self._process
        if process is None or process.stdout is None or process.stdin is None:
            raise EOFError("there is no child")
        return process.stdout, process.stdin  # type: ignore[return-value]

    def _exchange(self, write: Callable[[BinaryIO], None], most: float = math.inf) -> tuple[dict[str, Any], Any]:
        """Write, watch until an answer begins, read it. A killed child ends a blocking read or write with an error."""
        source, sink = self._pipes()
        done = threading.Event()
        verdict: list[ChildFault] = []
        watch = threading.Thread(target=self._watch, args=(done, verdict, most), daemon=True)
        watch.start()
        try:
            write(sink)
            return read_frame(source)
        except (OSError, EOFError):
            done.set()
            watch.join()
            if verdict:
                self.close()
                raise verdict[0] from None
            raise
        finally:
            done.set()
            watch.join()

    def _watch(self, done: threading.Event, verdict: list[ChildFault], most: float = math.inf) -> None:
        """Look after the child until ``done``: hold it, or kill it for what it takes."""
        process = self._process
        if process is None:
            return
        worked, last, seconds = 0.0, time.monotonic(), min(most, self._caps.seconds)
        while not done.wait(LOOK_SECONDS):
            now = time.monotonic()
            worked, last = worked + (0.0 if self.held else now - last), now
            self._obey(process.pid)
            memory = _resident(process.pid)
            if memory > self._caps.memory:
                allowed = self._caps.memory / 2**30
                text = f"training took {memory / 2**30:.1f} GiB; [sandbox] memory_gib allows {allowed:.1f}"
                verdict.append(ChildFault(f"{text}; use a smaller patch or batch", Reason.OUT_OF_MEMORY))
            elif worked > seconds:
                text = f"training took over {seconds / 3600:.2f} h; [sandbox] request_hours allows no more"
                verdict.append(ChildFault(text, Reason.OVER_TIME))
            if verdict:
                self.crashes += 1
                process.kill()
                return
        if self.held:  # it answered just before it was stopped
            self._continue(process.pid)
            self.held = ""
            self._changed()

    def _obey(self, pid: int) -> None:
        why = self._hold()
        if why and not self.held:
            _log.info("training holds: %s", why)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        elif self.held and not why:
            self._continue(pid)
        if why != self.held:
            self.held = why
            self._changed()

    def _continue(self, pid: int) -> None:
        _log.info("training goes on")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _died(self) -> ChildFault:
        """What ended the child."""
        self.crashes += 1
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(5.0)
        self.close()
        if code == -signal.SIGKILL:
            text = "the process that trains was killed, most likely by the kernel for want of memory"
            return ChildFault(f"{text} (dmesg says); use a smaller patch or batch", Reason.OUT_OF_MEMORY)
        name = signal.Signals(-code).name if code and code < 0 else f"code {code}"
        return ChildFault(f"the process that trains ended with {name}; see the runner's log", Reason.TRAINING_CRASHED)


def _resident(pid: int) -> int:
    """Bytes of resident memory of a process; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
