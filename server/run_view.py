# SPDX-License-Identifier: Apache-2.0
"""Runs as they stand on disk, read only: for ``runs``, ``watch``, the dashboard, also after a crash.

:func:`list_runs` gives all runs of a consortium, :func:`view_run` one; :class:`RunFollower` and
:class:`RunsFollower` are for those who look again and again: they read only the events that are new. A view is what
:meth:`RunView.as_json` says, nothing live hangs on it. Whether a run is executed now is known from the kernel's lock
(:mod:`.run_folder`), not from a process's promise, so a run whose process was killed shows as ``interrupted`` at once.
"""

from collections.abc import Iterator
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..privacy.errors import StateError
from ..privacy.study import Study
from .events import Event
from .run_folder import Plan, RunFolder, run_folders
from .run_words import attendance, sentence
from .saved_study import read_saved
from .store import RunStore

__all__ = [
    "RoundView",
    "RunFollower",
    "RunView",
    "RunsFollower",
    "SiteView",
    "Status",
    "list_runs",
    "read_events",
    "view_run",
]

Status = Literal["queued", "asking", "running", "waiting", "stopped", "failed", "interrupted", "complete"]
"""queued: submitted, no process executes it yet; asking: hospitals are asked whether they join; waiting: for hospitals
that are lost; interrupted: its process ended without a word (``resume`` goes on)."""
_BEFORE = frozenset({"joined", "failed", "stopped", "resumed"})
"""Events after which a process that executes the run is asking hospitals to join."""
LIVE: frozenset[Status] = frozenset({"queued", "asking", "running", "waiting"})


@dataclass(slots=True, kw_only=True)
class SiteView:
    """One hospital in one run.

    ``state``: asked, joined, training, trained, evaluated, refused. ``reason``: code of its last refusal while that
    holds. ``missing_since``: round, 0 before the first, or None; it may evaluate all the same. ``attempt`` above 1:
    its ledger was charged for that round before. ``intervals``: 95 %, by metric; none in runs of older versions.
    ``at``: seconds since 1970 when it was last heard of.
    """

    name: str
    role: str = ""
    public_size: int = 0
    state: str = "asked"
    reason: str = ""
    during: str = ""
    missing_since: int | None = None
    missing_reason: str = ""
    loss: float | None = None
    epsilon: float | None = None
    attempt: int = 1
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    at: float = 0.0


@dataclass(slots=True, kw_only=True)
class RoundView:
    """One round, as far as it went; values by site."""

    round: int
    seconds: float | None = None
    answered: int = 0
    asked: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class RunView:
    """One run. Times are seconds since 1970; ``round`` is the one under way or the last; ``message`` why it failed.

    ``study`` is None, and the fields taken from it empty, where the study's file cannot be read.
    """

    name: str
    folder: Path
    status: Status
    study: Study | None
    plan: Plan
    round: int = 0
    rounds: int = 0
    sites: dict[str, SiteView] = field(default_factory=dict)
    history: dict[int, RoundView] = field(default_factory=dict)
    selected_round: int | None = None
    message: str = ""
    error: str = ""
    stopping: str = ""
    updated: float = 0.0
    events: int = 0

    @property
    def is_live(self) -> bool:
        """Whether it is executed, or will be."""
        return self.status in LIVE

    @property
    def who(self) -> str:
        """Who takes part, such as "4 of 5 sites, HT missing since round 7"."""
        missing = {name: site.missing_since for name, site in self.sites.items() if site.missing_since is not None}
        return attendance(len(self.sites) - len(missing), len(self.sites), missing)

    def as_json(self) -> dict[str, Any]:
        """JSON values, without the study's text."""
        values = {name: getattr(self, name) for name in ("name", "status", "round", "rounds", "selected_round")}
        values |= {name: getattr(self, name) for name in ("message", "error", "stopping", "updated", "events", "who")}
        study = self.study
        values["study"] = {"name": study.study.name, "hash": study.hash, "mode": study.privacy.mode} if study else None
        values["plan"] = asdict(self.plan)
        values["folder"] = str(self.folder)
        values["sites"] = [asdict(site) for _, site in sorted(self.sites.items())]
        values["history"] = [asdict(entry) for _, entry in sorted(self.history.items())]
        return values


class RunFollower:
    """Looks at one run again and again."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._view = RunView(name=folder.name, folder=folder.path, status="queued", study=None, plan=Plan())
        self._last: Event | None = None
        self.new: list[Event] = []

    def look(self) -> RunView:
        """The run as it is now; :attr:`new` holds the events since the last look."""
        view = self._view
        if view.study is None:
            view.study = _study(self.folder)
            view.rounds = view.study.training.rounds if view.study else 0
        held = self.folder.is_held  # before the events: what ends now is seen as ended at the next look
        with suppress(StateError):
            view.plan = self.folder.plan()
        if not view.sites:
            view.sites = {name: SiteView(name=name) for name in view.plan.sites}
        self.new = []
        for number, event in read_events(self.folder, view.events):
            view.events, view.updated = number, event.at
            self.new.append(event)
            self._last = event
            _fold(view, event)
        view.stopping = self.folder.stop_requested or ""
        view.status = self._status(held=held)
        return replace(view, sites=deepcopy(view.sites), history=deepcopy(view.history))

    def _status(self, *, held: bool) -> Status:
        last, view = self._last, self._view
        if last and last.kind == "finished":
            return "complete"
        if held:
            if last is None or last.kind in _BEFORE or last.values.get("during") == "hello":
                return "asking"
            return "waiting" if last.kind == "waiting" else "running"
        submitted = view.plan.submitted
        if submitted > max(self.folder.begun, view.updated):
            return "queued"
        if last and last.kind in ("failed", "stopped"):
            return "failed" if last.kind == "failed" else "stopped"
        return "interrupted"


class RunsFollower:
    """Looks at all runs again and again; a page that shows them keeps one of these."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._followers: dict[str, RunFollower] = {}

    def look(self) -> list[RunView]:
        """All runs as they are now, the latest launch last."""
        folders = run_folders(self._runs)
        self._followers = {f.name: self._followers.get(f.name) or RunFollower(f) for f in folders}
        return [self._followers[folder.name].look() for folder in folders]


def view_run(folder: RunFolder) -> RunView:
    """The run in ``folder`` as it is now."""
    return RunFollower(folder).look()


def list_runs(runs: Path) -> list[RunView]:
    """All runs below ``runs``, the latest launch last."""
    return RunsFollower(runs).look()


def read_events(folder: RunFolder, after: int = 0) -> Iterator[tuple[int, Event]]:
    """Events with a number above ``after``; none where the run has not begun."""
    if not (folder.path / "state" / "run.db").is_file():
        return
    try:
        store = RunStore.load(folder.path)
    except StateError:  # it is being made at this moment
        return
    with closing(store):
        yield from store.events(after)


def _study(folder: RunFolder) -> Study | None:
    from hashlib import sha256

    try:
        content = folder.study.read_bytes()
        return read_saved(content, sha256(content).hexdigest())[0]
    except (OSError, StateError):
        return None


def _fold(view: RunView, event: Event) -> None:
    """Take one event into the view."""
    if event.kind in ("failed", "stopped"):
        view.message, view.error = sentence(event), str(event.values.get("error", ""))
    elif event.kind not in ("refused", "waiting"):
        view.message = view.error = ""
    if event.kind == "started":
        view.round, view.rounds = event.round, event.values["rounds"]
    elif event.kind == "round-started":
        view.round = event.round
        view.history = {number: entry for number, entry in view.history.items() if number < event.round}
        for site in view.sites.values():
            if site.role == "train":
                site.state, site.reason, site.during = "training", "", ""
    elif event.kind == "round-done":
        entry = _round(view, event.round)
        entry.seconds, entry.answered = event.values["seconds"], event.values["sites"]
        entry.asked = event.values["asked"]
    elif event.kind == "fell-back":
        view.history = {number: entry for number, entry in view.history.items() if number <= event.round}
    elif event.kind == "finished":
        view.selected_round = event.values["selected_round"]
    if event.site:
        _fold_site(view, event)


def _fold_site(view: RunView, event: Event) -> None:
    values, site = event.values, view.sites.setdefault(event.site, SiteView(name=event.site))
    site.at = event.at
    if event.kind == "refused":
        site.state, site.reason, site.during = "refused", values["reason"], values["during"]
        hello = values["during"] == "hello"
        if not hello:
            _round(view, event.round).refusals[site.name] = site.reason
        if site.missing_since is None and (values["during"] != "evaluate" or site.role == "heldout"):
            site.missing_since = view.round + 1 if hello and view.round else event.round
        if site.missing_since is not None:
            site.missing_reason = site.reason
        return
    site.reason, site.during = "", ""
    if event.kind == "joined":
        site.state, site.role, site.public_size = "joined", values["role"], values["public_size"]
        site.missing_since = None
    elif event.kind == "trained":
        site.state, site.loss, site.attempt = "trained", values["loss"], values.get("attempt", 1)
        site.missing_since = None
        entry = _round(view, event.round)
        entry.refusals.pop(site.name, None)
        if site.loss is not None:
            entry.loss[site.name] = site.loss
        if values["epsilon"] is not None:
            site.epsilon = entry.epsilon[site.name] = values["epsilon"]
    elif event.kind == "evaluated":
        site.state, site.metrics = "evaluated", dict(values["metrics"])
        site.intervals = {name: (low, high) for name, (low, high) in values.get("intervals", {}).items()}
        if site.role == "heldout":
            site.missing_since = None
        if not values.get("final"):
            _round(view, event.round).metrics[site.name] = site.metrics


def _round(view: RunView, number: int) -> RoundView:
    return view.history.setdefault(number, RoundView(round=number))
