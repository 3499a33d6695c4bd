# SPDX-License-Identifier: Apache-2.0
"""The ServerApp itself over a Grid whose nodes answer from this process: signature, stop, log, resume, canary."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedneuro.models.state import digest
from fedneuro.privacy.contract import Request
from fedneuro.privacy.errors import QuorumLost
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import encode_reply
from fedneuro.privacy.wire_bytes import squeeze
from fedneuro.server.app import execute, read_study
from fedneuro.server.launch import canary_of
from fedneuro.server.run_folder import Plan, RunFolder, new_run
from fedneuro.server.run_view import view_run
from fedneuro.server.store import RunStore
from tests.server.test_flower_transport import Nodes
from tests.server.test_rounds import answer, study_of

SIGNATURE = bytes(range(64))


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, None)


class Hospitals(Nodes):
    """A, B and C; ``stop`` is called when B is asked to train in round 2 for the first time."""

    def __init__(self, names: tuple[str, ...] = ("A", "B", "C")) -> None:
        super().__init__({name: self.answerer(name) for name in names})
        self.signatures: set[bytes] = set()
        self.folder: RunFolder | None = None

    def answerer(self, name: str) -> Any:
        def reply(message: Message, request: Request) -> Message | None:
            self.signatures.add(request.signature)
            if self.folder is not None and (name, request.kind, request.round) == ("B", "train", 2):
                self.folder.request_stop("now")
                self.folder = None
                return None  # it never answers
            return Message(squeeze(encode_reply(answer(name, request))), reply_to=message)

        return reply


def launched(runs: Path, study: Study, **plan: Any) -> RunFolder:
    folder = new_run(runs, study.study.name)
    folder.study.write_bytes(study.canonical)
    folder.study.with_suffix(".sig").write_text(SIGNATURE.hex() + "\n")
    folder.write_plan(Plan(sites=("A", "B", "C"), **plan))
    return folder


def model_of(folder: RunFolder) -> str:
    return digest(RunStore.load(folder.path).groups(3)["model"])


def test_a_stop_ends_the_wait_for_a_hospital_and_a_resume_gives_the_same_bits(tmp_path: Path) -> None:
    study, grid = study_of(), Hospitals()
    folder = launched(tmp_path, study)
    grid.folder = folder
    execute(grid, folder.study, folder)  # type: ignore[arg-type]
    view = view_run(folder)
    assert (view.status, view.round, folder.stop_requested) == ("stopped", 2, None)
    assert view.message == "stopped at once, as asked; round 1 is saved"
    execute(grid, folder.study, folder)  # type: ignore[arg-type]
    other = launched(tmp_path, study)
    execute(Hospitals(), other.study, other)  # type: ignore[arg-type]
    assert view_run(folder).status == "complete" and model_of(folder) == model_of(other)
    assert grid.signatures == {SIGNATURE}


def test_a_hospital_that_is_not_online_is_named_and_logged(tmp_path: Path) -> None:
    folder = launched(tmp_path, study_of())
    with pytest.raises(QuorumLost, match=r"1 of 2 training sites answered when asked to join.*B: lost"):
        execute(Hospitals(("A", "C")), folder.study, folder)  # type: ignore[arg-type]
    assert "QuorumLost: 1 of 2 training sites" in (folder.path / "server.log").read_text()
    assert view_run(folder).who == "2 of 3 sites, B missing since the start"


def test_a_canary_runs_to_its_end(tmp_path: Path) -> None:
    folder = launched(tmp_path, canary_of(study_of(), 0.0), canary=True)
    execute(Hospitals(), folder.study, folder)  # type: ignore[arg-type]
    view = view_run(folder)
    assert (view.name, view.status, view.rounds, view.who) == ("t-canary-1", "complete", 1, "3 of 3 sites")
    assert read_study(folder.study).study.name == "t-canary"
