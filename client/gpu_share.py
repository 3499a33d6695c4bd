# SPDX-License-Identifier: Apache-2.0
"""How much of a shared GPU's memory this process may take: what the hospital's policy says."""

import torch

__all__ = ["limit_gpu_memory"]

_set: list[float] = [1.0]


def limit_gpu_memory(fraction: float) -> None:
    """Take at most ``fraction`` (0 to 1] of every GPU's memory; beyond it PyTorch raises out-of-memory."""
    if fraction == _set[-1] or not torch.cuda.is_available():
        return
    for device in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(fraction, device)
    _set[-1] = fraction
