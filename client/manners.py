# SPDX-License-Identifier: Apache-2.0
"""Manners on a shared machine: when the node must let others work, and why.

Training holds while one of these is true, within 0.2 s wherever it is, and goes on where it stopped:

    1. the hospital said ``fedneuro-node pause``
    2. it is none of the hours that the policy's ``[[windows]]`` permit
    3. another process uses the GPU, if ``[sandbox] yield_gpu = true``

The memory that training has on the GPU stays with it meanwhile; how much that may be is
``limits.gpu_memory_fraction`` of the policy.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from ..privacy.errors import FedNeuroError
from .policy import PolicyFile
from .run_folder import RunFolder

__all__ = ["Manners", "gpu_neighbours", "query_gpus"]

LOOK_SECONDS = 5.0
"""Between two looks at the policy and the GPU; the pause file is looked for each time."""
NEIGHBOUR_MIB = 256
"""A process with less is idle: a context without work takes about this much."""


def query_gpus(seconds: float = 10.0) -> str:
    """What ``nvidia-smi`` says about processes that compute; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_neighbours(text: str, ours: Collection[int]) -> dict[int, int]:
    r"""Other processes on the GPUs and the MiB that each takes, from :func:`query_gpus`.

    Args:
        text: lines ``pid, MiB``; the second is ``[N/A]`` inside a virtual machine or container, which counts as busy.
        ours: process ids of the node.

    Example:
        >>> gpu_neighbours("812, 5120\n977, 12\n4, [N/A]\n", ours={4})
        {812: 5120}
    """
    found: dict[int, int] = {}
    for line in text.splitlines():
        pid_text, _, memory_text = line.partition(",")
        with suppress(ValueError):
            pid = int(pid_text)
            memory = memory_text.strip()
            mib = int(memory) if memory.isdigit() else NEIGHBOUR_MIB
            if pid not in ours and mib >= NEIGHBOUR_MIB:
                found[pid] = found.get(pid, 0) + mib
    return found


class Manners:
    """Says whether to hold, and why.

    Args:
        folder: of the pause file.
        policy: the hospital's; its windows count.
        yield_gpu: give way to other processes on the GPU.
        ours: process ids of the node, which are not others.
        now: local time.
        gpus: text of :func:`query_gpus`.
    """

    def __init__(
        self,
        folder: RunFolder,
        policy: Path | None,
        *,
        yield_gpu: bool = False,
        ours: Callable[[], Collection[int]] = lambda: (),
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        gpus: Callable[[], str] = query_gpus,
    ) -> None:
        self._folder = folder
        self._policy = PolicyFile(policy) if policy else None
        self._yield_gpu, self._ours, self._now, self._gpus = yield_gpu, ours, now, gpus
        self._looked, self._slow = float("-inf"), ""

    def hold(self) -> str:
        """Why the node must hold now; empty if it may work."""
        if self._folder.paused:
            return "paused by the hospital"
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._slow, self._looked = self._look(), time.monotonic()
        return self._slow

    def _look(self) -> str:
        if self._policy is not None:
            # A policy that cannot be read is for the gates, which refuse; it is no reason to hold a task.
            with suppress(FedNeuroError):
                if not self._policy.look()[0].open_at(self._now()):
                    return "outside the hours of the policy"
        if self._yield_gpu and (others := gpu_neighbours(self._gpus(), self._ours())):
            return f"process {min(others)} uses the GPU"
        return ""
