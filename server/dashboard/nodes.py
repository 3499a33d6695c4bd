# SPDX-License-Identifier: Apache-2.0
"""Who is online, as the SuperLink of a running ``start`` knows it, looked up beside the pages that show it."""

import logging
import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import httpx

from ...privacy.errors import FedNeuroError
from ..consortium import Consortium

if TYPE_CHECKING:
    from ..control import Control, NodeState

__all__ = ["Nodes"]

LOOK_SECONDS = 1.0
WANTED_SECONDS = 60.0
"""Without a reader for so long, nothing is asked."""
_log = logging.getLogger("fedneuro.dashboard")


class Nodes:
    """A thread that asks, while somebody wants to know; a page never waits for it.

    Args:
        consortium: whose SuperLink.
    """

    def __init__(self, consortium: Consortium) -> None:
        self._place = "127.0.0.1", consortium.settings.ports.superlink
        self._authority = consortium.folder / "ca" / "root.crt"
        self._found: Mapping[str, NodeState] | None = None
        self._asked = threading.Event()
        self._control: Control | None = None
        self._wanted = 0.0
        self._wake, self._end = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def is_asked(self) -> bool:
        """Whether :meth:`now` speaks of the present; not yet just after the start and after a pause."""
        return self._asked.is_set()

    def now(self, patience: float = 0.0) -> "Mapping[str, NodeState] | None":
        """Each node by name, at most two seconds old; None: ``start`` does not run, or nobody asked yet.

        Args:
            patience: seconds to wait for the first answer.
        """
        self._wanted = time.monotonic()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="nodes", daemon=True)
                self._thread.start()
        self._wake.set()
        if patience:
            self._asked.wait(patience)
        return self._found

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10)

    def _follow(self) -> None:
        while not self._end.is_set():
            self._found = self._look()
            self._asked.set()
            self._end.wait(LOOK_SECONDS)
            self._wake.clear()  # before the look at the clock: who asks meanwhile wakes it again
            if not self._end.is_set() and time.monotonic() - self._wanted > WANTED_SECONDS:
                self._asked.clear()
                self._found = None
                self._wake.wait()
        if self._control is not None:
            self._control.close()

    def _look(self) -> "Mapping[str, NodeState] | None":
        try:
            with socket.create_connection(self._place, 1.0):
                pass  # Flower is loaded only where there is somebody to speak to
            if self._control is None:
                from ..control import Control

                self._control = Control(f"{self._place[0]}:{self._place[1]}", self._authority)
            return {node.name: node for node in self._control.nodes()}
        except (OSError, httpx.HTTPError, FedNeuroError) as error:
            _log.debug("the SuperLink does not answer: %s", error)
            return None
