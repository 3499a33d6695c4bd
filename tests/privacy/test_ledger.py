# SPDX-License-Identifier: Apache-2.0
"""The ledger: charges before work, survives kills, and two processes cannot spend the same budget."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fedneuro.privacy.accounting import GaussianEvent, epsilon
from fedneuro.privacy.errors import BudgetExhausted, EnvironmentProblem
from fedneuro.privacy.ledger import Ledger

STUDY, DATASET, DELTA = "f" * 64, "glioma", 1e-5
ROUND = GaussianEvent(sample_rate=0.25, noise_multiplier=2.0, count=10)


def budget(rounds: int) -> float:
    """ε of exactly so many rounds."""
    return epsilon([ROUND] * rounds, DELTA)


def reserve(ledger: Ledger, round_: int, rounds_allowed: int, study: str = STUDY, dataset: str = DATASET) -> float:
    kept = ledger.reserve(study, dataset, round_, ROUND, delta=DELTA, budget_epsilon=budget(rounds_allowed))
    return kept.epsilon_after


def test_the_budget_covers_exactly_its_rounds(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    spent = [reserve(ledger, r, 3) for r in (1, 2, 3)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(budget(3), rel=1e-6), "the fine grid decides where the coarse one would refuse"
    with pytest.raises(BudgetExhausted, match=r"round 4 would bring ε of data set glioma to \d+\.\d+ in study ffff"):
        reserve(ledger, 4, 3)
    assert ledger.events(STUDY, DATASET) == [ROUND] * 3, "a refused round is not charged"
    assert ledger.epsilon(STUDY, DATASET, DELTA) == budget(3)


def test_a_round_tried_again_is_charged_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    first = ledger.reserve(STUDY, DATASET, 1, ROUND, delta=DELTA, budget_epsilon=8)
    second = ledger.reserve(STUDY, DATASET, 1, ROUND, delta=DELTA, budget_epsilon=8)
    ledger.settle(second.id)
    assert first.id != second.id
    assert len(ledger.events(STUDY, DATASET)) == 2
    assert second.epsilon_after > first.epsilon_after


def test_studies_and_data_sets_have_their_own_budgets(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    reserve(ledger, 1, 1)
    reserve(ledger, 1, 1, study="e" * 64)
    reserve(ledger, 1, 1, dataset="hippocampus")
    with pytest.raises(BudgetExhausted):
        reserve(ledger, 2, 1)
    assert ledger.events("d" * 64, DATASET) == []
    assert ledger.epsilon("d" * 64, DATASET, DELTA) == 0.0


def test_charges_survive_a_new_process_and_cannot_be_undone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    kept = Ledger(path).reserve(STUDY, DATASET, 1, ROUND, delta=DELTA, budget_epsilon=8)
    assert path.stat().st_mode & 0o077 == 0, "only the owner may read the ledger"
    again = Ledger(path)
    again.settle(kept.id)
    assert again.events(STUDY, DATASET) == [ROUND]
    with sqlite3.connect(path) as database:
        for statement in ("DELETE FROM spent", "UPDATE spent SET count = 0", "UPDATE spent SET study = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="ledger"):
                database.execute(statement)
    database.close()
    with pytest.raises(EnvironmentProblem, match="no entry 99"):
        again.settle(99)


KILLED = """
import os, signal, sys
from pathlib import Path
from fedneuro.privacy.accounting import GaussianEvent
from fedneuro.privacy.ledger import Ledger
event = GaussianEvent(sample_rate=0.25, noise_multiplier=2.0, count=10)
kept = Ledger(Path(sys.argv[1])).reserve("f" * 64, "glioma", 1, event, delta=1e-5, budget_epsilon=float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)  # the training that never ends
"""


def test_a_process_killed_between_reserve_and_settle_has_paid(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(budget(2))], timeout=120)
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    assert ledger.events(STUDY, DATASET) == [ROUND]
    reserve(ledger, 1, 2)
    with pytest.raises(BudgetExhausted):
        reserve(ledger, 1, 2)


RACING = """
import sys
from pathlib import Path
from fedneuro.privacy.accounting import GaussianEvent
from fedneuro.privacy.errors import BudgetExhausted
from fedneuro.privacy.ledger import Ledger
event = GaussianEvent(sample_rate=0.25, noise_multiplier=2.0, count=10)
ledger = Ledger(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
won = 0
for _ in range(5):
    try:
        ledger.reserve("f" * 64, "glioma", 1, event, delta=1e-5, budget_epsilon=float(sys.argv[2]))
        won += 1
    except BudgetExhausted:
        pass
print(won)
"""


def test_two_processes_cannot_both_spend_the_last_of_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    command = [sys.executable, "-c", RACING, str(path), str(budget(5))]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert sum(won) == 5, f"ten attempts, five of them covered: {won}"
    assert len(Ledger(path).events(STUDY, DATASET)) == 5


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_text("not a data base at all, but long enough to have a header that SQLite would read")
    with pytest.raises(EnvironmentProblem, match=r"ledger\.sqlite cannot be used .*: nothing private is trained"):
        Ledger(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_ledger_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentProblem, match="check disk space and permissions"):
        Ledger(tmp_path / "ledger.sqlite")


def test_many_rounds_are_gated_quickly(tmp_path: Path) -> None:
    import time

    ledger = Ledger(tmp_path / "ledger.sqlite")
    reserve(ledger, 1, 100)
    started = time.process_time()
    for round_ in range(2, 22):
        ledger.reserve(STUDY, DATASET, round_, ROUND, delta=DELTA, budget_epsilon=100)
    assert (time.process_time() - started) / 20 < 0.25
