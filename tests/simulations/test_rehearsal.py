# SPDX-License-Identifier: Apache-2.0
"""A rehearsal is a real deployment: equal to the in-process engine to the bit, and it cleans up after itself."""

import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedneuro.models.state import digest
from fedneuro.privacy.errors import EnvironmentProblem, QuorumLost
from fedneuro.privacy.study import Study
from fedneuro.server.events import Event, ignore
from fedneuro.server.rounds import run_study
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from fedneuro.simulations.engines.inprocess import InProcessTransport
from fedneuro.simulations.rehearsal import rehearse
from fedneuro.simulations.sites import find_sites, site_settings
from tests.bids import make_study

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for seed, name in enumerate(("north", "south")):
        write_tiny_site(folder / name, seed=seed)
    return folder


def study_of(rounds: int, **sections: object) -> Study:
    training = {"rounds": rounds, "local_steps": 2, "batch_size": 2, "threads": 1, "device": "cpu", "local_epochs": 0}
    evaluation = {"every": 0, "bootstrap": 100, "previews": 0}
    return make_study(**{"training": training, "evaluation": evaluation, "data": {"augment": "light"}, **sections})


def run(engine: str, study: Study, sites: Path, out: Path, observer: Callable[[Event], None] = ignore) -> RunStore:
    settings = site_settings(study, find_sites(sites), out)
    store = RunStore.create(out, study, engine=engine)
    if engine == "deployment":
        rehearse(study, settings, store, observer)
    else:
        with InProcessTransport(settings) as transport:
            run_study(study, transport, store, observer)
    return store


def model_of(store: RunStore) -> str:
    final = store.final()
    assert final is not None
    assert all(record.refusals == {} for record in store.rounds())
    return digest(store.groups(final["selected_round"])["model"])


def left_over(out: Path) -> list[str]:
    """Processes whose command or environment names the run's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(out) in " ".join([*process.cmdline(), *process.environ().values()]):
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found


@pytest.mark.walk
def test_a_deployment_gives_the_bits_of_the_in_process_engine(sites: Path, tmp_path: Path) -> None:
    study = study_of(3)
    events: list[Event] = []
    deployed = run("deployment", study, sites, tmp_path / "deployed", events.append)
    assert left_over(tmp_path) == []
    simulated = run("inprocess", study, sites, tmp_path / "simulated")
    assert model_of(deployed) == model_of(simulated)
    assert deployed.final() == simulated.final()
    kinds = [event.kind for event in events]
    assert kinds[:3] == ["joined", "joined", "started"]
    assert kinds[-1] == "finished"
    assert kinds.count("trained") == 6
    folder = tmp_path / "deployed" / "deployment"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    private = [p for p in folder.rglob("*") if p.suffix in (".key", ".secret")]
    assert len(private) == 6  # the server's key, each node's, and three shared secrets
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in private)
    assert "Traceback" not in "".join(p.read_text() for p in folder.glob("logs/*.log"))


def test_killed_nodes_are_named_and_the_study_goes_on_while_enough_answer(sites: Path, tmp_path: Path) -> None:
    """One SuperNode is killed: one site goes on. Then the other site's runner is killed: the quorum is lost."""
    study = study_of(500, strategy={"min_sites": 1})
    events: list[Event] = []

    def observe(event: Event) -> None:
        events.append(event)
        if event.kind == "round-done" and event.round == 1:
            kill("supernode-north")
        if event.kind == "round-done" and event.values["sites"] == 1:
            kill("runner-south")

    def kill(name: str) -> None:
        for child in psutil.Process().children():
            if name in child.cmdline():
                child.kill()

    with pytest.raises(QuorumLost) as error:
        run("deployment", study, sites, tmp_path / "out", observe)
    assert left_over(tmp_path) == []
    text = str(error.value)
    assert "\n" not in text
    assert "north: its SuperNode was ended by SIGKILL" in text
    assert "south: its runner was ended by SIGKILL" in text
    named = {e.site: e.values["during"] for e in events if e.kind == "refused" and "SIGKILL" in e.values["during"]}
    assert set(named) == {"north", "south"}
    alone = [e for e in events if e.kind == "round-done" and e.values["sites"] == 1]
    assert alone  # the study went on without the first
    store = RunStore.load(tmp_path / "out")
    assert store.status == "running"  # resumable
    assert store.rounds()[-1].round >= alone[0].round


def test_a_port_in_use_is_named_before_anything_starts(sites: Path, tmp_path: Path) -> None:
    study = study_of(1)
    settings = site_settings(study, find_sites(sites), tmp_path / "out")
    store = RunStore.create(tmp_path / "out", study, engine="deployment")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=rf"port {port} of 127\.0\.0\.1 is in use"):
            rehearse(study, settings, store, port=port)
    assert left_over(tmp_path) == []


def test_ctrl_c_ends_everything(sites: Path, tmp_path: Path) -> None:
    study = study_of(500)
    out = tmp_path / "out"

    def observe(event: Event) -> None:
        if event.kind == "round-started":  # the hospitals train now
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("deployment", study, sites, out, observe)
    assert left_over(tmp_path) == []
    assert RunStore.load(out).status == "running"  # resumable
