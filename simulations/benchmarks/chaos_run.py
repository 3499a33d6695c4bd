# SPDX-License-Identifier: Apache-2.0
"""A coordinator whose processes are killed at random moments of a study, and which must end with the same bits.

A whole consortium on this machine: ``fedneuro-server start`` behind its guard, two hospitals that enrolled, each with
``fedneuro-node start``. Each trial launches a study of ten rounds without noise and, at a random moment of it, ends
with kill -9 one of

    server      the process that executes the run
    superlink   Flower, with all messages under way
    guard       the link: for a moment no hospital reaches the coordinator
    supernode, runner    of a random hospital
    start       the coordinator as a whole, as by a power cut; it is started again, as its service would

What must hold, since all come back: the run completes without anybody's help; its last model is that of the same study
in one process, to the bit; every round is there once; the event log says why a round took longer, who was asked again,
and that the run was taken up again; at the end no process of all this is left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from ...client.enrolment import enrol
from ...client.node_init import Answers, init_node
from ...models.state import digest
from ...privacy.contract import Role
from ...privacy.errors import EnvironmentProblem, StateError
from ...privacy.identity import write_private
from ...privacy.study import Study
from ...server.consortium import ROOT_KEY, Consortium, create_consortium
from ...server.consortium_settings import ServerSettings
from ...server.events import ignore
from ...server.invitations import invite
from ...server.launch import Launch, online, submit
from ...server.rounds import run_study
from ...server.run_view import RunView, read_events, view_run
from ...server.sealed_keys import Passphrase
from ...server.store import RunStore
from ..engines.inprocess import InProcessTransport
from ..processes import claim_port
from ..sites import find_sites, site_settings
from .rounds import write_tiny_site

__all__ = ["VICTIMS", "bench_chaos_run"]

VICTIMS = ("server", "superlink", "guard", "supernode", "runner", "start")
HOSPITALS = ("north", "south")
ROUNDS = 10
PATIENCE_SECONDS = 300.0
"""For one trial; a killed SuperNode counts as online for up to a minute."""
RESTART_SECONDS = 2.0
_ENTRIES = {
    "server": "fedneuro.server.runner:main", "superlink": "fedneuro.server.superlink:main", "guard": "nginx: master",
    "supernode": "fedneuro.client.supernode:main", "runner": "fedneuro.client.cli:main",
}  # fmt: skip


def bench_chaos_run(
    json_path: Path | None = None, *, kills: int = 10, seed: int = 0, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run the trials; returns (and saves) what happened.

    Args:
        json_path: where to save.
        kills: trials; the victims take turns.
        seed: of moments and hospitals.
        tell: takes a line per trial.
    """
    dice, trials = random.Random(seed), []  # noqa: S311 - moments and victims, nothing secret
    with tempfile.TemporaryDirectory(prefix="fn-chaos-") as folder:
        with _consortium(Path(folder)) as everything:
            for number in range(kills):
                victim = VICTIMS[number % len(VICTIMS)]
                trial = _trial(everything, victim, number, dice)
                trials.append(trial)
                tell(json.dumps(trial))
        orphans = _left_over(folder)
    found = {
        "kills": kills,
        "same_bits": sum(trial["same_bits"] for trial in trials),
        "whole_histories": sum(trial["rounds_once"] for trial in trials),
        "explained": sum(trial["explained"] for trial in trials),
        "taken_up_again": sum(trial["resumed"] for trial in trials),
        "resumed_by_hand": sum(trial["by_hand"] for trial in trials),
        "median_seconds": median(trial["seconds"] for trial in trials),
        "longest_seconds": max(trial["seconds"] for trial in trials),
        "orphans": orphans,
        "trials": trials,
    }
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _study(number: int) -> Study:
    return Study.parse(
        {
            "study": {"name": f"chaos-{number}", "seed": number},
            "data": {"patch": [16, 16], "augment": "light"},
            "model": {"channels": [4, 8], "residual_units": 0},
            "training": {"rounds": ROUNDS, "local_steps": 2, "batch_size": 2, "device": "cpu"},
            "privacy": {"mode": "none"},
            "evaluation": {"every": 1, "bootstrap": 100, "previews": 0, "metrics": ["dice"]},
        }
    )


def _trial(everything: "_Everything", victim: str, number: int, dice: random.Random) -> dict[str, Any]:
    study, consortium = _study(number), everything.consortium
    launch = Launch(consortium=consortium, study=study, sites=HOSPITALS, wait=120.0, patience=PATIENCE_SECONDS)
    folder = launch.prepare(everything.passphrase)
    submit(consortium, folder)
    at = dice.randint(1, ROUNDS)
    _wait(f"round {at} begins", lambda: view_run(folder).round >= at or view_run(folder).status == "complete")
    time.sleep(dice.uniform(0.0, 0.8))  # rounds take about as long, also where the machine has other work
    before, started, by_hand = view_run(folder), time.monotonic(), 0
    killed = everything.kill(victim, dice)
    while (view := view_run(folder)).status != "complete" and time.monotonic() - started < PATIENCE_SECONDS:
        everything.keep()
        if view.status in ("failed", "stopped"):
            with suppress(EnvironmentProblem, StateError):  # the SuperLink is on its way up
                submit(consortium, folder)
                by_hand += 1
        time.sleep(0.25)
    with closing(RunStore.load(folder.path)) as store:
        rounds = [record.round for record in store.rounds()]
        same = rounds[-1] == ROUNDS and digest(store.groups(ROUNDS)["model"]) == _undisturbed(consortium, study)
    _wait("all are online", lambda: _online(consortium) >= set(HOSPITALS))
    kinds = [event.kind for _, event in read_events(folder)]
    return {
        "victim": victim, "killed": killed, "in_round": before.round, "status": view.status, "same_bits": same,
        "rounds_once": rounds == list(range(ROUNDS + 1)), "explained": _explained(view, kinds, by_hand),
        "resumed": kinds.count("resumed"), "by_hand": by_hand, "seconds": round(time.monotonic() - started, 1),
        "events": [kind for kind in kinds if kind in ("refused", "waiting", "fell-back", "resumed", "failed")],
    }  # fmt: skip


def _explained(view: RunView, kinds: Sequence[str], by_hand: int) -> bool:
    """Whether the log accounts for what it shows: a reason for each new beginning and each wait, and an end."""
    waits = "waiting" not in kinds or "refused" in kinds or "resumed" in kinds
    beginnings = 1 <= kinds.count("started") <= 1 + kinds.count("resumed") + by_hand
    return waits and beginnings and kinds[-1] == "finished" and view.message == ""


def _online(consortium: Consortium) -> set[str]:
    with suppress(EnvironmentProblem):  # it is on its way up
        return online(consortium)
    return set()


def _undisturbed(consortium: Consortium, study: Study) -> str:
    base = consortium.folder.parent
    out = base / "simulated" / study.study.name
    settings = site_settings(study, find_sites(base / "sites"), out)
    with closing(RunStore.create(out, study, engine="inprocess")) as store, InProcessTransport(settings) as transport:
        run_study(study, transport, store, ignore)
        return digest(store.groups(ROUNDS)["model"])


def _wait(what: str, done: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise EnvironmentProblem(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


class _Everything:
    """A consortium whose processes are started, and killed."""

    def __init__(self, consortium: Consortium, passphrase: Passphrase, base: Path) -> None:
        self.consortium, self.passphrase, self.base = consortium, passphrase, base
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, log: Path, *command: str) -> None:
        """Start a command of ours under ``name``."""
        program = str(Path(sys.executable).parent / command[0])
        with log.open("ab") as out:
            self.started[name] = subprocess.Popen([program, *command[1:]], stdout=out, stderr=out)  # noqa: S603 - our own

    def start_coordinator(self) -> None:
        """``fedneuro-server start``."""
        words = ["start", "--no-dashboard", "--config", str(self.consortium.folder)]
        words += ["--passphrase-file", str(self.base / "passphrase")]
        self.start("coordinator", self.base / "start.log", "fedneuro-server", *words)

    def kill(self, victim: str, dice: random.Random) -> bool:
        """Kill -9; False where the process was not there at this moment."""
        if victim == "start":
            self.started["coordinator"].kill()
            return True
        place = "coordinator" if victim in ("server", "superlink", "guard") else dice.choice(HOSPITALS)
        for child in psutil.Process(self.started[place].pid).children(recursive=True):
            with suppress(psutil.Error):
                if _ENTRIES[victim] in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return True
        return False

    def keep(self) -> None:
        """Start a coordinator that has ended again, after a while: its service's ``Restart`` and ``RestartSec``."""
        if self.started["coordinator"].poll() is not None:
            time.sleep(RESTART_SECONDS)
            self.start_coordinator()

    def end(self) -> None:
        """Ask all to end, and wait until they have."""
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            process.wait(60)


@contextmanager
def _consortium(base: Path) -> Iterator[_Everything]:
    """Everything, started."""
    words = base / "passphrase"
    write_private(words, b"a passphrase for chaos\n")
    passphrase = Passphrase("the issuing key", "FEDNEURO_UNSET", words)
    first = next(p for p in (claim_port() for _ in range(50)) if p < 65500 and all(_free(p + i) for i in (1, 2)))
    ports = {"guard": first, "enrolment": first + 1, "renewal": first + 2, "superlink": claim_port()}
    settings = ServerSettings.model_validate(
        {"consortium": {"name": "chaos"}, "server": {"host": "localhost", "listen": "127.0.0.1"}, "ports": ports}
    )
    consortium = create_consortium(base / "consortium", settings, passphrase, passphrase)
    (consortium.folder / ROOT_KEY).rename(base / "root-key.json")
    everything = _Everything(consortium, passphrase, base)
    try:
        everything.start_coordinator()
        _wait("the coordinator is up", lambda: b"is up" in (base / "start.log").read_bytes())
        for seed, name in enumerate(HOSPITALS):
            write_tiny_site(base / "sites" / name, seed=seed)
            node = base / "nodes" / name
            answers = Answers(name=name, role=Role.TRAIN, public_size=10, data=base / "sites" / name, port=claim_port())
            init_node(node, answers)
            _permit(node / "policy.toml", consortium.study_key, name)
            enrol(invite(consortium, name, Role.TRAIN, timedelta(hours=1))[0], node / "node.toml")
            everything.start(name, node / "start.log", "fedneuro-node", "start", "--config", str(node / "node.toml"))
        _wait("the hospitals are online", lambda: _online(consortium) >= set(HOSPITALS))
        yield everything
    finally:
        everything.end()


def _permit(policy: Path, key: str, dataset: str) -> None:
    """Studies without privacy, signed by this coordinator, are approved at once, as often as they are repeated."""
    rule = f'[[studies.rules]]\ncoordinator = "{key}"\ntasks = ["segmentation"]\n'
    rule += f'datasets = ["{dataset}"]\nmodes = ["none"]\n\n[grant]'
    text = policy.read_text(encoding="utf-8").replace("[grant]", rule, 1)
    text = text.replace('modes = ["local", "distributed"]', 'modes = ["none"]')
    text = text.replace("max_requests_per_hour = 1000", "max_requests_per_hour = 100000")
    policy.write_text(text, encoding="utf-8")


def _free(port: int) -> bool:
    with suppress(EnvironmentProblem):
        return claim_port(port) == port
    return False


def _left_over(folder: str) -> list[str]:
    """Processes whose command or environment names ``folder``."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join([*process.cmdline(), *process.environ().values()])
            if process.pid != os.getpid() and folder in words:
                found.append(" ".join(process.cmdline())[:200])
    return found
