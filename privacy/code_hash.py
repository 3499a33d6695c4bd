# SPDX-License-Identifier: Apache-2.0
"""Which code computes: one digest of the installed FedNeuro, for the audit log and the manifest of a run."""

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["code_hash"]

_SOURCE = Path(__file__).parents[1]
_ROOMS = ("client", "models", "privacy", "server", "simulations")


@cache
def code_hash() -> str:
    """``record:`` and the SHA-256 of the installation's RECORD, which holds the SHA-256 of every file.

    An editable installation has no such record: ``source:`` and the digest of the source files then.
    """
    try:
        installed = distribution("fedneuro")
        record = installed.read_text("RECORD") or ""
    except PackageNotFoundError:
        record = ""
    if any(line.startswith("fedneuro/client/") for line in record.splitlines()):
        return f"record:{hashlib.sha256(record.encode()).hexdigest()}"
    state = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (_SOURCE / room).rglob("*.py")):
        state.update(f"{path.relative_to(_SOURCE)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"source:{state.hexdigest()}"
