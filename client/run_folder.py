# SPDX-License-Identifier: Apache-2.0
"""``state/run``: where a node's processes and its commands meet. Small files, no socket to protect.

node.lock, runner.lock   held with flock(2) by the process that lives; the kernel lets go when it dies
node.json, runner.json   what each process says about itself; replaced whole
lease.json, lease.lock   the SuperNode's note for the one that is started after it died (:mod:`.lease`)
pause                    the node is paused while it is there, also over a restart
scratch                  the only temporary folder of the process that trains
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..privacy.errors import EnvironmentProblem
from ..privacy.file_lock import is_locked

__all__ = ["Held", "RunFolder", "claim_identity"]


@dataclass(slots=True)
class Held:
    """A lock; dropping it, or the end of the process, releases it."""

    descriptor: int

    def release(self) -> None:
        """Let go."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RunFolder:
    """The run folder of a node's ``state`` folder.

    Args:
        state: ``site.state`` of node.toml.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / "run"

    def make(self) -> None:
        """Create it.

        Raises:
            EnvironmentProblem: the state folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.scratch.mkdir(exist_ok=True, mode=0o700)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            why = error.strerror or str(error)
            text = f"{self.path}: the state folder cannot be written ({why})"
            raise EnvironmentProblem(f"{text}; give the node's user write permission, and the disk space") from error

    @property
    def scratch(self) -> Path:
        """Temporary files of the process that trains."""
        return self.path / "scratch"

    # -- locks -----------------------------------------------------------------------------------------

    def hold(self, name: str, what: str) -> Held:
        """Take the lock ``name``.

        Raises:
            EnvironmentProblem: another process has it.
        """
        self.make()
        descriptor = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            pid = self.read(name).get("pid", "unknown")
            text = f"{what} runs already on {self.path.parent} (process {pid})"
            raise EnvironmentProblem(f"{text}; fedneuro-node stop ends it") from error
        return Held(descriptor)

    def is_held(self, name: str) -> bool:
        """Whether a live process has the lock ``name``."""
        return is_locked(self.path / f"{name}.lock")

    # -- what processes say ----------------------------------------------------------------------------

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Replace ``NAME.json``; a full disk is no reason to stop."""
        with suppress(OSError):
            part = self.path / f".{name}.{os.getpid()}"
            part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path / f"{name}.json")

    def read(self, name: str) -> dict[str, Any]:
        """``NAME.json``, or nothing."""
        try:
            found = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    # -- pause -----------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether the hospital paused its node."""
        return (self.path / "pause").exists()

    def read_pause(self) -> dict[str, Any] | None:
        """Since when and why the node is paused; None if it is not."""
        if not self.paused:
            return None
        try:
            found = json.loads((self.path / "pause").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # made by hand: touch state/run/pause
        return found if isinstance(found, dict) else {}

    def pause(self, why: str) -> None:
        """Pause the node, now and after a restart.

        Raises:
            EnvironmentProblem: the state folder cannot be written.
        """
        self.make()
        (self.path / "pause").write_text(json.dumps({"since": time.time(), "why": why}) + "\n", encoding="utf-8")

    def resume(self) -> bool:
        """End a pause; False if there was none."""
        there = self.paused
        (self.path / "pause").unlink(missing_ok=True)
        return there


def claim_identity(key: Path) -> socket.socket:
    """Refuse a second node of this machine with the same private key, from whatever folder it was started.

    The name is one of the kernel's abstract socket names, which vanish with their process (unix(7)).

    Raises:
        EnvironmentProblem: another node has it.
    """
    name = hashlib.sha256(b"fedneuro-node\0" + key.read_bytes()).hexdigest()
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0fedneuro-node-{name}")
    except OSError as error:
        claim.close()
        text = f"{key}: a node with this key runs already on this machine"
        raise EnvironmentProblem(f"{text}; each node needs a key of its own (fedneuro-node enrol)") from error
    return claim
