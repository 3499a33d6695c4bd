# SPDX-License-Identifier: Apache-2.0
"""The hospital's audit log: every message in and out, on disk before the reply is handed over.

``state/audit.jsonl`` only grows; :mod:`.audit_chain` says what is in it and how it is proven. An entry counts once its
line and then the head are flushed to disk. Whatever goes wrong in between raises, and the caller lets nothing out.

Crash: the line of an entry that never counted may be cut short. It is found when the log is opened, kept beside the log
(``audit.torn-N``), and its removal is an entry of its own (``repair``). A line that counted is never removed.

Several processes may append (the node, and ``fedneuro-node approve``): each locks the log and reads what the others
wrote before it adds its own.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..privacy.errors import EnvironmentProblem
from ..privacy.file_lock import locked_file
from .audit_chain import (
    START,
    Entry,
    Head,
    Signer,
    check_log,
    checkpoint_text,
    distrust,
    head_path,
    line_of,
    read_lines,
    seal,
)

__all__ = ["AuditLog"]

EVERY = 100
"""Entries between two checkpoints."""


class AuditLog:
    """The log of hospital ``site`` in the file ``path``. Opened, verified and mended at the first append.

    Args:
        path: ``….jsonl``; made on first use, readable by its owner alone.
        site: the hospital's id.
        key: file of the node's private key; None: no signatures (tests, and hospitals without a node key yet).
        every: entries between two checkpoints.
    """

    def __init__(self, path: Path, site: str, key: Path | None = None, *, every: int = EVERY) -> None:
        self.path = path
        self._site = site
        self._key_path = key
        self._every = every
        self._signer: Signer | None = None
        self._end = -1  # bytes of the log that were verified; -1: not open yet
        self._last: tuple[int, str] = (0, START)
        self._latest: dict[str, Entry] = {}
        self._since = 0

    def append(self, kind: str, *, durable: bool = True, **fields: Any) -> Entry:
        """Add an entry; it is on disk when this returns.

        Args:
            kind: what it is about, such as ``in``, ``out``, ``policy``, ``ledger``.
            durable: False leaves the flush to the next durable entry (for refusals in a flood: nothing left).
            fields: JSON values; the names ``n``, ``at``, ``previous`` and ``hash`` are the log's own.

        Returns:
            The entry as it was written.

        Raises:
            OSError, EnvironmentProblem: it could not be written; let nothing out.
            Refused: the log is not as it was written; reason ``audit-distrusted``.
            BadInput: the node's key cannot be used.
        """
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            entry = self._write(descriptor, kind, fields, durable=durable)
            self._since += 1
            if self._since >= self._every:
                self._checkpoint(descriptor)
        return entry

    def checkpoint(self) -> None:
        """Sign all that was written so far. Raises as :meth:`append`; does nothing without a key."""
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            if self._since:
                self._checkpoint(descriptor)

    @property
    def last(self) -> tuple[int, str]:
        """Number and hash of the last entry that this object saw: to be noted elsewhere."""
        return self._last

    def latest(self, kind: str) -> Entry | None:
        """The last entry of ``kind``, whichever process wrote it; None: there is none. Raises as :meth:`append`."""
        with self._locked() as descriptor:
            self._catch_up(descriptor)
            return self._latest.get(kind)

    # -- writing ---------------------------------------------------------------------------------------

    def _checkpoint(self, descriptor: int) -> None:
        self._since = 0
        if self._signer is not None:
            number, previous = self._last[0] + 1, self._last[1]
            signature = self._signer.sign(checkpoint_text(self._site, number, previous))
            self._write(descriptor, "checkpoint", {"signature": signature})

    def _write(self, descriptor: int, kind: str, fields: dict[str, Any], *, durable: bool = True) -> Entry:
        number, previous = self._last
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = seal({**fields, "n": number + 1, "at": at, "kind": kind, "previous": previous})
        line = line_of(entry)
        try:
            written = os.pwrite(descriptor, line, self._end)
            if written != len(line):
                raise EnvironmentProblem(
                    f"audit log {self.path}: the disk is full; free space, nothing leaves until then"
                )
            if durable:
                os.fsync(descriptor)
        except (OSError, EnvironmentProblem):
            os.ftruncate(descriptor, self._end)  # under the lock: the line never counted
            raise
        self._end += len(line)
        self._last = (entry["n"], entry["hash"])
        self._latest[kind] = entry
        if durable:
            self._write_head()
        return entry

    def _write_head(self) -> None:
        head = Head(n=self._last[0], hash=self._last[1], site=self._site)
        if self._signer is not None:
            head = Head(n=head.n, hash=head.hash, site=head.site, signature=self._signer.sign(head.text))
        path = head_path(self.path)
        temporary = path.with_name(path.name + ".new")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(head.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    # -- opening ---------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The log, open and held against other processes; freed by the system if this one dies."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(self.path, "audit log") as descriptor:
            yield descriptor

    def _catch_up(self, descriptor: int) -> None:
        """Verify what is new since the last look: everything at the first one."""
        size = os.fstat(descriptor).st_size
        if self._end < 0:
            self._open(descriptor, size)
        elif size != self._end:
            if size < self._end:
                raise distrust(self.path, f"it was cut short while the node ran: {self._end} bytes were written")
            entries = read_lines(_read(descriptor, self._end, size), self._last[1], self._last[0] + 1, self.path)
            self._advance(entries, size)

    def _advance(self, entries: list[Entry], size: int) -> None:
        self._end = size
        for entry in entries:
            self._last = (entry["n"], entry["hash"])
            self._latest[str(entry["kind"])] = entry
            self._since = 0 if entry["kind"] == "checkpoint" else self._since + 1

    def _open(self, descriptor: int, size: int) -> None:
        if self._key_path is not None and self._signer is None:
            self._signer = Signer(self._key_path)
        head = Head.read(self.path)
        content = _read(descriptor, 0, size)
        whole = content.rfind(b"\n") + 1
        entries = read_lines(content[:whole], START, 1, self.path)
        torn = content[whole:]
        if head is not None and len(entries) < head.n:
            raise distrust(self.path, f"it was cut short: it has {len(entries)} entries, its head says {head.n}")
        if not entries:
            self._mend(descriptor, torn, 0, 1)
            self._end, self._last = 0, (0, START)
            key = self._signer.public_pem if self._signer else ""
            self._write(descriptor, "begin", {"site": self._site, "public_key": key})
        else:
            if head is None and len(entries) == 1:  # killed between the first line and the first head
                head = Head(n=1, hash=entries[0]["hash"], site=str(entries[0].get("site")))
                check_log(entries, head, None, self.path)
            else:
                check_log(entries, head, self._signer.public if self._signer else None, self.path)
            if entries[0]["site"] != self._site:
                raise distrust(self.path, f"it is of hospital {entries[0]['site']}, not {self._site}")
            self._mend(descriptor, torn, whole, len(entries) + 1)
            self._advance(entries, whole)
        if torn:
            fields = {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}
            self._write(descriptor, "repair", fields)

    def _mend(self, descriptor: int, torn: bytes, whole: int, number: int) -> None:
        """Keep the bytes of a line that was cut short beside the log, then take them out of it."""
        if torn:
            beside = self.path.with_suffix(f".torn-{number}")
            beside.write_bytes(torn)
            beside.chmod(0o600)
            os.ftruncate(descriptor, whole)


def _read(descriptor: int, start: int, end: int) -> bytes:
    parts = []
    while start < end and (part := os.pread(descriptor, min(end - start, 1 << 24), start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)
