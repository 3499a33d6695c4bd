# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive the command that started them.

Each child is started through this module (``python -m fedneuro.privacy.processes``), which asks the kernel
to kill it when its parent dies, before it loads anything; so not even ``kill -9`` of the command leaves an
orphan. Otherwise the context manager ends all of them: first politely, then for good. Children live in a
session of their own, so Ctrl-C at a terminal reaches the command alone, which ends them in order.
"""

import ctypes
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import EnvironmentProblem

__all__ = ["Processes", "become", "claim_port", "end_with_parent", "ending"]

PATIENCE_SECONDS = 6.0
"""Flower's own processes end within five seconds of a signal."""
_PR_SET_PDEATHSIG = 1


class Processes:
    """Children by name. A context manager: leaving it ends them all.

    Args:
        logs: folder of one log file per child, ``NAME.log``.
        env: variables for every child, beside the command's own.
    """

    def __init__(self, logs: Path, env: Mapping[str, str]) -> None:
        self._logs = logs
        self._env = {**os.environ, **env}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, entry: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """Start ``entry`` (``module:function``) as a process; returns its id."""
        command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), name, entry, *arguments]
        with self.log(name).open("ab") as log:
            self._children[name] = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._env, **(env or {})},
                start_new_session=True,
            )
        return self._children[name].pid

    def start_program(self, name: str, command: Sequence[str]) -> int:
        """Start a program that is not Python's, bound to this process in the same way; returns its id."""
        return self.start(name, f"{__name__}:become", list(command))

    def log(self, name: str) -> Path:
        """Log file of a child."""
        return self._logs / f"{name}.log"

    def pid(self, name: str) -> int:
        """Process id of a child."""
        return self._children[name].pid

    def code(self, name: str) -> int | None:
        """Exit code of a child (negative: the signal that ended it), or None while it runs."""
        return self._children[name].poll()

    def last_line(self, name: str) -> str:
        """The last line of a child's log, for an error message."""
        try:
            lines = self.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return "no log"
        return lines[-1][:300] if lines else "its log is empty"

    def stop(self, *names: str) -> None:
        """End the named children, or all of them, and wait until they are gone."""
        chosen = [self._children[name] for name in names or tuple(reversed(self._children))]
        # From here on Ctrl-C must not leave half of them behind.
        previous = _ignore_interrupts()
        try:
            for child in chosen:
                _signal_group(child, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_SECONDS
            for child in chosen:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.05, deadline - time.monotonic()))
                _signal_group(child, signal.SIGKILL)
                child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def become() -> None:
    """Become the program on the command line.

    The kernel ends it with its parent too (prctl(2) outlives execve), but politely: a program such as nginx has
    workers of its own, which only it can end.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - our own command


def claim_port(port: int = 0) -> int:
    """A port of 127.0.0.1 that is free now: any, or exactly ``port``.

    Raises:
        EnvironmentProblem: ``port`` is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            text = f"port {port} of 127.0.0.1 is in use ({error.strerror}); stop what uses it, or give another port"
            raise EnvironmentProblem(text) from error
        return int(probe.getsockname()[1])


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _ignore_interrupts() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}


def _signal_group(child: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Signal a child and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent ends, however that ends.

    Args:
        parent: its process id; the thread that started this one must live as long.
    """
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except AttributeError:  # not Linux: look now and then
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        sys.exit(1)  # the parent died before the kernel knew


def _run_child(parent: int, name: str, entry: str, arguments: list[str]) -> None:
    """Bind this process to its parent, then become ``entry``."""
    end_with_parent(parent)
    module, function = entry.split(":")
    sys.argv = [name, *arguments]
    try:
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as request:
        code = request.code
    except BaseException:
        traceback.print_exc()
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python takes seconds to tear down torch and MONAI module by module; nothing is left to do there.
    os._exit(code if isinstance(code, int) else 0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _run_child(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
