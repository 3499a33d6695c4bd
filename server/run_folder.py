# SPDX-License-Identifier: Apache-2.0
"""The folder of one run at the coordinator, and what processes leave for each other in it.

.. code-block:: text

    DIR/runs/glioma-1/study.toml, study.json, study.sig   as launched: the file, its canonical form, the signature
    DIR/runs/glioma-1/initial.safetensors                 the model of round 0, where the study starts from one
    DIR/runs/glioma-1/launch.json                         :class:`Plan`: who is asked, how long is waited
    DIR/runs/glioma-1/state/                              :class:`fedneuro.server.store.RunStore`
    DIR/runs/glioma-1/server.log                          what the ServerApp's process said
    DIR/runs/glioma-1/stop                                there while somebody wants the run to stop
    DIR/runs/glioma-1/run.lock                            held by the process that executes the run

The lock is the kernel's (flock(2)): it ends with its process, however that ends. So whether a run is executed now is
known for certain, also after a crash, and two processes can never execute the same run.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..privacy.errors import BadInput, StateError
from ..privacy.file_lock import is_locked

__all__ = ["Plan", "RunFolder", "Stopped", "find_run", "new_run", "run_folders"]

When = Literal["now", "round"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_LOCK_SECONDS = 5.0
"""Others look whether the lock is held, each for an instant."""


class Stopped(Exception):
    """Somebody asked for the run to stop; what is saved can be resumed."""

    def __init__(self, when: When) -> None:
        super().__init__(f"stopped ({when})")
        self.when: When = when


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a run was launched. Seconds are wall-clock time.

    Args:
        sites: the hospitals that are asked, in place of all that are online.
        wait: before round 1, for so long those that did not join are asked again, until the quorum holds.
        patience: in a round, for so long sites that were lost are waited for, until the quorum holds.
        grace: once ``strategy.min_sites`` have answered, wait so long for the others; 0: ``round_timeout``.
        hello: for the answer to the first question; a hospital may have to preprocess its scans.
        launched: seconds since 1970 (UTC).
        submitted: of the last submission, by ``launch`` or ``resume``.
        flower_runs: ids that the SuperLink gave, one per submission.
        canary: whether this is the one-step round that ``--canary`` runs first.
    """

    sites: tuple[str, ...] = ()
    wait: float = 0.0
    patience: float = 0.0
    grace: float = 0.0
    hello: float = 0.0
    launched: float = 0.0
    submitted: float = 0.0
    flower_runs: tuple[int, ...] = ()
    canary: bool = False


class RunFolder:
    """One run's folder; :func:`find_run` and :func:`new_run` give it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def study(self) -> Path:
        """The study's canonical form; its signature lies beside it."""
        return self.path / "study.json"

    @property
    def initial(self) -> Path:
        """The model of round 0, where the study starts from one."""
        return self.path / "initial.safetensors"

    # -- plan ------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """How it was launched; nothing special where it was not (a rehearsal).

        Raises:
            StateError: the file is not as it was written.
        """
        path = self.path / "launch.json"
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            values |= {name: tuple(values[name]) for name in ("sites", "flower_runs")}
            return Plan(**values)
        except FileNotFoundError:
            return Plan()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StateError(f"{path}: cannot be read ({type(error).__name__}); launch the study again") from error

    def write_plan(self, plan: Plan) -> None:
        """Save ``plan``."""
        self._write("launch.json", json.dumps(asdict(plan), indent=1) + "\n")

    def note_submission(self, flower_run: int, at: float) -> None:
        """Remember that the SuperLink took the run, under this number, ``at`` seconds since 1970."""
        plan = self.plan()
        self.write_plan(replace(plan, submitted=at, flower_runs=(*plan.flower_runs, flower_run)))

    # -- stopping --------------------------------------------------------------------------------------

    def request_stop(self, when: When) -> None:
        """Ask the process that executes the run to stop: at once, or when the round under way is saved."""
        self._write("stop", when + "\n")

    def clear_stop(self) -> None:
        """Take the wish back."""
        (self.path / "stop").unlink(missing_ok=True)

    @property
    def stop_requested(self) -> When | None:
        """The wish to stop, or None."""
        try:
            return "now" if (self.path / "stop").read_text(encoding="ascii").strip() == "now" else "round"
        except OSError:
            return None

    def check(self) -> None:
        """Called often while sites are waited for.

        Raises:
            Stopped: somebody wants the run to stop now.
        """
        if self.stop_requested == "now":
            raise Stopped("now")

    def check_between(self) -> None:
        """Called between two rounds.

        Raises:
            Stopped: somebody wants the run to stop.
        """
        if when := self.stop_requested:
            raise Stopped(when)

    # -- who executes it -------------------------------------------------------------------------------

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the process that executes the run.

        Raises:
            StateError: another process does.
        """
        descriptor = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        text = f"{self.path}: another process executes this run"
                        raise StateError(f"{text}; fedneuro-server stop {self.name} ends it") from error
                    time.sleep(0.05)
            os.utime(descriptor)  # when it was begun
            yield
        finally:
            os.close(descriptor)

    @property
    def is_held(self) -> bool:
        """Whether a process executes the run now."""
        return is_locked(self.path / "run.lock")

    @property
    def begun(self) -> float:
        """When a process last began to execute it, in seconds since 1970; 0: none did."""
        with suppress(OSError):
            return (self.path / "run.lock").stat().st_mtime
        return 0.0

    def _write(self, name: str, text: str) -> None:
        part = self.path / f".{name}.{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        part.replace(self.path / name)


def run_folders(runs: Path) -> list[RunFolder]:
    """All runs below ``runs``, the latest launch last."""
    found = [RunFolder(path.parent) for path in runs.glob("*/launch.json")]
    return sorted(found, key=lambda folder: (_launched(folder), folder.name))


def find_run(runs: Path, name: str) -> RunFolder:
    """The run ``name``; ``last`` is the latest.

    Raises:
        BadInput: there is none of this name.
    """
    folders = run_folders(runs)
    if name == "last" and folders:
        return folders[-1]
    if found := [folder for folder in folders if folder.name == name]:
        return found[0]
    known = ", ".join(folder.name for folder in folders[-5:]) or "none yet: fedneuro-server launch STUDY"
    raise BadInput(f"there is no run {name[:96]!r}; runs: {known}")


def new_run(runs: Path, study: str) -> RunFolder:
    """A new, empty folder for a run of the study of this name: ``STUDY-1``, ``STUDY-2`` and so on."""
    if not _NAME.fullmatch(study):
        raise BadInput(f"{study[:96]!r} cannot name a run")
    runs.mkdir(mode=0o700, parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            (runs / f"{study}-{number}").mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            return RunFolder(runs / f"{study}-{number}")


def _launched(folder: RunFolder) -> float:
    with suppress(StateError):
        return folder.plan().launched
    return 0.0
