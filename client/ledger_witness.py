# SPDX-License-Identifier: Apache-2.0
"""The audit log as the privacy ledger's witness: an old copy of the ledger is noticed, also with its anchors.

The ledger keeps its heads beside itself (``ledger.db.anchors``), so whoever restores an old state folder by halves, or
wants to spend a budget twice, puts both back. The audit log is another file, under the signature of the node's key. So
the runner, which alone writes it (the process that trains never does), writes the ledger's head down there too:

    before the work              a private request is refused unless the ledger still holds the row that the log names
    before an answer leaves      the ledger's head is in the log; where that fails, nothing leaves
    after a refusal              the same, for what was charged until then

Guarantee: no private answer leaves before the charge that paid for it stands in the audit log. Ledger *and* log put
back together contradict the coordinator's receipt.

An entry of kind ``ledger`` holds ``entries``, the number of the ledger's last row, and ``head``, its hash. A hospital
that has to begin a new ledger says so itself (:func:`accept_ledger`), and that is an entry too.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..privacy.contract import Request
from ..privacy.errors import LedgerDistrusted
from ..privacy.ledger import Ledger
from ..privacy.ledger_chain import Entry as Row
from ..privacy.ledger_chain import check_anchor
from .audit import AuditLog
from .audit_chain import Entry, verify_log
from .settings import SiteSettings

__all__ = ["LedgerWitness", "accept_ledger", "check_witness", "may_charge"]

Anchor = tuple[int, str]


def may_charge(request: Request) -> bool:
    """Whether the answer to ``request`` is paid for from the ledger."""
    privacy = request.study.privacy
    if privacy.mode == "none" or request.kind == "hello":
        return False
    return request.kind != "evaluate" or privacy.metrics == "noise"


class LedgerWitness:
    """Compares a site's ledger with its audit log, and notes where the ledger stands.

    Args:
        settings: the site's.
        log: its audit log.
        append: adds an entry to it; a parameter so that every entry of the node takes one way.
    """

    def __init__(self, settings: SiteSettings, log: AuditLog, append: Callable[..., Any]) -> None:
        self._settings, self._log, self._append = settings, log, append
        self._ledger: Ledger | None = None

    def check(self) -> None:
        """Before private work.

        Raises:
            LedgerDistrusted: the ledger does not hold what the log says; reason ``ledger-rolled-back``.
            Refused: the log is not as it was written.
            OSError, EnvironmentProblem: one of them cannot be read.
        """
        self._rows(self._noted())

    def note(self) -> None:
        """After private work: the ledger's head is in the log when this returns. Raises as :meth:`check`."""
        noted = self._noted()
        rows = self._rows(noted)
        if rows and _head(rows) != noted:
            count, head = _head(rows)
            self._append("ledger", entries=count, head=head)

    def _noted(self) -> Anchor | None:
        return _anchor(self._log.latest("ledger"))

    def _rows(self, noted: Anchor | None) -> list[Row]:
        path = self._settings.ledger
        rows: list[Row] = []
        if _exists(path):
            self._ledger = self._ledger or Ledger(path, self._settings.name)
            rows = self._ledger.entries()
        _compare(rows, noted, path)
        return rows


def check_witness(settings: SiteSettings, rows: list[Row]) -> None:
    """Refuse ledger rows that the audit log contradicts; for commands that look, beside a node that may run.

    Raises:
        LedgerDistrusted: reason ``ledger-rolled-back``.
        Refused: the log is not as it was written.
    """
    if settings.audit.exists():
        _compare(rows, _last_noted(verify_log(settings.audit, None)), settings.ledger)


def accept_ledger(settings: SiteSettings, log: AuditLog) -> tuple[Anchor | None, Anchor]:
    """Note, as a decision of the hospital, that its ledger counts as it now stands; returns what was noted, and is now.

    Raises:
        LedgerDistrusted: the ledger contradicts itself or its own anchors.
    """
    before = _anchor(log.latest("ledger"))
    now = _head(Ledger(settings.ledger, settings.name).entries())
    told = f"{before[0]}:{before[1]}" if before else ""
    log.append("ledger", entries=now[0], head=now[1], accepted=True, instead_of=told)
    return before, now


def _compare(rows: list[Row], noted: Anchor | None, path: Path) -> None:
    if noted is None:
        return
    try:
        check_anchor(rows, noted, path, witness="the audit log")
    except LedgerDistrusted as error:
        text = f"{error}, and confirmed with fedneuro-node audit accept-ledger"
        raise LedgerDistrusted(text, reason=error.reason) from error


def _exists(ledger: Path) -> bool:
    return ledger.exists() or ledger.with_name(ledger.name + ".anchors").exists()


def _head(rows: list[Row]) -> Anchor:
    return rows[-1].id, rows[-1].hash


def _anchor(entry: Entry | None) -> Anchor | None:
    return None if entry is None else (int(entry["entries"]), str(entry["head"]))


def _last_noted(entries: Iterable[Entry]) -> Anchor | None:
    last = None
    for entry in entries:
        last = entry if entry["kind"] == "ledger" else last
    return _anchor(last)
