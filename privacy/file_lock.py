# SPDX-License-Identifier: Apache-2.0
"""Locks of the kernel (flock(2)), which end with their process: one writer of ledger and audit log; who is alive."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import EnvironmentProblem

__all__ = ["PATIENCE", "is_locked", "locked_file"]

PATIENCE = 60.0
"""Seconds that are waited for another process."""


def is_locked(path: Path) -> bool:
    """Whether a live process holds the file; False also where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def locked_file(path: Path, what: str) -> Iterator[int]:
    """The file's descriptor, open for reading and writing and held against other processes.

    The file is made if it is not there, for its owner alone. The system frees it if this process dies.

    Args:
        path: the file; its folder exists.
        what: its name in the error.

    Raises:
        EnvironmentProblem: another process did not let go of it in :data:`PATIENCE`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EnvironmentProblem(
                        f"{what}: {path} is held by another process for more than {PATIENCE:g} s; "
                        "end the other process of this site"
                    ) from None
                time.sleep(0.01)
        yield descriptor
    finally:
        os.close(descriptor)
