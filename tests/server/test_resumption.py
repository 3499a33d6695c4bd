# SPDX-License-Identifier: Apache-2.0
"""Which interrupted runs ``start`` takes up again, and what it says about the others.

The runs are real, made by the rounds over a transport of this process that dies in the middle; ``test_launch.py`` kills
the real process.
"""

from contextlib import closing
from pathlib import Path

import pytest

from fedneuro.privacy.contract import Reply, Request, TrainReply
from fedneuro.privacy.study import Study
from fedneuro.server import resumption
from fedneuro.server.consortium_settings import Resume
from fedneuro.server.events import Event
from fedneuro.server.resumption import MOST, Resumption, charged_again, note_stop
from fedneuro.server.run_folder import RunFolder
from fedneuro.server.run_view import RunFollower, read_events, view_run
from fedneuro.server.run_words import sentence
from fedneuro.server.store import RunStore
from tests.server.test_rounds import Sites, answer, study_of
from tests.server.test_run_view import execute, launched
from tests.server.test_saved_study import age


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Link:
    """A SuperLink: which submissions are over, and whether it answers."""

    def __init__(self) -> None:
        self.healthy, self.over = True, set[int]()

    def is_healthy(self) -> bool:
        return self.healthy

    def is_over(self, flower_run: int) -> bool:
        return flower_run in self.over


class Start:
    """What ``start`` does, without its processes."""

    def __init__(self, runs: Path, which: Resume = "free") -> None:
        self.link, self.submitted, self.notes = Link(), list[str](), list[str]()
        self._resumption = Resumption(
            runs, which, self.link, self._submit, lambda *note: self.notes.append(": ".join(note))
        )

    def _submit(self, folder: RunFolder) -> None:
        self.submitted.append(folder.name)
        submit(folder)

    def look(self) -> list[str]:
        """One look; the runs that it submitted."""
        self.submitted.clear()
        self._resumption._next = 0.0
        self._resumption.look()
        return list(self.submitted)


def submit(folder: RunFolder) -> None:
    import time

    folder.note_submission(len(folder.plan().flower_runs) + 1, time.time())


def private(site: str, request: Request) -> Reply:
    reply = answer(site, request)
    if isinstance(reply, TrainReply):
        return TrainReply(
            site=site, round=reply.round, arrays=reply.arrays, steps=1, seconds=0.0, epsilon=1.0, noise_multiplier=1.0
        )
    return reply


def interrupted(runs: Path, study: Study, kind: str, number: int = 2) -> RunFolder:
    """A run whose process died at the first event of this kind in this round."""
    folder = launched(runs, study, submitted=False)
    submit(folder)
    die(folder, kind, number)
    return folder


def die(folder: RunFolder, kind: str, number: int) -> None:
    def look(event: Event) -> None:
        if event.kind == kind and event.round == number:
            raise Killed

    mode = view_run(folder).study
    assert mode is not None
    with pytest.raises(Killed):
        execute(folder, Sites(private if mode.privacy.mode == "local" else answer), look)
    assert view_run(folder).status == "interrupted"


PRIVATE = {"mode": "local", "epsilon": 4.0, "delta": 1e-2}


def test_a_run_without_privacy_goes_on_and_says_so(tmp_path: Path) -> None:
    folder, start = interrupted(tmp_path, study_of(), "trained"), Start(tmp_path)
    start.link.healthy = False
    assert start.look() == [], "the SuperLink is on its way up"
    start.link.healthy = True
    assert start.look() == [folder.name] and view_run(folder).status == "queued"
    assert start.look() == [] and start.notes == [f"resumed: {folder.name}"]
    execute(folder, Sites())
    assert view_run(folder).status == "complete" and start.look() == []
    (said,) = (sentence(event) for _, event in read_events(folder) if event.kind == "resumed")
    assert said == "round 1: the coordinator's process had died; the run goes on by itself"


@pytest.mark.parametrize(
    ("kind", "charged"),
    [("round-started", ("A", "B")), ("trained", ("A", "B")), ("evaluated", ()), ("round-done", ())],
)
def test_a_private_run_goes_on_where_no_ledger_is_charged_twice(
    tmp_path: Path, kind: str, charged: tuple[str, ...]
) -> None:
    """Until a round is saved every training hospital may have paid for it; afterwards nobody is asked to pay again."""
    folder, start = interrupted(tmp_path, study_of(privacy=PRIVATE), kind), Start(tmp_path)
    assert charged_again(folder) == (2, charged)
    assert start.look() == ([] if charged else [folder.name])
    if charged:
        assert start.notes == [
            f"not-resumed: {folder.name}: going on asks for round 2 again, and charges A, B; "
            f"fedneuro-server resume {folder.name} does it"
        ]
        assert start.look() == [] and len(start.notes) == 1, "said once"
        allowed = Start(tmp_path, "all")
        assert allowed.look() == [folder.name]
        (event,) = (event for _, event in read_events(folder) if event.kind == "resumed")
        assert event.values["again"] == ["A", "B"] and "A, B may charge their ledgers" in sentence(event)


@pytest.mark.parametrize("how", ["none", "stopped", "stop wished", "failed", "canary", "never submitted", "older"])
def test_what_is_left_alone(tmp_path: Path, how: str) -> None:
    from dataclasses import replace

    folder = interrupted(tmp_path, study_of(), "trained")
    if how == "stopped":
        note_stop(folder)
        assert view_run(folder).status == "stopped"
    elif how == "stop wished":
        folder.request_stop("round")
    elif how == "failed":
        with closing(RunStore.load(folder.path)) as store:
            store.record(Event(kind="failed", values={"error": "QuorumLost", "message": "x"}))
    elif how in ("canary", "never submitted"):
        keys = {"canary": True} if how == "canary" else {"flower_runs": (), "submitted": 0.0}
        folder.write_plan(replace(folder.plan(), **keys))
    elif how == "older":
        age(folder)
    start = Start(tmp_path, "none" if how == "none" else "all")
    assert start.look() == [] and start.look() == []
    said = [note.partition("by another version")[1] for note in start.notes]
    assert said == (["by another version"] if how == "older" else [])


def test_a_run_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    folder, start = interrupted(tmp_path, study_of(), "trained"), Start(tmp_path)
    for _ in range(MOST):
        assert start.look() == [folder.name]
        die(folder, "trained", 2)
    assert start.look() == [] and "died 4 times in the same round" in start.notes[-1]
    submit(folder)  # by hand
    die(folder, "trained", 3)  # a round further
    assert start.look() == [folder.name]


def test_a_process_that_died_before_its_first_word_is_noticed(tmp_path: Path) -> None:
    """It had taken the run from the SuperLink, which knows that nobody executes it any more."""
    folder = launched(tmp_path, study_of(), submitted=False)
    submit(folder)
    start = Start(tmp_path)
    assert view_run(folder).status == "queued" and start.look() == []
    start.link.over.add(1)
    assert start.look() == [folder.name] and folder.plan().flower_runs == (1, 2)
    assert start.look() == []


def test_looking_costs_nothing_where_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(tmp_path, study_of(privacy=PRIVATE), "trained")
    start = Start(tmp_path)
    start.look()
    seen: list[RunFolder] = []

    def follow(found: RunFolder) -> RunFollower:
        seen.append(found)
        return RunFollower(found)

    monkeypatch.setattr(resumption, "RunFollower", follow)
    assert start.look() == [] and seen == []
    submit(folder)
    start.look()
    assert len(seen) == 1
