# SPDX-License-Identifier: Apache-2.0
"""What a dashboard shows: a consortium with its runs, a folder of runs, or one run, read from disk as it is now.

Nothing here changes anything. Each run is followed by one :class:`~fedneuro.server.run_view.RunFollower`, which reads
only events that are new, and a run whose files did not change is not read at all, so many browsers that look every
second cost little more than one.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...privacy.errors import BadInput, FedNeuroError, StateError
from ...privacy.study import Study
from ..consortium import Consortium
from ..events import Event
from ..run_folder import Plan, RunFolder, run_folders
from ..run_view import RunFollower, RunView
from ..store import RoundRecord, RunStore
from .nodes import Nodes

if TYPE_CHECKING:
    from ..control import NodeState

__all__ = ["Home", "Shown"]

LOOK_SECONDS = 0.5
"""A live run is read so often even where no file seems to have changed."""
QUIET_SECONDS = 600.0
"""A simulation holds no lock: after so long without an event it counts as interrupted."""
RECENT = 200
"""Events of a run that its page can show; all are on the page of events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One run as it is now.

    ``study`` is None where it cannot be read; ``events`` are the latest, newest first; ``records`` the rounds that are
    saved, with their intervals.
    """

    folder: RunFolder
    view: RunView
    study: Study | None
    events: tuple[Event, ...] = ()
    records: tuple[RoundRecord, ...] = ()


class Home:
    """The folder that is shown.

    Args:
        folder: of a consortium (``server.toml``), of a run (``state/run.db``), or one that holds runs.

    Raises:
        BadInput: it is none of these.
        Refused: a consortium's folder can be read by others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.consortium = Consortium(self.folder) if (self.folder / "server.toml").is_file() else None
        self._nodes = Nodes(self.consortium) if self.consortium else None
        self._watches: dict[tuple[str, int], _Watch] = {}
        self._lock = threading.Lock()
        if self.consortium is None and not self.folders():
            text = "is neither a consortium (server.toml) nor a run (state/run.db), nor a folder of runs"
            raise BadInput(f"{folder}: {text}; give the folder that init --out or the run's --out named")

    @property
    def name(self) -> str:
        """What it is called."""
        return self.consortium.name if self.consortium else self.folder.name

    @property
    def only_run(self) -> RunFolder | None:
        """The run, where the folder is one run's."""
        return RunFolder(self.folder) if self.consortium is None and _is_run(self.folder) else None

    def folders(self) -> list[RunFolder]:
        """All runs, the latest launch last."""
        if self.consortium:
            return run_folders(self.consortium.folder / "runs")
        if _is_run(self.folder):
            return [RunFolder(self.folder)]
        with suppress(OSError):
            return [RunFolder(path) for path in sorted(self.folder.iterdir()) if _is_run(path)]
        return []

    def runs(self) -> list[Shown]:
        """All runs as they are now, the latest first."""
        return [self._watch(folder).look() for folder in reversed(self.folders())]

    def run(self, name: str) -> Shown:
        """One run as it is now, with its saved rounds.

        Raises:
            BadInput: there is none of this name.
        """
        return self._watch(self.find(name)).look(records=True)

    def find(self, name: str) -> RunFolder:
        """A run's folder; the name is compared, never joined to a path.

        Raises:
            BadInput: there is none of this name.
        """
        for folder in self.folders():
            if folder.name == name:
                return folder
        raise BadInput(f"there is no run {name[:96]!r}")

    def warm(self) -> None:
        """Read everything once, so that the first page is as fast as the others, and a fault shows at the start."""
        if self.consortium:
            self.consortium.registry.sites()
            self.nodes()
        for folder in self.folders():
            self._watch(folder).look()

    def nodes(self, patience: float = 0.0) -> "Mapping[str, NodeState] | None":
        """Who is online; None where that is not known. ``patience``: seconds to wait for the first answer."""
        return self._nodes.now(patience) if self._nodes else None

    @property
    def is_down(self) -> bool:
        """Whether ``start`` was looked for, and does not run."""
        return self._nodes is not None and self._nodes.is_asked and self.nodes() is None

    def close(self) -> None:
        """End what looks in the background."""
        if self._nodes:
            self._nodes.close()
        if self.consortium:
            self.consortium.registry.close()

    def _watch(self, folder: RunFolder) -> "_Watch":
        key = (folder.name, _inode(folder))  # a run that was started anew has a new state
        with self._lock:
            if key not in self._watches:
                stale = [known for known in self._watches if known[0] == folder.name]
                for known in stale:
                    del self._watches[known]
                self._watches[key] = _Watch(folder)
            return self._watches[key]


@dataclass(slots=True)
class _Watch:
    """Follows one run for everybody who looks."""

    folder: RunFolder
    follower: RunFollower = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    recent: deque[Event] = field(default_factory=lambda: deque(maxlen=RECENT))
    shown: Shown | None = None
    looked: float = 0.0
    stamp: tuple[int, ...] = ()
    read_at: int = -1

    def __post_init__(self) -> None:
        self.follower = RunFollower(self.folder)

    def look(self, *, records: bool = False) -> Shown:
        """The run now; with its saved rounds on request."""
        with self.lock:
            now, stamp = time.monotonic(), _stamp(self.folder)
            rested = self.shown is not None and (not self.shown.view.is_live or now - self.looked < LOOK_SECONDS)
            if self.shown is None or not rested or stamp != self.stamp:
                self.shown, self.looked, self.stamp = self._look(), now, stamp
            if records and self.read_at != self.shown.view.events:
                self.shown = self._with_records(self.shown)
            return self.shown

    def _look(self) -> Shown:
        try:
            view = self.follower.look()
        except FedNeuroError as error:  # of another version, or spoiled: the others must be seen all the same
            name, path = self.folder.name, self.folder.path
            view = RunView(name=name, folder=path, status="interrupted", study=None, plan=Plan(), message=str(error))
            return Shown(folder=self.folder, view=view, study=None)
        self.recent.extendleft(self.follower.new)
        before = self.shown
        simulation = not view.plan.launched and not self.folder.begun
        if view.status == "interrupted" and simulation and time.time() - view.updated < QUIET_SECONDS:
            view = replace(view, status="running")
        study = view.study or (before.study if before else None) or _stored_study(self.folder)
        if study and not view.rounds:
            view.rounds = study.training.rounds
        kept = before.records if before else ()
        return Shown(folder=self.folder, view=view, study=study, events=tuple(self.recent), records=kept)

    def _with_records(self, shown: Shown) -> Shown:
        try:
            with closing(RunStore.load(self.folder.path)) as store:
                records = tuple(store.rounds())
        except FedNeuroError:  # no state yet, or it cannot be read: what was seen last stays
            records = shown.records
        self.read_at = shown.view.events
        return Shown(folder=self.folder, view=shown.view, study=shown.study, events=shown.events, records=records)


def _is_run(path: Path) -> bool:
    return (path / "state" / "run.db").is_file() or (path / "launch.json").is_file()


def _inode(folder: RunFolder) -> int:
    with suppress(OSError):
        return (folder.path / "state" / "run.db").stat().st_ino
    return 0


def _stamp(folder: RunFolder) -> tuple[int, ...]:
    """Changes whenever a file does that a view is made of."""
    found: list[int] = []
    for name in ("state/run.db", "state/run.db-wal", "launch.json", "run.lock", "stop"):
        try:
            status = (folder.path / name).stat()
            found += [status.st_mtime_ns, status.st_size]
        except OSError:
            found.append(-1)
    return (*found, int(folder.is_held))


def _stored_study(folder: RunFolder) -> Study | None:
    """Of a simulation, which has no ``study.json``."""
    with suppress(StateError, FedNeuroError), closing(RunStore.load(folder.path)) as store:
        return store.study
    return None
