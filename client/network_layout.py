# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of the arrays of a study's network, counted without making any of them.

Counting needs PyTorch, which takes 300 MB of memory and stays. The runner judges studies and computes nothing, so where
PyTorch is not loaded, another process counts, once for each network: the one that is to train, which loads PyTorch
anyway, while nobody has asked it for anything yet; else one that ends after it.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache

from ..models.spec import ModelSection
from ..privacy.errors import EnvironmentProblem

__all__ = ["COUNT_SECONDS", "Counter", "Layout", "count", "count_with", "network_layout"]

COUNT_SECONDS = 120.0
"""Loading PyTorch takes a while on a busy machine."""
Layout = tuple[tuple[str, int, int], ...]
"""Name, numbers and bytes of each array."""
Counter = Callable[[str, int, int], Layout | None]
"""Takes the arguments of :func:`network_layout`; gives nothing where it cannot count."""

_counters: list[Counter] = []


def count_with(*counters: Counter) -> None:
    """From now on ask these, in this order, before a process is started to count; by default none."""
    _counters[:] = counters


@lru_cache(maxsize=16)
def network_layout(section: str, in_channels: int, channels: int) -> Layout:
    """The floating-point arrays of a network, in its order.

    Args:
        section: the study's section ``[model]``, JSON.
        in_channels: of the images.
        channels: of the network's output.

    Raises:
        EnvironmentProblem: the process that counts does not end well.
    """
    if "torch" in sys.modules:
        return count(section, in_channels, channels)
    for counter in _counters:
        if (found := counter(section, in_channels, channels)) is not None:
            return found
    command = [sys.executable, "-I", "-m", "fedneuro.client.network_layout", section, str(in_channels), str(channels)]
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            command, capture_output=True, text=True, check=False, timeout=COUNT_SECONDS
        )
        counted = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"the arrays of the study's network cannot be counted: {error}") from error
    if counted is None:
        why = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise EnvironmentProblem(f"the arrays of the study's network cannot be counted: {why[:300]}")
    return tuple((str(name), int(numbers), int(size)) for name, numbers, size in counted)


def count(section: str, in_channels: int, channels: int) -> Layout:
    """Count in this process; arguments as of :func:`network_layout`."""
    import torch

    from ..models.networks import BUILDERS

    model = ModelSection.model_validate_json(section)
    with torch.device("meta"):
        network = BUILDERS[model.name](model, in_channels, channels)
    tensors = network.state_dict().items()
    return tuple((name, t.numel(), t.numel() * t.element_size()) for name, t in tensors if t.is_floating_point())


if __name__ == "__main__":
    gc.disable()  # a quarter of the time that loading takes: models/heavy.py
    print(json.dumps(count(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
