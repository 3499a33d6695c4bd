# SPDX-License-Identifier: Apache-2.0
"""The ledger's rows as a chain: each row's hash covers its own fields and the hash of the row before.

Whoever edits, removes, inserts or reorders a row must rewrite all later rows, and then the head differs from the
*anchors*: heads that were written down elsewhere. :class:`AnchorFile` keeps them beside the ledger, flushed to disk;
a node's audit log holds them under its signature, and the coordinator has others as receipts. Rows are ordered by
number, so clocks do not matter.

Method: Haber and Stornetta 1991, https://doi.org/10.1007/BF00196791.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from .accounting import GaussianEvent
from .contract import Receipt
from .errors import LedgerDistrusted, Reason
from .file_lock import locked_file

__all__ = ["AnchorFile", "Entry", "check_anchor", "check_chain", "check_receipt", "receipt_of"]

REMEDY = (
    "nothing private is computed with it. Keep the file for the inquiry and tell the data protection officer; "
    "a new ledger starts at zero, so what is already spent must be taken off the data set's budget by hand"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row. ``kind`` is ``begin`` (the first), ``reserve`` (a charge) or ``settle`` (a charge's work was handed on).

    Attributes:
        id: number, from 1, without gaps.
        kind: see above; fields that do not apply are empty or 0.
        site: the hospital's id; of ``begin`` alone.
        study: study hash.
        dataset: identity of the data set.
        round: round of the study; for the record.
        purpose: ``train`` or ``metrics``: which side of the patient split paid; ``statistics``: both.
        mechanism: name of the event's class.
        sample_rate: q.
        noise_multiplier: σ.
        count: releases.
        delta: δ of the study at this site.
        budget: ε that the study may spend on the data set for this purpose.
        settles: number of the charge that ``settle`` closes.
        at: when, in UTC; nothing depends on it.
        nonce: random, so that a row that is written again after a roll-back is another row.
        previous: hash of the row before.
        hash: hash of this row.
    """

    id: int
    kind: str
    site: str = ""
    study: str = ""
    dataset: str = ""
    round: int = 0
    purpose: str = ""
    mechanism: str = ""
    sample_rate: float = 0.0
    noise_multiplier: float = 0.0
    count: int = 0
    delta: float = 0.0
    budget: float = 0.0
    settles: int = 0
    at: str = ""
    nonce: str = ""
    previous: str = ""
    hash: str = ""

    def computed_hash(self) -> str:
        """SHA-256 over all other fields, as JSON with exact numbers."""
        return hashlib.sha256(json.dumps(astuple(self)[:-1], default=repr).encode()).hexdigest()

    def event(self) -> GaussianEvent:
        """The releases that a ``reserve`` row pays for.

        Raises:
            LedgerDistrusted: a mechanism that this version does not know: its cost is unknown, so nothing is granted.
        """
        if self.mechanism != GaussianEvent.mechanism:
            raise LedgerDistrusted(
                f"privacy ledger: entry {self.id} is of mechanism {self.mechanism!r}, which this FedNeuro cannot "
                "account for; use the version that wrote it"
            )
        return GaussianEvent(sample_rate=self.sample_rate, noise_multiplier=self.noise_multiplier, count=self.count)


def receipt_of(entry: Entry) -> Receipt:
    """What may be told of the ledger once ``entry`` is its last row."""
    return Receipt(count=entry.id, head=entry.hash[:16])


def check_chain(entries: Sequence[Entry], site: str, path: Path) -> None:
    """Refuse rows that are not the ones that were written, or not this hospital's.

    Raises:
        LedgerDistrusted: naming the first row that is wrong.
    """
    if not entries:
        raise _distrust(path, "it holds no entry")
    previous, open_charges = "", set[int]()
    for number, entry in enumerate(entries, start=1):
        right_kind = entry.kind == "begin" if number == 1 else entry.kind in ("reserve", "settle")
        if entry.id != number or not right_kind:
            raise _distrust(path, f"entry {number} is missing, moved or of another kind")
        if entry.previous != previous or entry.computed_hash() != entry.hash:
            raise _distrust(path, f"entry {number} was changed after it was written")
        if entry.kind == "reserve":
            open_charges.add(number)
        elif entry.kind == "settle":
            if entry.settles not in open_charges:
                raise _distrust(path, f"entry {number} settles {entry.settles}, which is no open charge")
            open_charges.discard(entry.settles)
        previous = entry.hash
    if entries[0].site != site:
        raise LedgerDistrusted(
            f"privacy ledger {path} belongs to hospital {entries[0].site}, not {site}: give this hospital's own state "
            "folder; what another hospital spent says nothing about these patients"
        )


def check_anchor(entries: Sequence[Entry], anchor: tuple[int, str] | None, path: Path, *, witness: str = "") -> None:
    """Refuse a ledger that does not hold the row which was last written down elsewhere.

    Args:
        entries: all rows.
        anchor: number and hash of the row; None: nothing was written down, so there may be one row at most.
        path: of the ledger, for the message.
        witness: where it was written down, if not in the anchors beside the ledger, for the message.

    Raises:
        LedgerDistrusted: reason ``ledger-rolled-back``.
    """
    by = f", says {witness}" if witness else ""
    if anchor is None:
        if len(entries) > 1:
            raise _distrust(path, "its anchors are gone", Reason.LEDGER_ROLLED_BACK)
        return
    count, head = anchor
    if len(entries) < count:
        what = f"it has {len(entries)} entries, but {count} were written{by}"
        what += ": an old copy was put back, or it was replaced"
        raise _distrust(path, what, Reason.LEDGER_ROLLED_BACK)
    if entries[count - 1].hash != head:
        raise _distrust(path, f"entry {count} is not the one that was written down{by}", Reason.LEDGER_ROLLED_BACK)


def check_receipt(entries: Sequence[Entry], receipt: Receipt | None, path: Path) -> None:
    """Refuse a ledger that does not hold a row for which the coordinator shows a receipt.

    Raises:
        LedgerDistrusted: reason ``ledger-rolled-back``.
    """
    if receipt is None:
        return
    if len(entries) < receipt.count or receipt_of(entries[receipt.count - 1]) != receipt:
        what = (
            f"the coordinator holds a receipt for entry {receipt.count} ({receipt.head}), which the ledger does not "
            "have: an old copy was put back, or it was replaced"
        )
        raise _distrust(path, what, Reason.LEDGER_ROLLED_BACK)


def _distrust(path: Path, what: str, reason: Reason = Reason.LEDGER_DISTRUSTED) -> LedgerDistrusted:
    return LedgerDistrusted(f"privacy ledger {path}: {what}; {REMEDY}", reason=reason)


class AnchorFile:
    """Heads of the chain, one line ``number hash`` each, appended and flushed; also the lock between processes.

    An anchor is written *after* its row is committed, so after a crash the ledger may be ahead of its anchors,
    never behind. A last line that was cut short by a crash is not counted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the ledger against other processes; freed by the system if this one dies.

        Raises:
            EnvironmentProblem: another process does not let go of it.
        """
        with locked_file(self.path, "privacy ledger"):
            yield

    def last(self) -> tuple[int, str] | None:
        """The latest anchor, or None."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        for line in reversed(lines):
            number, _, head = line.decode("ascii", "replace").partition(" ")
            if number.isdigit() and len(head) == 64:
                return int(number), head
        return None

    def append(self, entry: Entry) -> None:
        """Write down ``entry`` as the head; on disk when this returns."""
        # The new line starts on its own, whatever a crash left at the end of the file.
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            torn = False
            if size:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.seek(0, os.SEEK_END)
            file.write(b"\n" * torn + f"{entry.id} {entry.hash}\n".encode())
            file.flush()
            os.fsync(file.fileno())
