# SPDX-License-Identifier: Apache-2.0
"""Processes that a test started, and all that these started."""

import os
from contextlib import suppress

import psutil

__all__ = ["living"]


def living(leader: int | None) -> list[int]:
    """Numbers of the living processes of the session that ``leader`` began (``start_new_session``)."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
