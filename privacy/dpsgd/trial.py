# SPDX-License-Identifier: Apache-2.0
"""Choosing a path by trying it: the real network, the real shapes, made-up patients.

Which path is faster depends on the network, the crops, the library and the machine; nothing but a trial tells. Two
machines may choose differently, and gradients of two paths differ in their last bits. That touches private training
only, whose noise nobody can repeat anyway; training without privacy never comes here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import nn

from ..errors import BadInput
from .hooks import OpacusHooks
from .paths import Loop, Loss, Path, Vmap, trainable
from .proof import synthetic_patients

__all__ = ["Choice", "Engine", "choose_path"]

Engine = Literal["auto", "loop", "vmap", "opacus"]

_WORTH = 60.0  # seconds of training below which a trial costs more than it can save
_MEMORY = 0.5  # share of the free memory that a path may take
_CLOSE = 1.05  # candidates within so much of the fastest count as equal
_GROUPS = (1, 2, 4)  # patients at once; larger groups were not faster on CPU, and wasted more on filling up


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A path, and why it was taken. For the site's own log.

    Attributes:
        path: to hand to :class:`~.gradient.PatientGradient`.
        reason: one line for the log.
        seconds: expected time of a step by candidate, where tried.
    """

    path: Path
    reason: str
    seconds: dict[str, float]


def choose_path(
    network: nn.Module,
    loss: Loss,
    shape: Sequence[int],
    *,
    engine: Engine = "auto",
    autocast: torch.dtype | None = None,
    physical_batch: int = 0,
    expected_patients: float = 8.0,
    steps: float = float("inf"),
    most_patients: int = 4,
) -> Choice:
    """The fastest path that fits into memory; of those nearly as fast, the one that takes the least.

    Args:
        network: as it will be trained, on its device. Its weights are not changed; no gradient is kept.
        loss: as it will be used.
        shape: one patient's images ``(K, channels, *spatial)``, as they will be.
        engine: ``auto``: try all; ``loop``, ``vmap``: try what belongs to it; ``opacus``: take the hooks.
        autocast: arithmetic of forward and backward; None: float32.
        physical_batch: crops that may be in memory at once; 0: as the memory allows.
        expected_patients: public expected number of patients in a step; a last group is filled up, which costs.
        steps: steps to come; little work is not worth a trial.
        most_patients: patients that may be computed at once.

    Raises:
        BadInput: no path of ``engine`` works for the network, with what was wrong.
    """
    if engine == "opacus":
        if autocast is not None:
            raise BadInput('privacy.engine = "opacus" computes in float32; set training.precision = "float32"')
        patients = max(1, min(most_patients, physical_batch // shape[0])) if physical_batch else most_patients
        return Choice(path=OpacusHooks(network, loss, patients=patients), reason="opacus hooks: the study", seconds={})
    crops = shape[0]
    candidates: list[Path] = []
    if engine in ("auto", "loop"):
        candidates.append(Loop(network, loss, autocast=autocast, physical_batch=physical_batch))
        if autocast is not None:
            candidates.append(Loop(network, loss, autocast=autocast, physical_batch=physical_batch, channels_last=True))
    if engine in ("auto", "vmap"):
        groups = [n for n in _GROUPS if n <= most_patients and (not physical_batch or n * crops <= physical_batch)]
        if engine == "vmap" and not groups:
            raise BadInput(
                f'privacy.engine = "vmap" takes all {crops} crops of a patient at once, and '
                f"privacy.physical_batch = {physical_batch} forbids it; raise it, or use the loop"
            )
        candidates += [Vmap(network, loss, patients=n, autocast=autocast) for n in groups]
    return _fastest(network, shape, candidates, expected_patients, steps)


def _fastest(network: nn.Module, shape: Sequence[int], candidates: list[Path], expected: float, steps: float) -> Choice:
    steppers: dict[str, tuple[Path, Callable[[], float]]] = {}
    faults: dict[str, str] = {}
    seconds: dict[str, float] = {}
    first: dict[str, float] = {}
    free, used = _free_memory(network), 0
    for path in candidates:
        if used and used * path.patients > _MEMORY * free:
            faults[path.name] = "not enough memory"
            continue
        try:
            group, held = _prepare(network, shape, path)
            took = group()
        except Exception as error:  # whatever a network does under vmap or on a full device: another path may do
            text = str(error).strip().splitlines()
            faults[path.name] = f"{type(error).__name__}: {text[0][:120] if text else ''}"
            continue
        used = used or held
        steppers[path.name], first[path.name] = (path, group), took
        if len(steppers) == 1 and (work := took * expected / path.patients * steps) < _WORTH:
            reason = f"{path.name}: about {work:.0f} s of training, not worth a trial"
            return Choice(path=path, reason=reason, seconds={})
    if not steppers:
        raise BadInput(
            "; ".join(f"{name} does not work for this network: {what}" for name, what in faults.items())
            or "no path to try"
        )
    for name, (path, group) in steppers.items():
        # A last group is filled up; on average it is half full.
        groups = expected / path.patients + (path.patients - 1) / (2 * path.patients)
        seconds[name] = min(first[name], group()) * groups
    # Memory grows with the group, so a larger one has to be faster by more than a trial can err.
    good = [name for name, value in seconds.items() if value <= _CLOSE * min(seconds.values())]
    best = min(good, key=lambda name: (steppers[name][0].patients, seconds[name]))
    shown = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    left_out = "".join(f"; {name} left out: {what}" for name, what in faults.items())
    return Choice(path=steppers[best][0], reason=f"{best} (a step: {shown}{left_out})", seconds=seconds)


def _prepare(network: nn.Module, shape: Sequence[int], path: Path) -> tuple[Callable[[], float], int]:
    """Warm up; returns what computes one group and says its seconds, and the bytes that one patient's pass keeps."""
    device = next(network.parameters()).device
    patients = synthetic_patients(network, shape, count=max(2, path.patients))[-path.patients :]
    images, labels = torch.stack([i for i, _ in patients]), torch.stack([y for _, y in patients])
    held = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    # On one thread of a shared machine the process's own time says more than the clock.
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def group() -> float:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _wait(device)
            start = clock()
            path.gradients(images, labels)
            _wait(device)
            return clock() - start

    if isinstance(path, Loop):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            group()
        held += 3 * sum(4 * p.numel() for p in trainable(network).values())
    else:
        group()
    return group, held


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory(network: nn.Module) -> int:
    device = next(network.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
