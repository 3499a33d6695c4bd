# SPDX-License-Identifier: Apache-2.0
"""The privacy ledger: what each study has spent on each data set of this hospital. It says no in time.

Reserve → train → settle:

    1. :meth:`Ledger.reserve` checks the ledger (chain, anchors, the coordinator's receipt), composes all charges of
       the study and of the data set, asks the second opinions, and commits the charge to disk *before* any training
    2. the site trains
    3. :meth:`Ledger.settle` notes that the result was handed on

A crash, a power cut or a killed process can lose a round's work, never its charge. A round that is tried again is
charged again, and the reservation says so. Two processes that want the last of a budget are served one after the
other. Rows are events, not values of ε, so composition over rounds, studies and changed parameters is exact; they
are never changed or deleted, and settling is a row of its own (:mod:`.ledger_chain` says how a change is found).

Unit: the patient. Neighbouring relation: zero-out of one patient. Within a study a patient either trains or is
evaluated, so the two purposes have budgets of their own; statistics of the data set, which every patient pays for
(:mod:`.noised_statistics`), have a third. Over the data set's life everything is composed.

SQLite, WAL journal, ``synchronous=FULL``. Anchors: ``<ledger>.anchors`` beside it.
"""

import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .accounting import COARSE_GRID, GaussianEvent, epsilon
from .budget import Budget
from .contract import Receipt
from .errors import BudgetExhausted, EnvironmentProblem
from .file_lock import PATIENCE
from .ledger_chain import AnchorFile, Entry, check_anchor, check_chain, check_receipt, receipt_of
from .second_opinion import agree

__all__ = ["Ledger", "Purpose", "Reservation"]

Purpose = Literal["train", "metrics", "statistics"]

_TOLERANCE = 1 + 1e-6  # on the budget: σ was calibrated to meet it exactly
_COLUMNS = tuple(field.name for field in fields(Entry))
_TYPES: dict[Any, str] = {str: "TEXT", int: "INTEGER", float: "REAL"}
_SCHEMA = (
    "CREATE TABLE entries ("
    + ", ".join(
        f"{field.name} {_TYPES[field.type]} NOT NULL" + (" PRIMARY KEY" if field.name == "id" else "")
        for field in fields(Entry)
    )
    + ")",
    "CREATE TRIGGER entries_are_kept BEFORE DELETE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'the ledger forgets nothing'); END",
    "CREATE TRIGGER entries_are_fixed BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'an entry of the ledger does not change'); END",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A charge that is on disk.

    Attributes:
        id: number of the entry, for :meth:`Ledger.settle`.
        epsilon_after: ε of the study on the data set for this purpose, this charge included; an upper bound.
        attempt: 1, or more where the round was charged before.
        receipt: what the coordinator may keep, to show it again.
    """

    id: int
    epsilon_after: float
    attempt: int
    receipt: Receipt


class Ledger:
    """The ledger of hospital ``site`` in the file ``path``, made on first use with access for its owner alone.

    Usable from many processes at once; one instance belongs to one thread at a time.

    Raises:
        LedgerDistrusted: it was changed, put back, or belongs to another hospital.
        EnvironmentProblem: the file cannot be opened, or is not a ledger.
    """

    def __init__(self, path: Path, site: str) -> None:
        self._path = path
        self._site = site
        self._anchors = AnchorFile(path.with_name(path.name + ".anchors"))
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._writing() as database:
                if not _tables(database):
                    check_anchor([], self._anchors.last(), self._path)
                    for statement in _SCHEMA:
                        database.execute(statement)
                    self._append(database, [], Entry(id=1, kind="begin", site=site))
                elif (entries := self._entries(database)) and self._anchors.last() is None:
                    self._anchors.append(entries[-1])  # killed before the first anchor was written

    def reserve(
        self,
        study_hash: str,
        dataset: str,
        round: int,  # noqa: A002 - the word of the contract
        event: GaussianEvent,
        *,
        delta: float,
        budget_epsilon: float,
        lifetime: Budget | None = None,
        purpose: Purpose = "train",
        receipt: Receipt | None = None,
    ) -> Reservation:
        """Charge ``event`` to the study's budget on the data set; committed to disk when this returns.

        Args:
            study_hash: which study.
            dataset: which data set of this hospital.
            round: round of the study; for the record, a round that is tried again is charged again.
            event: the releases of the whole round.
            delta: δ of the study at this site.
            budget_epsilon: ε that the study may spend on the data set for this purpose in all.
            lifetime: what all studies together may spend on the data set; None: no bound.
            purpose: which side of the patient split pays.
            receipt: what the coordinator shows of an earlier round.

        Raises:
            BudgetExhausted: a budget does not cover it; nothing is charged.
            LedgerDistrusted: the ledger is not what was written; nothing is charged.
            Refused: two accountants contradict each other; nothing is charged.
            EnvironmentProblem: the ledger cannot be written; nothing may be trained then.
        """
        with self._explained(), self._writing() as database:
            entries = self._entries(database)
            check_receipt(entries, receipt, self._path)
            charges = [entry for entry in entries if entry.kind == "reserve" and entry.dataset == dataset]
            own = [entry for entry in charges if entry.study == study_hash and entry.purpose == purpose]
            after = _within(
                [*(entry.event() for entry in own), event],
                Budget(epsilon=budget_epsilon, delta=delta),
                f"round {round} would bring ε of data set {dataset} to {{:.3f}} in study {study_hash[:12]}, "
                "beyond its budget of {:g}: end the study here, or agree on a larger one",
            )
            if lifetime is not None:
                _within(
                    [*(entry.event() for entry in charges), event],
                    lifetime,
                    f"round {round} of study {study_hash[:12]} would bring ε of data set {dataset} over all studies to "
                    "{:.3f}, beyond the hospital's budget of {:g} ([budget] in node.toml)",
                )
            charge = Entry(
                id=len(entries) + 1, kind="reserve", study=study_hash, dataset=dataset, round=round, purpose=purpose,
                mechanism=event.mechanism, sample_rate=float(event.sample_rate), count=event.count,
                noise_multiplier=float(event.noise_multiplier), delta=float(delta), budget=float(budget_epsilon),
            )  # fmt: skip
            charge = self._append(database, entries, charge)
        attempt = 1 + sum(entry.round == round for entry in own)
        return Reservation(id=charge.id, epsilon_after=after, attempt=attempt, receipt=receipt_of(charge))

    def settle(self, charge: int) -> None:
        """Note that the reserved round ended and its result was handed on. Changes no charge.

        Raises:
            EnvironmentProblem: there is no such open charge, or the ledger cannot be written.
            LedgerDistrusted: the ledger is not what was written.
        """
        with self._explained(), self._writing() as database:
            entries = self._entries(database)
            settled = {entry.settles for entry in entries}
            if charge in settled or not any(e.id == charge and e.kind == "reserve" for e in entries):
                raise EnvironmentProblem(f"ledger {self._path} has no open charge {charge}: was it settled before?")
            self._append(database, entries, Entry(id=len(entries) + 1, kind="settle", settles=charge))

    def entries(self) -> list[Entry]:
        """All rows, verified.

        Raises:
            LedgerDistrusted: the ledger is not what was written.
        """
        with self._explained():
            anchor = self._anchors.last()  # first: a row that is written meanwhile must not look missing
            with self._connection() as database:
                return self._check(_rows(database), anchor)

    def events(self, study_hash: str, dataset: str, purpose: Purpose = "train") -> list[GaussianEvent]:
        """Every charge of the study on the data set, oldest first, settled or not."""
        return [
            entry.event()
            for entry in self.entries()
            if entry.kind == "reserve" and (entry.study, entry.dataset, entry.purpose) == (study_hash, dataset, purpose)
        ]

    def epsilon(self, study_hash: str, dataset: str, delta: float) -> float:
        """ε that the study has spent on the patients who trained, on the fine grid."""
        return epsilon(self.events(study_hash, dataset), delta)

    # -- rows --------------------------------------------------------------------------------------------

    def _entries(self, database: sqlite3.Connection) -> list[Entry]:
        """All rows, verified, while the lock is held."""
        return self._check(_rows(database), self._anchors.last())

    def _check(self, entries: list[Entry], anchor: tuple[int, str] | None) -> list[Entry]:
        check_chain(entries, self._site, self._path)
        check_anchor(entries, anchor, self._path)
        return entries

    def _append(self, database: sqlite3.Connection, entries: Sequence[Entry], entry: Entry) -> Entry:
        """Commit a row as the new head, then anchor it."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        previous = entries[-1].hash if entries else ""
        entry = replace(entry, at=at, nonce=secrets.token_hex(16), previous=previous)
        entry = replace(entry, hash=entry.computed_hash())
        marks = ", ".join("?" * len(_COLUMNS))
        database.execute(f"INSERT INTO entries ({', '.join(_COLUMNS)}) VALUES ({marks})", astuple(entry))  # noqa: S608
        database.execute("COMMIT")
        try:
            self._anchors.append(entry)
        except OSError as error:
            raise EnvironmentProblem(
                f"privacy ledger {self._path}: entry {entry.id} is written and counts as spent, but its anchor is not "
                f"({error.strerror}): nothing is trained; free space on the disk, then try again"
            ) from error
        return entry

    # -- file --------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process can overlap, in SQLite's eyes or in the anchors'."""
        with self._anchors.locked():
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._connection() as database:
                database.execute("BEGIN IMMEDIATE")
                yield database

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each call: nothing is shared across threads, forks or a crash."""
        database = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            if "spent" in _tables(database):
                raise EnvironmentProblem(
                    f"privacy ledger {self._path} was written by a development version and cannot be verified: move it "
                    "away, and take what it says was spent off the data set's budget"
                )
            yield database
        finally:
            # Closing rolls an open transaction back.
            database.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn faults of SQLite and of the disk into one line."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise EnvironmentProblem(
                f"privacy ledger {self._path} cannot be used ({error}): nothing private is trained without it; "
                "check disk space and permissions; never put an old copy back, it would be refused"
            ) from error


def _within(events: list[GaussianEvent], budget: Budget, refusal: str) -> float:
    """ε of ``events``, checked by other accountants: the quick, slightly larger bound if it fits, else the exact one.

    Raises:
        BudgetExhausted: it is more than the budget, said in the words of ``refusal`` with ε and the budget filled in.
        Refused: another accountant contradicts it.
    """
    found = epsilon(events, budget.delta, grid=COARSE_GRID)
    if found > budget.epsilon:
        found = epsilon(events, budget.delta)
    agree(events, budget.delta, found, thorough=_is_new(events))
    if found > budget.epsilon * _TOLERANCE:
        raise BudgetExhausted(refusal.format(found, budget.epsilon))
    return found


def _is_new(events: list[GaussianEvent]) -> bool:
    """Whether the last event is of a new kind, or carries the number of releases past a power of two."""
    *before, last = events
    known = any((e.sample_rate, e.noise_multiplier) == (last.sample_rate, last.noise_multiplier) for e in before)
    count = sum(event.count for event in before)
    return not known or count.bit_length() != (count + last.count).bit_length()


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _rows(database: sqlite3.Connection) -> list[Entry]:
    return [Entry(*row) for row in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM entries ORDER BY id")]  # noqa: S608
