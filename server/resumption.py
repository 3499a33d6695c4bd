# SPDX-License-Identifier: Apache-2.0
"""Runs whose process died go on by themselves: after a crash, a power cut, or a ``start`` that was stopped.

A run is *interrupted* where its process ended without a word (:mod:`.run_view`). ``start`` submits it again,

    1. where that costs no patient anything: the study is without privacy, or all hospitals that were asked to train
       have answered and their round is saved (``runs.resume = "free"``, the default)
    2. also where a round under way is asked again, for which hospitals charge their ledgers once more, if the
       coordinator says so (``runs.resume = "all"``, or ``start --resume-private``)
    3. never with ``runs.resume = "none"``

and says which it did: an event ``resumed`` in the run, a note of the consortium else. A run that somebody stopped, or
that ended with an error, is left alone; so is one that died three times without finishing a round.
"""

import logging
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic
from typing import Protocol

import httpx

from ..privacy.errors import FedNeuroError, StateError
from .consortium_settings import Resume
from .events import Event
from .launch import refuse_older
from .run_folder import RunFolder, run_folders
from .run_view import RunFollower
from .store import RunStore

__all__ = ["Link", "Resumption", "charged_again", "note_stop"]

LOOK_SECONDS = 2.0
MOST = 3
"""Times that a run is taken up again without a round that it finishes in between."""
_log = logging.getLogger("fedneuro.start")


def charged_again(folder: RunFolder) -> tuple[int, tuple[str, ...]]:
    """The round that going on asks again, and the hospitals whose ledgers it may charge a second time.

    Returns:
        The round and the names, which are none where nothing is charged twice, as in a study without privacy.

    Raises:
        StateError: the run cannot be read.
    """
    with closing(RunStore.load(folder.path)) as store:
        rounds, sites, privacy = store.rounds(), store.sites(), store.study.privacy
        number = rounds[-1].round if rounds else 0
        if privacy.mode == "none" or store.status == "complete":
            return number, ()
        asked = [event.round for _, event in store.events() if event.kind == "round-started"]
        if asked and asked[-1] > number:
            return asked[-1], tuple(name for name, site in sites.items() if site.role == "train")
        noised = privacy.metrics == "noise" and bool(sites)
        return number, tuple(sites) if noised else ()


def note_stop(folder: RunFolder) -> None:
    """Let an interrupted run count as stopped, so that nothing takes it up again.

    Raises:
        StateError: nothing was saved of it.
    """
    with closing(RunStore.load(folder.path)) as store:
        rounds = store.rounds()
        store.record(Event(kind="stopped", round=rounds[-1].round if rounds else 0, values={"when": "now"}))


class Link(Protocol):
    """What is asked of the SuperLink (:class:`~fedneuro.server.control.Control`)."""

    def is_healthy(self) -> bool:
        """Whether it answers."""
        ...

    def is_over(self, flower_run: int) -> bool:
        """Whether no process will execute this submission any more."""
        ...


class Resumption:
    """What ``start`` does about interrupted runs.

    Args:
        runs: the consortium's runs.
        which: see the module's text.
        link: the SuperLink.
        submit: hands a run to it.
        note: writes an event of the consortium: its kind, and text.
    """

    def __init__(
        self,
        runs: Path,
        which: Resume,
        link: Link,
        submit: Callable[[RunFolder], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._runs, self._which, self._link, self._submit, self._note = runs, which, link, submit, note
        self._seen: dict[str, tuple[float, float]] = {}
        self._unsaved: dict[str, int] = {}
        self._next = 0.0

    def look(self) -> None:
        """Look after all runs, at most every two seconds; what did not change since then costs two ``stat`` calls."""
        if self._which == "none" or monotonic() < self._next:
            return
        self._next = monotonic() + LOOK_SECONDS
        for folder in run_folders(self._runs):
            if folder.is_held or self._seen.get(folder.name) == (mark := _mark(folder)):
                continue
            try:
                if self._is_settled(folder):
                    self._seen[folder.name] = mark
            except (FedNeuroError, httpx.HTTPError) as error:
                _log.warning("run %s is not resumed now: %s", folder.name, error)

    def _is_settled(self, folder: RunFolder) -> bool:
        """Take it up where that is due; whether there is nothing more to do until it is submitted or begun again."""
        view = RunFollower(folder).look()
        plan = view.plan
        if view.is_live and view.status != "queued":
            return False
        if view.status not in ("queued", "interrupted") or view.stopping or plan.canary or not plan.flower_runs:
            return True
        if not self._link.is_healthy():
            return False
        if view.status == "queued" and not self._link.is_over(plan.flower_runs[-1]):
            return False  # its turn comes; its process may also have died before it wrote a word
        try:
            refuse_older(folder)
        except StateError as error:
            self._leave(folder, str(error))
            return True
        number, tries = 0, self._unsaved.get(folder.name, 0)
        again: tuple[str, ...] = ()
        with suppress(StateError):  # it died before anything was saved
            number, again = charged_again(folder)
            tries = _tries(folder)
        command = f"fedneuro-server resume {folder.name}"
        if again and self._which != "all":
            text = f"going on asks for round {number} again, and charges {', '.join(again)}; {command} does it"
            self._leave(folder, text)
            return True
        if tries >= MOST:
            self._leave(folder, f"its process died {tries + 1} times in the same round; see its logs; {command}")
            return True
        with suppress(StateError), closing(RunStore.load(folder.path)) as store:
            store.record(Event(kind="resumed", round=number, values={"again": list(again)}))
        self._unsaved[folder.name] = tries + 1
        self._submit(folder)
        _log.warning("run %s was interrupted and goes on", folder.name)
        self._note("resumed", folder.name)
        return False

    def _leave(self, folder: RunFolder, why: str) -> None:
        _log.warning("run %s was interrupted and is not resumed: %s", folder.name, why)
        self._note("not-resumed", f"{folder.name}: {why}")


def _tries(folder: RunFolder) -> int:
    """How often it was taken up since it last finished a round."""
    count = 0
    with closing(RunStore.load(folder.path)) as store:
        for _, event in store.events():
            count = 0 if event.kind == "round-done" else count + (event.kind == "resumed")
    return count


def _mark(folder: RunFolder) -> tuple[float, float]:
    """Changes when the run is submitted, or begun."""
    with suppress(OSError):
        return (folder.path / "launch.json").stat().st_mtime, folder.begun
    return 0.0, 0.0
