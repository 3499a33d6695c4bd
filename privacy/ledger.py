# SPDX-License-Identifier: Apache-2.0
"""The privacy ledger: what each study has spent on each data set of this hospital. It says no in time.

Write-ahead: :meth:`Ledger.reserve` commits the charge to disk *before* any training, so a crash, a power cut or a
killed process can lose a round's work, never its charge. A retried round is charged again. Two processes that
want the last of a budget are served one after the other. Entries are events, not values of ε, so composition
over rounds is exact; they cannot be deleted or changed, only settled.

SQLite, WAL journal, ``synchronous=FULL``.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .accounting import COARSE_GRID, GaussianEvent, epsilon
from .errors import BudgetExhausted, EnvironmentProblem

__all__ = ["Ledger", "Reservation"]

_TOLERANCE = 1 + 1e-6  # on the budget: σ was calibrated to meet it exactly
_PATIENCE = 60.0  # seconds to wait for another process

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spent (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    study TEXT NOT NULL,
    dataset TEXT NOT NULL,
    round INTEGER NOT NULL,
    sample_rate REAL NOT NULL,
    noise_multiplier REAL NOT NULL,
    count INTEGER NOT NULL,
    delta REAL NOT NULL,
    reserved_at TEXT NOT NULL,
    settled_at TEXT
);
CREATE INDEX IF NOT EXISTS spent_by_study ON spent (study, dataset);
CREATE TRIGGER IF NOT EXISTS spent_is_kept BEFORE DELETE ON spent
    BEGIN SELECT RAISE(ABORT, 'the ledger forgets nothing'); END;
CREATE TRIGGER IF NOT EXISTS spent_is_fixed BEFORE UPDATE OF
    id, study, dataset, round, sample_rate, noise_multiplier, count, delta, reserved_at ON spent
    BEGIN SELECT RAISE(ABORT, 'an entry of the ledger does not change'); END;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A charge that is on disk.

    Attributes:
        id: number of the entry, for :meth:`Ledger.settle`.
        epsilon_after: ε of the study on the data set, this charge included; an upper bound.
    """

    id: int
    epsilon_after: float


class Ledger:
    """The ledger in the file ``path``, made on first use with access for its owner alone.

    Usable from many processes at once; one instance belongs to one thread at a time.

    Raises:
        EnvironmentProblem: the file cannot be opened, or is not a ledger.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._connection() as database:
                database.executescript(_SCHEMA)

    def reserve(
        self,
        study_hash: str,
        dataset: str,
        round: int,  # noqa: A002 - the word of the contract
        event: GaussianEvent,
        *,
        delta: float,
        budget_epsilon: float,
    ) -> Reservation:
        """Charge ``event`` to the study's budget on the data set; committed to disk when this returns.

        Args:
            study_hash: which study.
            dataset: which data set of this hospital.
            round: round of the study; for the record, a round that is tried again is charged again.
            event: the releases of the whole round.
            delta: δ of the study.
            budget_epsilon: ε that the study may spend on the data set in all.

        Raises:
            BudgetExhausted: the budget does not cover it; nothing is charged.
            EnvironmentProblem: the ledger cannot be written; nothing may be trained then.
        """
        with self._explained(), self._connection() as database:
            # Immediate: from here to the commit no other process can spend.
            database.execute("BEGIN IMMEDIATE")
            before = _events(database, study_hash, dataset)
            after = _gate([*before, event], delta, budget_epsilon)
            if after > budget_epsilon * _TOLERANCE:
                raise BudgetExhausted(
                    f"round {round} would bring ε of data set {dataset} to {after:.3f} in study {study_hash[:12]}, "
                    f"beyond its budget of {budget_epsilon:g}: end the study here, or agree on a larger one"
                )
            cursor = database.execute(
                "INSERT INTO spent (study, dataset, round, sample_rate, noise_multiplier, count, delta, reserved_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (study_hash, dataset, round, event.sample_rate, event.noise_multiplier, event.count, delta, _now()),
            )
            entry = int(cursor.lastrowid or 0)
            database.execute("COMMIT")
        return Reservation(id=entry, epsilon_after=after)

    def settle(self, entry: int) -> None:
        """Note that the reserved round ended and its result was handed on. Changes no charge.

        Raises:
            EnvironmentProblem: there is no such entry, or the ledger cannot be written.
        """
        with self._explained(), self._connection() as database:
            done = database.execute("UPDATE spent SET settled_at = ? WHERE id = ?", (_now(), entry))
            if done.rowcount != 1:
                raise EnvironmentProblem(f"ledger {self._path} has no entry {entry}: was the file replaced?")

    def events(self, study_hash: str, dataset: str) -> list[GaussianEvent]:
        """Every charge of the study on the data set, oldest first, settled or not."""
        with self._explained(), self._connection() as database:
            return _events(database, study_hash, dataset)

    def epsilon(self, study_hash: str, dataset: str, delta: float) -> float:
        """ε that the study has spent on the data set, on the fine grid."""
        return epsilon(self.events(study_hash, dataset), delta)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each call: nothing is shared across threads, forks or a crash."""
        database = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
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
                "check disk space and permissions, or restore it from its backup"
            ) from error


def _gate(events: list[GaussianEvent], delta: float, budget: float) -> float:
    """ε of ``events``: the quick, slightly larger bound if it is within the budget, else the exact one."""
    coarse = epsilon(events, delta, grid=COARSE_GRID)
    return coarse if coarse <= budget else epsilon(events, delta)


def _events(database: sqlite3.Connection, study_hash: str, dataset: str) -> list[GaussianEvent]:
    rows = database.execute(
        "SELECT sample_rate, noise_multiplier, count FROM spent WHERE study = ? AND dataset = ? ORDER BY id",
        (study_hash, dataset),
    )
    return [GaussianEvent(sample_rate=q, noise_multiplier=sigma, count=count) for q, sigma, count in rows]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
