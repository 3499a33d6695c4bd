# SPDX-License-Identifier: Apache-2.0
"""The default engine: hospitals on one machine, stepped in turn or spread over worker processes.

With one worker the sites live in this process and arrays are handed over by reference: no copy, no start-up
cost. With more, each site is bound to one worker for the whole run, so its optimiser, data and ledger
connection stay warm with fewer workers than sites. Workers are forked from a clean server process
(``forkserver``) that has imported torch once. A worker that dies (out of memory, ``kill -9``) is one lost
site for that exchange; it is started again for the next one and its sites go on from their own saved state.

The result does not depend on the number of workers: each site computes with ``training.threads`` threads and
its own random streams, and aggregation does not depend on the order of replies.
"""

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ...client.settings import SiteSettings
from ...privacy.contract import Refusal, Reply, Request
from ...privacy.errors import Reason

__all__ = ["InProcessTransport", "default_workers", "end_with_parent", "quiet_main"]


def default_workers(sites: int, threads: int) -> int:
    """As many workers as there are sites, within the processor's cores."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(sites, cores // threads))


class InProcessTransport:
    """Transport to sites on this machine. A context manager: leaving it ends the workers.

    Args:
        sites: settings of each site.
        workers: processes; 1 computes in this process.
    """

    def __init__(self, sites: Mapping[str, SiteSettings], *, workers: int = 1) -> None:
        self._settings = dict(sorted(sites.items()))
        self._local: dict[str, Any] = {}
        self._pool: list[_Worker] = []
        if workers > 1:
            groups: list[list[SiteSettings]] = [[] for _ in range(min(workers, len(sites)))]
            # The largest sites first, each to the least loaded worker; held-out sites only evaluate.
            for settings in sorted(sites.values(), key=lambda s: (s.role.value, s.public_size), reverse=True):
                min(groups, key=lambda g: sum(s.public_size for s in g)).append(settings)
            self._pool = [_Worker(group) for group in groups]

    def __enter__(self) -> "InProcessTransport":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._pool:
            worker.stop()
        for site in self._local.values():
            site.close()

    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self._settings)

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        """See :class:`~fedneuro.privacy.contract.Transport`; without workers there is nothing to time out."""
        for name in requests.keys() - self._settings.keys():  # it took part before the run was resumed
            yield Refusal(site=name, kind=requests[name].kind, round=requests[name].round, reason=Reason.LOST)
        requests = {name: request for name, request in requests.items() if name in self._settings}
        if not self._pool:
            from ...client.site import Site

            for name, request in requests.items():
                site = self._local.setdefault(name, Site(self._settings[name]))
                yield site.handle(request)
            return
        deadline = time.monotonic() + timeout
        busy = [worker for worker in self._pool if worker.send(requests)]
        while busy:
            ready = wait([w.connection for w in busy], max(0.0, deadline - time.monotonic()))
            for worker in [w for w in busy if w.connection in ready]:
                yield from worker.receive()
            if not ready:
                for worker in busy:
                    yield from worker.abandon(Reason.TIMEOUT)
            busy = [worker for worker in busy if worker.pending]


class _Worker:
    """A process that owns some sites."""

    def __init__(self, settings: list[SiteSettings]) -> None:
        self._settings = {s.name: s for s in settings}
        self.pending: dict[str, Request] = {}
        self.connection: Connection
        self._process: BaseProcess
        self._start()

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["fedneuro.client.site"])
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(self._settings.values())), daemon=True)
        with quiet_main():
            self._process.start()
        theirs.close()

    def send(self, requests: Mapping[str, Request]) -> bool:
        """Send this worker's part of ``requests``; False if it has none."""
        self.pending = {name: request for name, request in requests.items() if name in self._settings}
        if not self.pending:
            return False
        if not self._process.is_alive():
            self.stop()
            self._start()
        with suppress(OSError):  # a death meanwhile shows as end-of-file in receive()
            self.connection.send(self.pending)
        return True

    def receive(self) -> Iterator[Reply]:
        """One reply, or the loss of all pending sites if the process is gone."""
        try:
            name, reply = self.connection.recv()
        except (EOFError, OSError):
            yield from self.abandon(Reason.LOST)
            return
        del self.pending[name]
        yield reply

    def abandon(self, reason: Reason) -> Iterator[Reply]:
        """Give up the pending sites and end the process; the next exchange starts a new one."""
        self.stop()
        for name, request in list(self.pending.items()):
            del self.pending[name]
            yield Refusal(site=name, kind=request.kind, round=request.round, reason=reason)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.kill()
        self._process.join()


class quiet_main:  # noqa: N801 - a context manager that reads as a verb
    """Keep a worker from importing the main module again: it is a console script, and holds nothing it needs."""

    def __enter__(self) -> None:
        self._file = getattr(sys.modules["__main__"], "__file__", None)
        if self._file is not None:
            sys.modules["__main__"].__file__ = None

    def __exit__(self, *_: object) -> None:
        sys.modules["__main__"].__file__ = self._file


def _serve(connection: Connection, settings: list[SiteSettings]) -> None:
    """Main loop of a worker: requests come as one dict per exchange, replies go back one by one."""
    from ...client.site import Site

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    sites = {s.name: Site(replace(s)) for s in settings}
    while True:
        try:
            requests: dict[str, Request] = connection.recv()
            for name, request in requests.items():
                connection.send((name, sites[name].handle(request)))
        except (EOFError, OSError):
            return


def end_with_parent() -> None:
    """Body of a thread: this process ends when its parent does, however that ends."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(0)
