# SPDX-License-Identifier: Apache-2.0
"""Runs tasks side by side: one process per task, as many at a time as there are workers.

A task computes with one worker of its own, so its bits do not depend on how many run beside it. A task that fails is
written down and the others go on. Ctrl-C, or the death of this process, ends the tasks; what they saved is whole.
"""

import multiprocessing as mp
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from ...privacy.errors import FedNeuroError
from ...server.events import Event
from ..engines.inprocess import end_with_parent, quiet_main
from .tasks import Task

__all__ = ["Failure", "Told", "execute", "failures_text"]

Told = Callable[[str, Event | None], None]
"""Called with a task's name and its event; None: the task has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a task failed: what a command would have printed, and its exit code."""

    text: str
    exit_code: int


def execute(tasks: Sequence[Task], *, cache: Path, workers: int, tell: Told) -> dict[str, Failure]:
    """Perform the tasks that are not done; returns the failures by name.

    Args:
        tasks: in the order in which they are started; the longest first saves time.
        cache: preprocessed scans that all share.
        workers: processes; 1 computes here.
        tell: told of events.
    """
    pending = [task for task in tasks if not task.done()]
    failures: dict[str, Failure] = {}
    if workers > 1 and len(pending) > 1:
        _side_by_side(pending, cache, workers, tell, failures)
        return failures
    for task in pending:
        try:
            task.perform(cache=cache, workers=workers, observer=partial(tell, task.name))
        except FedNeuroError as error:
            failures[task.name] = Failure(text=str(error), exit_code=error.exit_code)
        tell(task.name, None)
    return failures


def _side_by_side(pending: Sequence[Task], cache: Path, workers: int, tell: Told, failures: dict[str, Failure]) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fedneuro.simulations.designs.tasks", "fedneuro.client.site"])
    queue = list(reversed(pending))
    running: dict[str, tuple[BaseProcess, Connection]] = {}
    try:
        while queue or running:
            while queue and _another(len(queue), len(running), workers):
                task = queue.pop()
                running[task.name] = _start(context, task, cache)
            ready = wait([connection for _, connection in running.values()])
            for name, (process, connection) in list(running.items()):
                if connection in ready and not _listen(name, connection, tell, failures):
                    process.join()
                    connection.close()
                    del running[name]
                    tell(name, None)
    finally:
        for process, connection in running.values():
            process.kill()
            process.join()
            connection.close()


def _another(waiting: int, running: int, workers: int) -> bool:
    """Whether one more task begins. The last ones all begin together, half as many again as ``workers`` at most.

    Else the last of three equal tasks would run alone on the second of two cores, which the kernel shares out better.
    """
    return running < workers or 2 * (waiting + running) <= 3 * workers


def _start(context: ForkServerContext, task: Task, cache: Path) -> tuple[BaseProcess, Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_perform, args=(theirs, task, cache), name=task.name)
    with quiet_main():
        process.start()
    theirs.close()
    return process, ours


def _listen(name: str, connection: Connection, tell: Told, failures: dict[str, Failure]) -> bool:
    """Take one message; False where it was the last."""
    try:
        message = connection.recv()
    except (EOFError, OSError):
        text = f"{name}: its process ended (out of memory, or killed); the same command goes on with it"
        failures[name] = Failure(text=text, exit_code=5)
        return False
    if isinstance(message, Event):
        tell(name, message)
        return True
    if isinstance(message, Failure):
        failures[name] = message
    return False


def _perform(connection: Connection, task: Task, cache: Path) -> None:
    """Main function of a task's process: events, and at last a failure or None, go through ``connection``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    last = 0.0

    def observe(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        if event.kind in ("started", "round-done", "finished") or now - last > 1:
            last = now
            with suppress(OSError):
                connection.send(event)

    try:
        task.perform(cache=cache, workers=1, observer=observe)
        outcome: Failure | None = None
    except FedNeuroError as error:
        outcome = Failure(text=str(error), exit_code=error.exit_code)
    except MemoryError:
        outcome = Failure(text=f"{task.name}: out of memory; use fewer --workers", exit_code=5)
    except OSError as error:
        outcome = Failure(text=f"{task.name}: {error.strerror or error} ({error.filename or ''})", exit_code=5)
    with suppress(OSError):
        connection.send(outcome)


def failures_text(failures: Mapping[str, Failure]) -> str:
    """One line per failed task."""
    return "\n".join(f"{name}: {failure.text}" for name, failure in failures.items())
