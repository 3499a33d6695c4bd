# SPDX-License-Identifier: Apache-2.0
"""Runs as they stand on disk, and what launch refuses before anything is sent."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedneuro.models.state import save_arrays
from fedneuro.privacy.contract import Refusal, Reply, Request, Role
from fedneuro.privacy.errors import (
    BadInput,
    EnvironmentProblem,
    FedNeuroError,
    QuorumLost,
    Reason,
    Refused,
    StateError,
    StudyError,
)
from fedneuro.privacy.signing import verify_study
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_words import describe
from fedneuro.server import cli
from fedneuro.server.app import conduct_of, open_store, read_study
from fedneuro.server.conduct import Conduct
from fedneuro.server.consortium import Consortium
from fedneuro.server.events import Event
from fedneuro.server.launch import Launch, canary_of, choose_sites, failure, read_initial
from fedneuro.server.registry import SiteRecord
from fedneuro.server.rounds import initial_arrays, run_study
from fedneuro.server.run_folder import Plan, RunFolder, Stopped, find_run, new_run
from fedneuro.server.run_view import RunFollower, list_runs, read_events, view_run
from fedneuro.server.scores import heldout_scores
from fedneuro.server.sealed_keys import Passphrase
from fedneuro.server.store import RunStore
from fedneuro.server.watch import answers_table, render, runs_table
from tests.server.test_rounds import Sites, refuse, study_of

KNOWN = ("A", "B", "C")


def launched(runs: Path, study: Study, *, submitted: bool = True) -> RunFolder:
    """A run's folder as launch leaves it."""
    folder = new_run(runs, study.study.name)
    folder.study.write_bytes(study.canonical)
    now = time.time()
    folder.write_plan(Plan(sites=KNOWN, launched=now, submitted=now if submitted else 0.0))
    return folder


def execute(folder: RunFolder, sites: Sites, look: Callable[[Event], None] = lambda _: None) -> None:
    """What the ServerApp does, over another transport."""
    study = read_study(folder.study)
    with folder.hold(), closing(open_store(folder, study)) as store:
        run_study(study, sites, store, look, conduct_of(folder))


def text_of(renderable: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# -- views -------------------------------------------------------------------------------------------------


def test_a_run_from_its_launch_to_its_end(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of(strategy={"min_sites": 1}))
    assert view_run(folder).status == "queued"
    seen: dict[str, str] = {}
    follower = RunFollower(folder)

    def look(event: Event) -> None:
        if event.kind not in seen:
            seen[event.kind] = follower.look().status

    execute(folder, Sites(refuse("B", Reason.TIMEOUT, since=2)), look)
    assert seen["joined"] == "asking" and seen["trained"] == seen["round-done"] == "running"
    view = view_run(folder)
    assert (view.status, view.round, view.rounds, view.selected_round) == ("complete", 3, 3, 3)
    assert view.who == "2 of 3 sites, B missing since round 2"
    assert {name: site.role for name, site in view.sites.items()} == {"A": "train", "B": "train", "C": "heldout"}
    assert [(r.round, r.answered, r.refusals) for r in view.history.values() if r.round] == [
        (1, 2, {}), (2, 1, {"B": "timeout"}), (3, 1, {"B": "timeout"}),
    ]  # fmt: skip
    assert view.history[1].loss == {"A": 1.0, "B": 1.0} and view.history[3].metrics["C"] == {"dice": 0.5}
    assert json.loads(json.dumps(view.as_json()))["sites"][1]["missing_since"] == 2
    assert view.sites["C"].intervals == {"dice": (0.5, 0.5)}
    judged = "C Dice 0.50 (0.50–0.50), no privacy promise"
    assert [str(score) for score in heldout_scores(view, view.study)] == [judged] and judged in text_of(
        runs_table([view])
    )
    assert re.search(r"C +heldout +evaluated +Dice 0.50 +0.50–0.50 +no privacy promise", text_of(render(view)))
    assert any(line.startswith("hospital ") for line in text_of(render(view)).splitlines()), "below the bar, not in it"
    assert "timeout, missing since round 2" in text_of(render(view)) and "complete" in text_of(runs_table([view]))
    assert follower.look() == view and follower.new == []  # only what is new is read
    assert [abs(event.at - time.time()) < 60 for _, event in read_events(folder)].count(False) == 0


def test_a_killed_run_is_seen_at_once_and_a_resumed_one_waits_its_turn(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())

    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if event.kind == "trained" and event.round == 2:
            raise Killed

    with pytest.raises(Killed):
        execute(folder, Sites(), kill)
    view = view_run(folder)
    assert (view.status, view.round) == ("interrupted", 2)
    error = failure(view)
    assert isinstance(error, EnvironmentProblem) and "fedneuro-server resume t-1 tries again" in str(error)
    folder.note_submission(17, time.time())
    assert view_run(folder).status == "queued" and folder.plan().flower_runs == (17,)
    execute(folder, Sites())
    assert view_run(folder).status == "complete"


def test_a_lost_quorum_names_everybody(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())
    with pytest.raises(QuorumLost):
        execute(folder, Sites(refuse("B", Reason.DATA_INVALID, kind="hello", since=0)))
    view = view_run(folder)
    assert view.status == "failed" and view.who == "2 of 3 sites, B missing since the start"
    error = failure(view)
    assert isinstance(error, QuorumLost) and error.exit_code == 4 and "\n" not in str(error)
    assert "1 of 2 training sites answered when asked to join, 2 are needed: B: data-invalid" in str(error)
    table = text_of(answers_table(view))
    assert "A train joins 10 patients declared B refuses data-invalid: the hospital's data set" in " ".join(
        table.split()
    )
    execute(folder, Sites())  # the hospital mended its data, and the run was resumed
    view = view_run(folder)
    assert (view.status, view.message, view.who) == ("complete", "", "3 of 3 sites")


def test_a_study_that_no_policy_allows(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())

    def nobody(site: str, request: Request) -> Reply:
        return Refusal(site=site, kind=request.kind, round=request.round, reason=Reason.STUDY_NOT_APPROVED)

    with pytest.raises(Refused):
        execute(folder, Sites(nobody))
    error = failure(view_run(folder))
    assert error.exit_code == 3 and "they approve it with fedneuro-node approve" in str(error)
    assert "has not answered" not in text_of(answers_table(view_run(folder)))


def test_a_stopped_run(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())

    def look(event: Event) -> None:
        if event.kind == "round-done" and event.round == 1:
            folder.request_stop("round")
            assert "stops after this round" in text_of(render(view_run(folder)))

    with pytest.raises(Stopped):
        execute(folder, Sites(), look)
    with closing(RunStore.load(folder.path)) as store:
        store.record(Event(kind="stopped", round=1, values={"when": "round"}))
    view = view_run(folder)
    assert view.status == "stopped" and view.message == "stopped between two rounds, as asked; round 1 is saved"


def test_runs_in_the_order_of_their_launch(tmp_path: Path) -> None:
    first, second = launched(tmp_path, study_of()), launched(tmp_path, study_of())
    assert [view.name for view in list_runs(tmp_path)] == ["t-1", "t-2"]
    assert find_run(tmp_path, "last").name == second.name and find_run(tmp_path, "t-1").name == first.name
    with pytest.raises(BadInput, match=r"there is no run '\.\./x'; runs: t-1, t-2"):
        find_run(tmp_path, "../x")
    (second.path / "launch.json").write_text("{")
    assert [view.name for view in list_runs(tmp_path)] == ["t-2", "t-1"]  # spoiled, but not forgotten


# -- launching ---------------------------------------------------------------------------------------------


def enrolled(*roles: str, state: str = "enrolled") -> list[SiteRecord]:
    names = dict(zip("ABCDE", roles, strict=False))
    return [
        SiteRecord(name=name, role=Role(role), state=state, node_key="", node_id=1, expires=0)  # type: ignore[arg-type]
        for name, role in names.items()
    ]


def test_who_is_asked() -> None:
    study = study_of()  # holds C out
    known = enrolled("train", "train", "heldout", "heldout", "train")
    assert choose_sites(study, known) == ("A", "B", "C", "E")  # D judges other studies
    assert choose_sites(study, known, ["A", "C"]) == ("A", "C")


@pytest.mark.parametrize(
    ("known", "only", "says"),
    [
        ([], (), "no hospital is enrolled yet; invite one"),
        (enrolled("train", state="invited"), (), "no hospital is enrolled yet"),
        (enrolled("train", "train"), (), "evaluation.heldout names C; enrolled are A, B"),
        (enrolled("train", "train", "train"), (), "evaluation.heldout names C, enrolled to train"),
        (enrolled("train", "train", "heldout"), ("A", "X", "C"), "--site names X; enrolled are"),
        (enrolled("train", "train", "heldout"), ("A",), "evaluation.heldout names C, --site does not"),
        (enrolled("train", "heldout", "heldout"), ("A", "B", "C"), "--site names B, enrolled as heldout"),
        (enrolled("heldout", "heldout", "heldout"), (), "no hospital is left to train"),
    ],
)
def test_whom_launch_cannot_ask(known: list[SiteRecord], only: tuple[str, ...], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        choose_sites(study_of(), known, only)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"privacy": {"mode": "local", "epsilon": 8.0}},
        {"privacy": {"mode": "distributed", "delta": 1e-3}},
        {"strategy": {"name": "fedprox"}, "training": {"local_steps": 4}},
        {"study": {"name": "x" * 64}},
    ],
    ids=["plain", "local", "distributed", "fedprox", "long name"],
)
def test_a_canary_is_one_step_of_another_study(sections: Mapping[str, dict[str, object]]) -> None:
    study = study_of(**sections)
    canary = canary_of(study, 0.0)
    assert canary_of(study, 1.0).hash != canary.hash  # hospitals answer a round of a study once
    assert canary.hash != study.hash and canary.study.name.endswith("-canary")
    assert (canary.training.rounds, canary.training.local_steps) == (1, 2 if "strategy" in sections else 1)
    assert canary.privacy.mode == study.privacy.mode and canary.privacy.epsilon == 0.1
    assert (canary.model, canary.data, canary.evaluation.heldout) == (study.model, study.data, study.evaluation.heldout)


def test_what_lies_in_the_folder_of_a_launch(
    tmp_path: Path, make_consortium: Callable[[Path], Consortium], passphrase: Passphrase
) -> None:
    study, consortium = study_of(), make_consortium(tmp_path / "c")
    launch = Launch(consortium=consortium, study=study, sites=KNOWN, wait=7.0)
    folder = launch.prepare(passphrase)
    assert read_study(folder.study).hash == study.hash
    signature = bytes.fromhex(folder.study.with_suffix(".sig").read_text())
    verify_study(study, signature, consortium.study_key)
    assert folder.path.stat().st_mode & 0o077 == 0 and folder.name == "t-1"
    conduct = conduct_of(folder)
    assert (conduct.sites, conduct.wait, conduct.patience, conduct.hello) == (KNOWN, 7.0, 600.0, 600.0)
    assert conduct_of(RunFolder(tmp_path)).patience == Conduct().patience == 0  # a rehearsal has no plan
    small = launch.prepare(passphrase, canary_of(study, time.time()))
    assert small.name == "t-canary-1" and small.plan().canary and not folder.plan().canary
    execute(folder, Sites())
    with pytest.raises(StateError, match=r"was trained before, as run t-1 \(complete\).*change study.seed"):
        launch.prepare(passphrase)


def test_a_start_is_given_with_the_launch(tmp_path: Path) -> None:
    plain, study = study_of(), study_of(training={"init": {"from": "phantoms"}})
    path = tmp_path / "start.safetensors"
    save_arrays(path, initial_arrays(plain)["model"], {})
    assert read_initial(plain, None) is None and read_initial(study, path) == path.read_bytes()
    with pytest.raises(StudyError, match=r"give its file: --initial FILE"):
        read_initial(study, None)
    with pytest.raises(StudyError, match="name a source in the study, or leave it out"):
        read_initial(plain, path)
    other = study_of(training={"init": {"from": "checkpoint", "sha256": "0" * 64}})
    with pytest.raises(StudyError, match="the study names 000000000000"):
        read_initial(other, path)
    folder = launched(tmp_path / "runs", study)
    folder.initial.write_bytes(path.read_bytes())
    execute(folder, Sites())
    assert view_run(folder).status == "complete"


@pytest.fixture
def call(
    tmp_path: Path, make_consortium: Callable[[Path], Consortium], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., FedNeuroError | str]:
    """``fedneuro-server``; what it printed, or the error with which it ended."""
    consortium = make_consortium(tmp_path / "c")
    (tmp_path / "study.toml").write_text(describe(study_of(evaluation={"heldout": []})))
    monkeypatch.setenv("FEDNEURO_PASSPHRASE", "issuing passphrase")

    def run(*words: str) -> FedNeuroError | str:
        words = (*(word.format(tmp=tmp_path) for word in words), "--config", str(consortium.folder))
        done = CliRunner().invoke(cli.app, words, standalone_mode=False)
        if isinstance(done.exception, FedNeuroError):
            assert "\n" not in str(done.exception)
            return done.exception
        assert done.exception is None, done.exception
        return done.stdout

    return run


def test_what_commands_refuse(call: Callable[..., FedNeuroError | str], tmp_path: Path) -> None:
    def refused(code: int, says: str, *words: str) -> None:
        error = call(*words)
        assert isinstance(error, FedNeuroError) and error.exit_code == code and says in str(error)

    refused(2, "no such study file", "launch", "{tmp}/absent.toml")
    refused(2, "no hospital is enrolled yet", "launch", "{tmp}/study.toml")
    refused(2, "there is no run 'x'; runs: none yet", "watch", "x")
    refused(2, "there is no run 'last'", "stop")
    folder = launched(tmp_path / "c" / "runs", study_of(), submitted=False)
    refused(2, "is not under way: it is interrupted", "stop")
    refused(5, "consortium test is not running; run fedneuro-server start --config", "resume", "t-1")
    execute(folder, Sites())
    refused(2, "run t-1 is complete", "resume")
    listing = call("runs", "--json")
    assert isinstance(listing, str) and json.loads(listing)[0]["status"] == "complete"
    lines = call("logs")
    assert isinstance(lines, str) and lines.splitlines()[-1].endswith("finished: round 3 was selected")
    assert json.loads(str(call("logs", "--json")).splitlines()[0])["kind"] == "joined"
    assert json.loads(str(call("watch", "--json")))["status"] == "complete" and "complete" in str(call("watch"))
    assert str(call("logs", "--server")) == "nothing yet"
    assert os.listdir(tmp_path / "c" / "runs") == ["t-1"]  # noqa: PTH208 - what was refused leaves nothing behind
