# SPDX-License-Identifier: Apache-2.0
"""The process that trains: its walls, its bits, and every way in which it can end. Real processes, real kernel."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from fedneuro.client.network_layout import count
from fedneuro.client.run_folder import RunFolder
from fedneuro.client.sandbox import probe
from fedneuro.client.sandboxed_site import SandboxedSite
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.client.training_child import Caps, TrainingChild
from fedneuro.models.state import digest
from fedneuro.privacy.contract import Arrays, Refusal, Request, Role, TrainReply
from fedneuro.privacy.errors import Reason, Refused
from fedneuro.privacy.study import Study
from fedneuro.server.rounds import initial_arrays
from tests.bids import make_study, write_site

KILLS = int(os.environ.get("FEDNEURO_CHAOS", "3"))
"""How often the process that trains is killed at a random moment; 100 for the record."""


def settings_of(folder: Path, name: str = "state") -> SiteSettings:
    return SiteSettings(
        name="north", data=folder / "bids", state=folder / name, role=Role.TRAIN, public_size=10, cache=folder / "cache"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospital")
    write_site(folder / "bids", shape=(18, 18, 4))
    return folder


@pytest.fixture
def child(folder: Path, tmp_path: Path) -> Iterator[TrainingChild]:
    hold = RunFolder(tmp_path)
    hold.make()
    child = TrainingChild(
        replace(settings_of(folder), state=tmp_path / "state"),
        Caps(),
        tmp_path / "scratch",
        lambda: "paused" if hold.paused else "",
    )
    yield child
    child.close()


def study_of(steps: int, name: str = "toy") -> Study:
    training = {"local_steps": steps, "local_epochs": 0, "batch_size": 2, "threads": 1, "device": "cpu", "rounds": 9}
    return make_study(
        study={"name": name}, training=training, evaluation={"bootstrap": 100, "previews": 0}, data={"augment": "light"}
    )


def model_of(study: Study) -> Arrays:
    return initial_arrays(study)["model"]


def train(site: Site, study: Study, number: int = 1) -> object:
    return site.handle(Request(kind="train", study=study, round=number, arrays=model_of(study)))


AS_NOBODY = """
import ctypes, json, os, sys
from dataclasses import asdict
from pathlib import Path
from fedneuro.client import sandbox
import encodings.ascii, encodings.idna  # nobody may not read root's Python
os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, as after execve: else /proc/self is root's
print(json.dumps(asdict(sandbox._try_to_escape(Path(sys.argv[1]), Path(sys.argv[2])))))
"""


def test_the_walls_hold_against_a_process_that_tries(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "state").mkdir()
    walls = probe(tmp_path / "state", tmp_path / "data")
    if not walls.complete and "kernel forbids" in walls.why:
        pytest.skip(f"no sandbox on this machine: {walls.why}")
    assert walls.complete, walls
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_an_ordinary_user_needs_no_root_for_them() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        for path in (folder, folder / "state", folder / "data"):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        command = [sys.executable, "-c", AS_NOBODY, str(folder / "state"), str(folder / "data")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr
        walls = json.loads(done.stdout)
        if "kernel forbids" in walls["why"]:
            pytest.skip(f"no sandbox for ordinary users on this machine: {walls['why']}")
        assert walls == {"network": True, "files": True, "why": ""}


INSIDE = """
import json, socket, sys
from pathlib import Path
from fedneuro.client import sandbox
run, state = Path(sys.argv[1]), Path(sys.argv[2])
sandbox._SERVICES = run
walls = sandbox.enter([state], readable=[run / "share" / "scans"], kept=[state / "log", state / "absent"])
reached = []
for name in ("docker.sock", "user/bus"):
    with socket.socket(socket.AF_UNIX) as door:
        if door.connect_ex(str(run / name)) == 0:
            reached.append(name)
read = [(run / name).read_text() for name in ("share/scans/a", "media/b", "pid")]
(state / "new").write_text("x")
for how in ("a", "w"):
    try:
        (state / "log").open(how).close()
        reached.append("log")
    except OSError:
        pass
print(json.dumps([walls.complete, walls.why, reached, read]))
"""


def test_no_service_of_the_machine_is_reached_from_within(tmp_path: Path) -> None:
    run, state = tmp_path / "run", tmp_path / "state"
    for folder in (run / "user", run / "share" / "scans", run / "media", state):
        folder.mkdir(parents=True)
    for name in ("share/scans/a", "media/b", "pid"):
        (run / name).write_text(name)
    (state / "log").write_text("kept")
    with ExitStack() as open_doors:
        for name in ("docker.sock", "user/bus"):
            door = open_doors.enter_context(socket.socket(socket.AF_UNIX))
            door.bind(str(run / name))
            door.listen()
        command = [sys.executable, "-c", INSIDE, str(run), str(state)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    complete, why, reached, read = json.loads(done.stdout)
    if "kernel forbids" in why:
        pytest.skip(f"no sandbox on this machine: {why}")
    assert (complete, why, reached) == (True, "", [])
    assert read == ["share/scans/a", "media/b", "pid"]
    assert (state / "log").read_text() == "kept" and (state / "new").read_text() == "x"


def test_a_missing_wall_refuses_where_walls_are_required(folder: Path, tmp_path: Path) -> None:
    settings = replace(settings_of(folder), state=tmp_path)
    child = TrainingChild(settings, Caps(isolate=False, require_walls=True), tmp_path / "scratch")
    with pytest.raises(Refused, match="isolation"):
        child.start()
    assert child.pid is None


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_child_that_answers_just_as_it_is_held_goes_on(tmp_path: Path) -> None:
    """Else status would say that it holds, and the next pause would not stop it: it is taken for stopped already."""
    child = TrainingChild(settings_of(tmp_path), Caps(), tmp_path, lambda: "paused")
    with subprocess.Popen(["sleep", "60"]) as process:
        child._process = process
        answered = threading.Event()
        watch = threading.Thread(target=child._watch, args=(answered, []))
        watch.start()
        wait_for(lambda: child.held == "paused" and state_of(process.pid) == "T")
        answered.set()
        watch.join()
        wait_for(lambda: state_of(process.pid) != "T")
        assert child.held == ""
        process.kill()


def test_the_childs_bits_its_pause_and_all_its_ends(folder: Path, child: TrainingChild, tmp_path: Path) -> None:
    """One child after another, since each loads torch: the same bits as one process, held, killed, capped."""
    study = study_of(3)
    site = SandboxedSite(child)
    network = (study.model.model_dump_json(), 1, 2)
    child.start()
    assert child.count(*network) == count(*network), "the gate may ask it what a network holds"
    here = train(Site(settings_of(folder, "here")), study)
    there = train(site, study)
    assert isinstance(here, TrainReply) and isinstance(there, TrainReply)
    assert digest(here.arrays) == digest(there.arrays) and here.loss == there.loss
    assert child.count(*network) is None, "but not once it serves a study"
    first = child.pid

    # held in the middle of a step, for longer than its time, and continued: the bits do not change, nor does it end
    long = study_of(200)
    free = train(Site(settings_of(folder, "free")), long)
    child._study = long.hash  # the same process: only its memory would tell, and this test is of another thing
    pause = RunFolder(tmp_path)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(train(site, long)))
    thread.start()
    time.sleep(0.2)
    pause.pause("test")
    wait_for(lambda: state_of(first) == "T", 2.0)
    assert child.held == "paused"
    time.sleep(0.5)
    assert state_of(first) == "T" and answers == []
    pause.resume()
    thread.join(60)
    assert isinstance(free, TrainReply) and isinstance(answers[0], TrainReply)
    assert digest(free.arrays) == digest(answers[0].arrays) and child.pid == first

    # killed in the middle of a step: a reason code; the next request is answered by another child
    endless = study_of(100_000)
    for number in range(KILLS if KILLS > 3 else 1):
        child._study = endless.hash
        answers.clear()
        thread = threading.Thread(target=lambda: answers.append(train(site, endless)))
        thread.start()
        time.sleep(0.3 + 0.01 * number)
        wait_for(lambda: child.pid is not None)
        os.kill(child.pid or 0, signal.SIGKILL)
        thread.join(60)
        assert isinstance(answers[0], Refusal) and answers[0].reason is Reason.OUT_OF_MEMORY
        assert child.pid is None
    # capped in time, then in memory, both while the new child still loads torch
    child._caps = Caps(seconds=0.4)
    slow = train(site, endless)
    assert isinstance(slow, Refusal) and slow.reason is Reason.OVER_TIME
    child._caps = Caps(memory=50 * 2**20)
    big = train(site, endless)
    assert isinstance(big, Refusal) and big.reason is Reason.OUT_OF_MEMORY
    child._caps = Caps()
    again = train(site, study, 2)
    second = child.pid
    assert isinstance(again, TrainReply) and second not in (None, first)
    assert child.crashes >= 3
    # another study is another process: this one is ended before it has loaded anything
    started: list[int | None] = []
    child._changed = lambda: started.append(child.pid)
    child._caps = Caps(seconds=0.2)
    assert isinstance(train(site, study_of(3, "other")), Refusal)
    assert [pid for pid in started if pid not in (None, second)]
