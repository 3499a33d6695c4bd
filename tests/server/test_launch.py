# SPDX-License-Identifier: Apache-2.0
"""A study over real processes as a coordinator types it: a ServerApp that is killed, a siege, and the same bits.

``fedneuro-server start`` behind its guard, two hospitals that enrolled, each with ``fedneuro-node start`` and a policy
that trusts the coordinator's key. What goes wrong besides is in ``test_app.py``, ``test_run_view.py`` and
``test_rounds_faults.py``, over transports of this process; ``fedneuro-sim bench chaos-run`` kills all of them in turn.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from fedneuro.client.enrolment import enrol
from fedneuro.client.node_init import Answers, init_node
from fedneuro.models.state import digest
from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import FedNeuroError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import load_study
from fedneuro.privacy.study_words import describe
from fedneuro.server import cli
from fedneuro.server.consortium import Consortium
from fedneuro.server.control import Control
from fedneuro.server.invitations import invite
from fedneuro.server.rounds import run_study
from fedneuro.server.run_folder import find_run
from fedneuro.server.run_view import RunView, view_run
from fedneuro.server.sealed_keys import Passphrase
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from fedneuro.simulations.engines.inprocess import InProcessTransport
from fedneuro.simulations.sites import find_sites, site_settings
from tests.bids import make_study
from tests.needs import need_nginx
from tests.server.conftest import PASSPHRASE, coordinator_up, free_ports
from tests.server.doors import post
from tests.server.siege import Siege, attack

pytestmark = pytest.mark.deployment

BIN = Path(sys.executable).parent
SITES = ("north", "south")
ENV = {**os.environ, "FEDNEURO_PASSPHRASE": PASSPHRASE}
ROUNDS = 8


def study_of(name: str, **strategy: object) -> Study:
    return make_study(
        study={"name": name},
        training={"rounds": ROUNDS, "local_steps": 2, "local_epochs": 0, "batch_size": 2, "device": "cpu"},
        evaluation={"every": 0, "bootstrap": 100, "previews": 0},
        strategy=strategy,
    )


@dataclass
class Deployment:
    """The coordinator, two hospitals, and what a person types."""

    consortium: Consortium
    server: "subprocess.Popen[str]"
    nodes: dict[str, "subprocess.Popen[bytes]"]
    base: Path

    def call(self, *words: str, rc: int = 0) -> str:
        """``fedneuro-server``; what it printed, and the error with which it ended."""
        command = [*words, "--config", str(self.consortium.folder)]
        done = CliRunner().invoke(cli.app, command, standalone_mode=False, env=ENV)
        code = done.exception.exit_code if isinstance(done.exception, FedNeuroError) else done.exit_code
        assert code == rc, f"{words}: {code} {done.exception!r}\n{done.output}"
        assert "\n" not in str(done.exception)
        return f"{done.output}\n{done.exception or ''}"

    def view(self, run: str) -> RunView:
        return view_run(find_run(self.consortium.folder / "runs", run))

    def runner(self) -> psutil.Process:
        children = psutil.Process(self.server.pid).children(recursive=True)
        return next(child for child in children if "fedneuro.server.runner:main" in " ".join(child.cmdline()))

    def write(self, study: Study) -> str:
        path = self.base / f"{study.study.name}.toml"
        path.write_text(describe(study))
        assert load_study(path).hash == study.hash
        return str(path)


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[[Path], Consortium]
) -> Iterator[Deployment]:
    need_nginx()
    base = tmp_path_factory.mktemp("deployment")
    consortium = make_consortium(base / "c")
    for seed, name in enumerate(SITES):
        write_tiny_site(base / "sites" / name, seed=seed)
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    with coordinator_up(consortium, "--no-dashboard") as server:
        try:
            for name, port in zip(SITES, free_ports(2), strict=True):
                nodes[name] = start_node(consortium, base, name, port)
            control = Control(f"127.0.0.1:{consortium.settings.ports.superlink}", consortium.folder / "ca" / "root.crt")
            with closing(control):
                wait_for("both hospitals online", lambda: control.online() >= set(SITES))
            yield Deployment(consortium, server, nodes, base)
        finally:
            for node in nodes.values():
                node.send_signal(signal.SIGTERM)
            for node in nodes.values():
                node.wait(30)


def start_node(consortium: Consortium, base: Path, name: str, port: int) -> "subprocess.Popen[bytes]":
    folder = base / "nodes" / name
    answers = Answers(name=name, role=Role.TRAIN, public_size=10, data=base / "sites" / name, port=port)
    init_node(folder, answers)
    policy = folder / "policy.toml"
    rule = f'\n[[studies.rules]]\ncoordinator = "{consortium.study_key}"\ntasks = ["segmentation"]\n'
    rule += f'datasets = ["{name}"]\nmodes = ["none"]\n'
    text = policy.read_text().replace("\n[grant]", f"{rule}\n[grant]")
    policy.write_text(text.replace('modes = ["local", "distributed"]', 'modes = ["none"]'))
    enrol(invite(consortium, name, Role.TRAIN, timedelta(hours=1))[0], folder / "node.toml")
    with (folder / "start.log").open("wb") as log:
        return subprocess.Popen([BIN / "fedneuro-node", "start", "--config", folder / "node.toml"], stderr=log)


def wait_for(what: str, done: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def undisturbed(study: Study, base: Path) -> str:
    """Digest of the model that the same study gives in one process."""
    out = base / f"simulated-{study.study.name}"
    settings = site_settings(study, find_sites(base / "sites"), out)
    store = RunStore.create(out, study, engine="inprocess")
    with closing(store), InProcessTransport(settings) as transport:
        run_study(study, transport, store, lambda _: None)
        return digest(store.groups(ROUNDS)["model"])


def test_a_killed_serverapp_goes_on_by_itself_to_the_same_bits(deployment: Deployment) -> None:
    study = study_of("killed")
    said = deployment.call("launch", deployment.write(study))
    assert said.count("joins") == 2 and "started, 2 of 2 sites, 8 rounds" in said
    runner = deployment.runner()
    wait_for("two rounds", lambda: len(deployment.view("killed-1").history) > 2)
    runner.kill()
    deployment.call("watch", "killed-1")  # it does not give up when the process dies
    view = deployment.view("killed-1")
    assert (view.status, view.selected_round, view.who) == ("complete", ROUNDS, "2 of 2 sites")
    assert_undisturbed(deployment, study, view)
    lines = deployment.call("logs", "killed-1").splitlines()
    assert sum("started: north, south train" in line for line in lines) == 2
    (taken_up,) = [line for line in lines if "the coordinator's process had died; the run goes on by itself" in line]
    reached = int(taken_up.partition("round ")[2].partition(":")[0])
    assert 1 <= reached < ROUNDS and f"rounds {reached + 1} to {ROUNDS}, goes on after round {reached}" in "".join(
        lines
    )
    assert "resumed" in {kind for _, _, kind, _, _ in deployment.consortium.registry.events()}


@pytest.mark.walk
def test_a_study_goes_on_while_everybody_attacks(
    deployment: Deployment, passphrase: Passphrase, tmp_path: Path
) -> None:
    """docs/threats.md, "The coordinator's doors": all that is refused there, during rounds that must not notice."""
    consortium, study = deployment.consortium, study_of("besieged")
    north = consortium.registry.site("north")
    assert north is not None
    victim = deployment.base / "nodes" / "north"
    siege = Siege(consortium, consortium.unlock(passphrase), tmp_path, victim, north.node_id)
    assert post(consortium, siege.mole, "activate-node") == 200, "it is a hospital as any other"
    guard = siege.guard()
    with siege:
        deployment.call("launch", deployment.write(study), "--site", "north", "--site", "south")
        assert attack(guard) == {}
        assert deployment.view("besieged-1").is_live
        assert attack(siege.enrolment()) == {}
        deployment.call("revoke", "mole")
        assert attack(siege.revoked()) == {}
        guard = {name: attacked for name, attacked in guard.items() if not siege.needs_mole(name)}
        while deployment.view("besieged-1").is_live:
            assert attack(guard) == {}
            time.sleep(0.2)
    view = deployment.view("besieged-1")
    assert view.status == "complete" and "attempt 2" not in deployment.call("logs", "besieged-1")
    assert_undisturbed(deployment, study, view)
    seen = (consortium.folder / "guard" / "access.log").read_text()
    assert all(f'"{name}" {verified}' in seen for name, verified in (("-", "NONE 400"), ("CN=north", "FAILED")))
    assert all(f'CN=mole" SUCCESS {code} POST' in seen for code in (401, 403, 413))
    kinds = {kind for _, _, kind, _, _ in consortium.registry.events()}
    assert {"locked-out", "revoked"} <= kinds
    assert "refused 127.0.0.1: the invitation is unknown" in (deployment.base / "c.start.log").read_text()


def test_what_hospitals_refuse_is_one_line_and_nothing_starts(deployment: Deployment) -> None:
    """A study whose privacy no site permits, and a site that is off; the second comes last, for it stays off."""
    private = study_of("private").model_dump(mode="json")
    private["privacy"] |= {"mode": "local", "epsilon": 1.0, "delta": 1e-2, "sample_rate": 0.5}
    said = deployment.call("launch", deployment.write(Study.parse(private)), "--wait", "1", rc=3)
    assert said.count("study-not-approved") >= 2 and "run private-1: " in said.splitlines()[-1]
    deployment.nodes["south"].send_signal(signal.SIGTERM)
    deployment.nodes["south"].wait(30)
    said = deployment.call("launch", deployment.write(study_of("lonely")), "--wait", "0", rc=4)
    assert "not online: south" in said and "run lonely-1: " in said.splitlines()[-1] and "lost" in said
    assert [deployment.view(run).round for run in ("private-1", "lonely-1")] == [0, 0]


def assert_undisturbed(deployment: Deployment, study: Study, view: RunView) -> None:
    """Every round once, everybody in it, and the model that the same study gives in one process."""
    with closing(RunStore.load(view.folder)) as store:
        assert [record.round for record in store.rounds()] == list(range(ROUNDS + 1))
        assert not any(record.refusals for record in store.rounds())
        assert digest(store.groups(ROUNDS)["model"]) == undisturbed(study, deployment.base)
