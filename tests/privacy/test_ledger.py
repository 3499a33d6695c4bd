# SPDX-License-Identifier: Apache-2.0
"""The ledger: charges before work, survives kills, cannot be edited, put back, lent, or spent twice.

``FEDNEURO_LEDGER_KILLS`` sets how many processes are killed (20 by default; 500 is the full version).
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedneuro.privacy import second_opinion
from fedneuro.privacy.accounting import GaussianEvent, epsilon
from fedneuro.privacy.budget import Budget
from fedneuro.privacy.contract import Receipt
from fedneuro.privacy.errors import BudgetExhausted, EnvironmentProblem, LedgerDistrusted, Reason, Refused
from fedneuro.privacy.ledger import Ledger, Reservation

STUDY, DATASET, DELTA = "f" * 64, "glioma", 1e-5
ROUND = GaussianEvent(sample_rate=0.25, noise_multiplier=2.0, count=10)


def budget(rounds: int) -> float:
    """ε of exactly so many rounds."""
    return epsilon([ROUND] * rounds, DELTA)


def open_ledger(folder: Path) -> Ledger:
    return Ledger(folder / "ledger.db", "north")


def reserve(
    ledger: Ledger, round_: int, rounds_allowed: float = 8.0, study: str = STUDY, receipt: Receipt | None = None
) -> Reservation:
    return ledger.reserve(study, DATASET, round_, ROUND, delta=DELTA, budget_epsilon=rounds_allowed, receipt=receipt)


# -- budgets --------------------------------------------------------------------------------------------------


def test_the_budget_covers_exactly_its_rounds(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    spent = [reserve(ledger, r, budget(3)).epsilon_after for r in (1, 2, 3)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(budget(3), rel=1e-6), "the fine grid decides where the coarse one would refuse"
    with pytest.raises(BudgetExhausted, match=r"round 4 would bring ε of data set glioma to \d+\.\d+ in study ffff"):
        reserve(ledger, 4, budget(3))
    assert ledger.events(STUDY, DATASET) == [ROUND] * 3, "a refused round is not charged"
    assert ledger.epsilon(STUDY, DATASET, DELTA) == budget(3)


def test_a_budget_below_one_step_is_refused(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    with pytest.raises(BudgetExhausted, match=r"beyond its budget of 0\.01"):
        reserve(ledger, 1, 0.01)
    assert ledger.events(STUDY, DATASET) == []


def test_a_round_tried_again_is_charged_again_and_says_so(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    first, second, other = reserve(ledger, 1), reserve(ledger, 1), reserve(ledger, 2)
    assert (first.attempt, second.attempt, other.attempt) == (1, 2, 1)
    assert first.epsilon_after < second.epsilon_after < other.epsilon_after
    assert len(ledger.events(STUDY, DATASET)) == 3


def test_studies_data_sets_and_purposes_have_their_own_budgets(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    one = budget(1)
    reserve(ledger, 1, one)
    reserve(ledger, 1, one, study="e" * 64)
    ledger.reserve(STUDY, "hippocampus", 1, ROUND, delta=DELTA, budget_epsilon=one)
    ledger.reserve(STUDY, DATASET, 1, ROUND, delta=DELTA, budget_epsilon=one, purpose="metrics")
    with pytest.raises(BudgetExhausted):
        reserve(ledger, 2, one)
    assert ledger.events("d" * 64, DATASET) == []
    assert ledger.epsilon("d" * 64, DATASET, DELTA) == 0.0


def test_the_life_of_a_data_set_composes_all_studies_purposes_and_parameters(tmp_path: Path) -> None:
    """Each study is within its own budget; together they meet the hospital's, at the hospital's δ."""
    ledger, other = open_ledger(tmp_path), GaussianEvent(sample_rate=0.5, noise_multiplier=9.0, count=4)
    first = GaussianEvent(sample_rate=1.0, noise_multiplier=9.0)
    all_three = Budget(epsilon=epsilon([first, first, other], 1e-4), delta=1e-4)

    def charge(study: str, event: GaussianEvent, purpose: str = "train") -> None:
        ledger.reserve(
            study * 64, DATASET, 1, event, delta=DELTA, budget_epsilon=50, lifetime=all_three,
            purpose="metrics" if purpose == "metrics" else "train",
        )  # fmt: skip

    charge("a", first)
    charge("b", other, "metrics")
    charge("c", first)
    with pytest.raises(BudgetExhausted, match=r"over all studies to \d+\.\d+, beyond the hospital's budget"):
        charge("d", GaussianEvent(sample_rate=0.01, noise_multiplier=5.0))
    assert len(ledger.entries()) == 4


def test_accountants_that_disagree_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that suddenly reports too much on one side or the other: refused, and nothing is charged."""
    ledger = open_ledger(tmp_path)
    monkeypatch.setattr(second_opinion, "cross_check", lambda *_: 0.5)
    with pytest.raises(Refused, match=r"above 0\.5000") as caught:
        reserve(ledger, 1)
    assert caught.value.reason is Reason.ACCOUNTING_DISAGREES
    monkeypatch.setattr(second_opinion, "cross_check", lambda *_: 99.0)
    monkeypatch.setattr(second_opinion, "prv_lower_bound", lambda *_: 7.0)
    with pytest.raises(Refused, match=r"below 7\.0000"):
        reserve(ledger, 1)
    assert ledger.events(STUDY, DATASET) == []


# -- what must not be possible --------------------------------------------------------------------------------


def test_charges_survive_a_new_process_and_cannot_be_undone(tmp_path: Path) -> None:
    kept = reserve(open_ledger(tmp_path / "state"), 1)
    path = tmp_path / "state" / "ledger.db"
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir()), "only the owner may read it"
    again = open_ledger(tmp_path / "state")
    again.settle(kept.id)
    assert again.events(STUDY, DATASET) == [ROUND]
    assert [entry.kind for entry in again.entries()] == ["begin", "reserve", "settle"]
    with sqlite3.connect(path) as database:
        for statement in ("DELETE FROM entries", "UPDATE entries SET count = 0", "UPDATE entries SET study = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="ledger"):
                database.execute(statement)
    database.close()
    for charge in (kept.id, 1, 99):
        with pytest.raises(EnvironmentProblem, match=f"no open charge {charge}"):
            again.settle(charge)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE entries SET count = 1 WHERE id = 2", "entry 2 was changed"),
        ("UPDATE entries SET noise_multiplier = 99.0 WHERE id = 3", "entry 3 was changed"),
        ("UPDATE entries SET study = 'x' WHERE id = 2", "entry 2 was changed"),
        ("UPDATE entries SET at = '1970-01-01' WHERE id = 2", "entry 2 was changed"),
        ("UPDATE entries SET count = x'00' WHERE id = 2", "entry 2 was changed"),
        ("UPDATE entries SET kind = 'settle', settles = 2 WHERE id = 3", "entry 3 was changed"),
        ("UPDATE entries SET kind = 'note' WHERE id = 3", "entry 3 is missing, moved or of another kind"),
        ("DELETE FROM entries WHERE id = 2", "entry 2 is missing"),
        ("DELETE FROM entries WHERE id = 1", "entry 1 is missing"),
        ("DELETE FROM entries WHERE id = 4", "an old copy was put back"),
        ("DELETE FROM entries", "it holds no entry"),
    ],
)
def test_an_edited_ledger_is_distrusted(tmp_path: Path, statement: str, words: str) -> None:
    ledger = open_ledger(tmp_path)
    for number in (1, 2, 3):
        reserve(ledger, number)
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        for trigger in ("entries_are_kept", "entries_are_fixed"):
            database.execute(f"DROP TRIGGER {trigger}")
        database.execute(statement)
    database.close()
    for use in (lambda: reserve(ledger, 4), ledger.entries, lambda: open_ledger(tmp_path), lambda: ledger.settle(2)):
        with pytest.raises(LedgerDistrusted, match=words) as caught:
            use()
        assert caught.value.exit_code == 3


def test_a_rewritten_chain_contradicts_its_anchor_and_the_coordinators_receipt(tmp_path: Path) -> None:
    """A forger who can hash writes a whole new chain of the same length; then also replaces the anchors."""
    ledger, forged = open_ledger(tmp_path / "real"), open_ledger(tmp_path / "forged")
    receipt = reserve(ledger, 1).receipt
    reserve(ledger, 2)
    cheap = GaussianEvent(sample_rate=0.01, noise_multiplier=50.0)
    for number in (1, 2):
        forged.reserve(STUDY, DATASET, number, cheap, delta=DELTA, budget_epsilon=8)
    copy(tmp_path / "forged", tmp_path / "real", "ledger.db")
    with pytest.raises(LedgerDistrusted, match="entry 3 is not the one that was written down") as caught:
        reserve(ledger, 3)
    assert caught.value.reason is Reason.LEDGER_ROLLED_BACK
    copy(tmp_path / "forged", tmp_path / "real", "ledger.db.anchors")
    with pytest.raises(LedgerDistrusted, match="the coordinator holds a receipt for entry 2") as caught:
        reserve(ledger, 3, receipt=receipt)
    assert caught.value.reason is Reason.LEDGER_ROLLED_BACK


def copy(source: Path, target: Path, *names: str) -> None:
    """Copy files of a ledger as an administrator would; SQLite's own journal files go with the database."""
    target.mkdir(exist_ok=True)
    for name in names:
        for suffix in ("", "-wal", "-shm"):
            (target / f"{name}{suffix}").unlink(missing_ok=True)
            if (source / f"{name}{suffix}").exists():
                shutil.copy2(source / f"{name}{suffix}", target / f"{name}{suffix}")


def test_an_old_copy_is_found_by_the_anchors_and_with_them_by_the_receipt(tmp_path: Path) -> None:
    state, old = tmp_path / "state", tmp_path / "old"
    ledger = open_ledger(state)
    first = reserve(ledger, 1)
    copy(state, old, "ledger.db", "ledger.db.anchors")
    second = reserve(ledger, 2, receipt=first.receipt)
    copy(old, state, "ledger.db")
    with pytest.raises(LedgerDistrusted, match="it has 2 entries, but 3 were written"):
        open_ledger(state)
    copy(old, state, "ledger.db.anchors")
    put_back = open_ledger(state)
    reserve(put_back, 2, receipt=first.receipt)  # what it does hold it may show
    with pytest.raises(LedgerDistrusted, match=f"receipt for entry {second.receipt.count}"):
        reserve(put_back, 3, receipt=second.receipt)


def test_a_ledger_or_its_anchors_that_vanish_are_missed(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    receipt = reserve(ledger, 1).receipt
    (tmp_path / "ledger.db").rename(tmp_path / "gone")
    with pytest.raises(LedgerDistrusted, match="it has 0 entries, but 2 were written"):
        open_ledger(tmp_path)
    (tmp_path / "gone").rename(tmp_path / "ledger.db")
    (tmp_path / "ledger.db.anchors").unlink()
    with pytest.raises(LedgerDistrusted, match="its anchors are gone"):
        reserve(ledger, 2)
    (tmp_path / "ledger.db").unlink()
    (tmp_path / "ledger.db.anchors").unlink()
    with pytest.raises(LedgerDistrusted, match="receipt for entry 2"):
        reserve(open_ledger(tmp_path), 2, receipt=receipt)


def test_another_hospitals_ledger_is_refused(tmp_path: Path) -> None:
    reserve(open_ledger(tmp_path), 1)
    with pytest.raises(LedgerDistrusted, match="belongs to hospital north, not south"):
        Ledger(tmp_path / "ledger.db", "south")


def test_clocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set back by fifty years between two rounds."""
    from datetime import datetime, tzinfo

    ledger = open_ledger(tmp_path)
    reserve(ledger, 1)

    class Past(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Past":
            return cls(1976, 1, 1, tzinfo=tz)

    monkeypatch.setattr("fedneuro.privacy.ledger.datetime", Past)
    reserve(ledger, 2)
    entries = ledger.entries()
    assert [entry.round for entry in entries] == [0, 1, 2]
    assert entries[2].at < entries[1].at


def test_an_event_of_an_unknown_mechanism_grants_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(GaussianEvent, "mechanism", "exponential")
        reserve(ledger, 1)
    with pytest.raises(LedgerDistrusted, match="entry 2 is of mechanism 'exponential'"):
        reserve(ledger, 2)


# -- crashes --------------------------------------------------------------------------------------------------


def test_whoever_is_killed_at_whatever_moment_has_paid(tmp_path: Path) -> None:
    """kill -9 at random moments over three concurrent writers: every round that was trained is in the ledger.

    Each worker is a forked copy, so that a kill costs milliseconds and not an import of scipy.
    """
    kills = int(os.environ.get("FEDNEURO_LEDGER_KILLS", "20"))
    path, generator = tmp_path / "ledger.db", random.Random(0)  # noqa: S311
    trained: list[int] = []
    at_work: list[tuple[int, int]] = []
    killed = 0
    open_ledger(tmp_path)
    epsilon([ROUND], DELTA)  # imports, before the forks
    while killed < kills:
        while len(at_work) < 3:
            at_work.append(fork_worker(path))
        time.sleep(generator.uniform(0.0, 0.1))
        pid, pipe = at_work.pop(generator.randrange(3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        with os.fdopen(pipe) as told:
            trained += [int(line) for line in told.read().split("\n")[:-1]]
    for pid, pipe in at_work:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(pipe) as told:
            trained += [int(line) for line in told.read().split("\n")[:-1]]
    entries = open_ledger(tmp_path).entries()  # verified, although nobody ended in order
    charges = {entry.id for entry in entries if entry.kind == "reserve"}
    print(f"{kills} kills: {len(trained)} rounds trained, {len(charges)} charged")
    assert len(trained) == len(set(trained)) > 0
    assert set(trained) <= charges, "spent is never less than what was trained"
    assert len(charges) - len(trained) <= kills + 3, "at most one charge per kill is lost work"


def fork_worker(path: Path) -> tuple[int, int]:
    """A forked process that reserves, "trains" (tells the number of its charge) and settles until it is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        tiny = GaussianEvent(sample_rate=1.0, noise_multiplier=1e4)
        number = 0
        while True:
            number += 1
            ledger = Ledger(path, "north")
            kept = ledger.reserve(str(os.getpid()), DATASET, number, tiny, delta=DELTA, budget_epsilon=1e6)
            os.write(writer, f"{kept.id}\n".encode())
            ledger.settle(kept.id)
    finally:
        os._exit(1)


def test_two_processes_cannot_both_spend_the_last_of_a_budget(tmp_path: Path) -> None:
    open_ledger(tmp_path)
    allowed, readers, racers = budget(5), list[int](), list[int]()
    start, go = os.pipe()
    for _ in range(2):
        reader, writer = os.pipe()
        racers.append(os.fork())
        if not racers[-1]:
            count = 0
            try:
                os.read(start, 1)
                for _ in range(5):
                    try:
                        reserve(open_ledger(tmp_path), 1, allowed)
                        count += 1
                    except BudgetExhausted:
                        pass
            finally:
                os.write(writer, str(count).encode())
                os._exit(0)
        os.close(writer)
        readers.append(reader)
    os.write(go, b"xx")
    won = [int(os.read(reader, 9)) for reader in readers]
    for racer in racers:
        os.waitpid(racer, 0)
    assert sum(won) == 5, f"ten attempts, five of them covered: {won}"
    assert len(open_ledger(tmp_path).events(STUDY, DATASET)) == 5


def test_an_anchor_that_a_crash_cut_short_does_no_harm(tmp_path: Path) -> None:
    """Power fails while an anchor is written: its row is committed, the line is half there."""
    ledger, anchors = open_ledger(tmp_path), tmp_path / "ledger.db.anchors"
    reserve(ledger, 1)
    whole = anchors.read_bytes()
    anchors.write_bytes(whole[:-40])
    reserve(ledger, 2)
    assert len(anchors.read_bytes().splitlines()) == 3
    anchors.write_bytes(b"")  # killed between the first row and its anchor is told from a theft by the rows
    with pytest.raises(LedgerDistrusted, match="anchors are gone"):
        open_ledger(tmp_path)
    other = open_ledger(tmp_path / "young")
    (tmp_path / "young" / "ledger.db.anchors").write_bytes(b"")
    reserve(open_ledger(tmp_path / "young"), 1)
    assert len(other.entries()) == 2


def test_a_full_disk_refuses_the_round(tmp_path: Path) -> None:
    """A tmpfs fills up while rounds are reserved: an environment problem, and what was granted is there."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        ledger = open_ledger(small)
        granted = [reserve(ledger, 1, 1e6).id]
        (small / "ballast").write_bytes(bytes(200_000 - sum(f.stat().st_size for f in small.iterdir()) - 40_000))
        with pytest.raises(EnvironmentProblem, match=r"(full|No space).*nothing .* is trained") as caught:
            granted.extend(reserve(ledger, number, 1e6).id for number in range(2, 60))
        assert caught.value.exit_code == 5
        (small / "ballast").unlink()
        charges = [entry.id for entry in open_ledger(small).entries() if entry.kind == "reserve"]
        assert set(granted) <= set(charges)
        reserve(ledger, 99, 1e6)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text(
        "not a data base at all, but long enough to have a header that SQLite would read"
    )
    with pytest.raises(EnvironmentProblem, match=r"ledger\.db cannot be used .*: nothing private is trained"):
        open_ledger(tmp_path)


def test_a_ledger_of_the_old_form_is_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("CREATE TABLE spent (id INTEGER)")
    database.close()
    with pytest.raises(EnvironmentProblem, match="development version"):
        open_ledger(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_ledger_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentProblem, match="check disk space and permissions"):
        open_ledger(tmp_path)


def test_many_rounds_are_gated_quickly(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    reserve(ledger, 1, 100)
    started = time.process_time()
    for round_ in range(2, 22):
        reserve(ledger, round_, 100)
    assert (time.process_time() - started) / 20 < 0.25


# -- transitions ----------------------------------------------------------------------------------------------


class Bookkeeping(RuleBasedStateMachine):
    """Any sequence of reserve, settle, crash and tampering, beside a list that remembers what was granted."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.ledger = open_ledger(self.folder)
        self.granted: list[tuple[str, GaussianEvent, int]] = []
        self.open: list[int] = []
        self.receipts: list[Receipt] = []

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(study=st.sampled_from("ab"), sigma=st.sampled_from([4.0, 40.0]), number=st.integers(1, 2))
    def reserve(self, study: str, sigma: float, number: int) -> None:
        event = GaussianEvent(sample_rate=1.0, noise_multiplier=sigma, count=2)
        before = [e for s, e, _ in self.granted if s == study]
        covered = epsilon([*before, event], 1e-3) <= 1.5
        try:
            kept = self.ledger.reserve(
                study * 64, DATASET, number, event, delta=1e-3, budget_epsilon=1.5,
                receipt=self.receipts[-1] if self.receipts else None,
            )  # fmt: skip
        except BudgetExhausted:
            assert not covered
            return
        assert covered
        assert kept.attempt == 1 + sum(s == study and r == number for s, _, r in self.granted)
        self.granted.append((study, event, number))
        self.open.append(kept.id)
        self.receipts.append(kept.receipt)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        if self.open:
            self.ledger.settle(self.open.pop(data.draw(st.integers(0, len(self.open) - 1))))

    @rule()
    def restart(self) -> None:
        self.ledger = open_ledger(self.folder)

    @rule()
    def put_back_an_old_copy(self) -> None:
        """Found at once, and the true ledger is returned."""
        if not self.granted:
            return
        copy(self.folder, self.folder / "true", "ledger.db")
        (self.folder / "ledger.db-wal").unlink(missing_ok=True)
        with sqlite3.connect(self.folder / "ledger.db") as database:
            database.execute("DROP TRIGGER entries_are_kept")
            database.execute("DELETE FROM entries WHERE id = (SELECT max(id) FROM entries)")
        database.close()
        with pytest.raises(LedgerDistrusted):
            self.ledger.entries()
        copy(self.folder / "true", self.folder, "ledger.db")

    @invariant()
    def holds_what_was_granted(self) -> None:
        for study in "ab":
            assert self.ledger.events(study * 64, DATASET) == [e for s, e, _ in self.granted if s == study]
            assert self.ledger.epsilon(study * 64, DATASET, 1e-3) <= 1.5 * (1 + 1e-6)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)
