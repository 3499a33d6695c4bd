# SPDX-License-Identifier: Apache-2.0
"""Reads runs from disk and hands what is new to the sinks."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

from ...privacy.errors import EnvironmentProblem, FedNeuroError
from ...privacy.study import Study
from ..run_folder import RunFolder
from ..run_view import RoundView, RunFollower, RunView, SiteView
from ..store import RunStore

__all__ = ["FILES", "Feed", "Sink", "final_values", "need_packages", "open_sinks", "round_values"]

FILES: Final = ("report.html", "results.json", "manifest.json")
"""What a finished run hands over, where it is there."""
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
_log = logging.getLogger("fedneuro.sinks")


class Sink(Protocol):
    """Where runs are shown. A method may raise anything: it is called again later with the same."""

    name: str

    def begin(self, view: RunView, study: Study) -> int:
        """A run is there, new or known from before; returns the last round that needs no sending."""
        ...

    def round(self, run: str, number: int, values: Mapping[str, float]) -> None:
        """Values of a round that is done; more of the same round may come later."""

    def end(self, view: RunView, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """The run is no longer under way; it may go on later."""

    def close(self) -> None:
        """Nothing more comes."""


@dataclass(slots=True)
class _Fed:
    """What one sink has of one run; ``known``: the last round that it had before this process."""

    known: int
    sent: dict[int, dict[str, float]] = field(default_factory=dict)
    ended: str = ""


class Feed:
    """Follows runs for some sinks.

    Args:
        sinks: where to.
        folders: gives the runs as they are now.
    """

    def __init__(self, sinks: Sequence[Sink], folders: Callable[[], Sequence[RunFolder]]) -> None:
        self._sinks, self._folders = sinks, folders
        self._followers: dict[str, RunFollower] = {}
        self._fed: dict[tuple[str, str], _Fed] = {}
        self._pauses: dict[str, tuple[float, float]] = {}

    def look(self) -> None:
        """Hand over what is new; a sink that fails is left alone for a while, and gets it then."""
        views = self._views()
        for sink in self._sinks:
            again, pause = self._pauses.get(sink.name, (0.0, FIRST_PAUSE))
            if time.monotonic() < again:
                continue
            try:
                for view, study in views:
                    self.hand(sink, view, study)
            except Exception as error:  # whatever a foreign library raises: a sink must never end the others
                self._pauses[sink.name] = time.monotonic() + pause, min(LONGEST_PAUSE, 2 * pause)
                _log.warning("%s: %s: %s; again in %.0f s", sink.name, type(error).__name__, _line(error), pause)
            else:
                self._pauses.pop(sink.name, None)

    def hand_all(self, sink: Sink) -> int:
        """Hand everything to one sink, whatever it raises; returns the number of runs."""
        views = self._views()
        for view, study in views:
            self.hand(sink, view, study)
        return len(views)

    def hand(self, sink: Sink, view: RunView, study: Study) -> None:
        """Hand what is new of one run to one sink; raises what the sink raises."""
        fed = self._fed.get((sink.name, view.name))
        if fed is None:
            fed = self._fed[sink.name, view.name] = _Fed(sink.begin(view, study))
        for number, entry in sorted(view.history.items()):
            if entry.seconds is None and number:
                continue  # it is under way
            values, before = round_values(view, entry), fed.sent.get(number, {})
            if new := {name: value for name, value in values.items() if before.get(name) != value}:
                if number > fed.known or before:
                    sink.round(view.name, number, new)
                fed.sent[number] = values
        ended = "" if view.is_live else view.status
        if ended != fed.ended:
            if ended:
                files = [view.folder / name for name in FILES if (view.folder / name).is_file()]
                sink.end(view, final_values(view) if ended == "complete" else {}, files)
            else:
                sink.begin(view, study)
            fed.ended = ended

    def _views(self) -> list[tuple[RunView, Study]]:
        found = []
        for folder in self._folders():
            follower = self._followers.setdefault(folder.name, RunFollower(folder))
            try:
                view = follower.look()
                study = view.study or _stored(folder)
            except FedNeuroError as error:  # of another version, or spoiled
                _log.debug("%s: %s", folder.name, error)
                continue
            if study is not None and view.round:
                found.append((view, study))
        return found


def round_values(view: RunView, entry: RoundView) -> dict[str, float]:
    """What is known of one round, by the names of :mod:`fedneuro.server.sinks`."""
    found: dict[str, float] = {}
    for site, metrics in entry.metrics.items():
        found |= {f"{_part(view.sites.get(site))}/{site}/{name}": value for name, value in metrics.items()}
    found |= {f"loss/{site}": value for site, value in entry.loss.items()}
    found |= {f"privacy/{site}/epsilon": value for site, value in entry.epsilon.items()}
    if entry.seconds is not None:
        found |= {"round/seconds": entry.seconds, "round/sites": float(entry.answered)}
    return dict(sorted(found.items()))


def final_values(view: RunView) -> dict[str, float]:
    """The final evaluation, and which round it is of."""
    found = {
        f"final/{_part(site)}/{site.name}/{name}": value
        for site in view.sites.values()
        for name, value in site.metrics.items()
    }
    if view.selected_round is not None:
        found["final/selected_round"] = float(view.selected_round)
    return dict(sorted(found.items()))


def open_sinks(mlflow: str, tensorboard: str, home: Path) -> list[Sink]:
    """The sinks that are wanted.

    Args:
        mlflow: address of a tracking server, or a folder; empty: none.
        tensorboard: folder; empty: none.
        home: folder that others are relative to.

    Raises:
        EnvironmentProblem: a package is missing.
    """
    need_packages(mlflow, tensorboard)
    found: list[Sink] = []
    if mlflow:
        from .mlflow import MlflowSink

        found.append(MlflowSink(mlflow if "://" in mlflow else str(home / mlflow)))
    if tensorboard:
        from .tensorboard import TensorboardSink

        found.append(TensorboardSink(home / tensorboard))
    return found


def need_packages(mlflow: str, tensorboard: str) -> None:
    """Look for the packages that the wanted sinks need, without loading them.

    Raises:
        EnvironmentProblem: one is missing.
    """
    for key, wanted, package in (("mlflow", mlflow, "mlflow-skinny"), ("tensorboard", tensorboard, "tensorboardX")):
        if wanted and find_spec(package.partition("-")[0]) is None:
            raise missing(key, package)


def missing(key: str, package: str) -> EnvironmentProblem:
    """What to say where a package is not installed."""
    return EnvironmentProblem(f"sinks.{key} needs the package {package}: pip install 'fedneuro[sinks]'")


def _part(site: SiteView | None) -> str:
    return "heldout" if site is not None and site.role == "heldout" else "train"


def _stored(folder: RunFolder) -> Study | None:
    """Of a simulation, which has no ``study.json``."""
    if not (folder.path / "state" / "run.db").is_file():
        return None
    with closing(RunStore.load(folder.path)) as store:
        return store.study


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
