# SPDX-License-Identifier: Apache-2.0
"""Two ways to the gradients of single patients, with the same result: patient after patient, or a few at once.

``loop``
    forward and backward of one patient's crops, by autograd. Right for every network, in one patient's memory;
    fastest where one patient fills the processor (several crops, large images, many channels).
``vmap``
    ``torch.func.vmap(grad)`` over a few patients, recorded once for the study's fixed shapes with ``make_fx`` and
    replayed as plain operations. Without the record the bookkeeping of ``vmap`` costs 10 to 20 % of a step.

Both compute every patient by itself: company has no part in the formula. Nor may it have one in the *rounding*: if a
patient's gradient differed in its last bits with who else is in the batch (in bfloat16 by a percent), leaving one
patient out would move all the others. So a path computes every patient through the same operations on the same
shapes; a last group that is not full is filled up, never computed in another way.

References: Horace He and Richard Zou, https://pytorch.org/docs/stable/func.html.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap  # pyright: ignore[reportPrivateImportUsage]

from .rows import FusedNorms

__all__ = ["Loop", "Loss", "Path", "Vmap", "trainable"]

Loss = Callable[[Tensor, Tensor], Tensor]


class Path(Protocol):
    """Gradients of single patients.

    Guarantee: what is returned for a patient is a function of that patient's crops and the network alone.
    """

    name: str
    patients: int

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of the mean loss of each patient's crops.

        Args:
            images: ``(N, K, channels, *spatial)`` of exactly :attr:`patients` patients.
            labels: ``(N, K, *spatial)`` or ``(N, K)``.

        Returns:
            One tensor ``(N, *shape)`` per trainable parameter, None where the loss does not reach it; losses ``(N,)``.
        """
        ...


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient, by name, in the network's order, each once."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


class Loop:
    """One patient by autograd.

    Args:
        network: see :func:`trainable`.
        loss: a mean over images.
        autocast: arithmetic of forward and backward; None: float32.
        physical_batch: crops that go through the network at once; 0: all of a patient. Their gradients are
            added with their share as weight, which is exact because the loss is a mean over images.
        channels_last: lay the crops out with channels innermost, which bfloat16 kernels prefer.
    """

    patients = 1

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        autocast: torch.dtype | None = None,
        physical_batch: int = 0,
        channels_last: bool = False,
    ) -> None:
        self.name = "loop, channels last" if channels_last else "loop"
        self._network, self._loss, self._autocast = network, loss, autocast
        self._parameters = list(trainable(network).values())
        self._batch, self._last = physical_batch, channels_last

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """See :class:`Path`."""
        images, labels = images[0], labels[0]
        count, size = len(images), self._batch or len(images)
        total: list[Tensor | None] = []
        mean = torch.zeros((), device=images.device)
        for start in range(0, count, size):
            part, truth = images[start : start + size], labels[start : start + size]
            loss = self._loss_of(part, truth)
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            share = len(part) / count
            mean += share * loss.detach().float()
            if share == 1:
                total = list(found)
            else:
                total = [_plus(t, g, share) for t, g in zip(total or [None] * len(found), found, strict=True)]
        return [None if g is None else g[None] for g in total], mean[None]

    def _loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._last and images.ndim > 3:
            layout = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
            images = images.contiguous(memory_format=layout)
        return _loss(self._network, self._loss, images, labels, self._autocast)


def _plus(total: Tensor | None, part: Tensor | None, share: float) -> Tensor | None:
    if part is None:
        return total
    return part * share if total is None else total.add_(part, alpha=share)


class Vmap:
    """A fixed number of patients at once, recorded and replayed.

    Args:
        network: see :func:`trainable`.
        loss: a mean over images.
        patients: at once, at least 1.
        autocast: arithmetic of forward and backward; None: float32.

    A record holds for one shape and one set of modes (training, drop-out); others are recorded when they come.
    """

    def __init__(self, network: nn.Module, loss: Loss, *, patients: int, autocast: torch.dtype | None = None) -> None:
        self.name, self.patients = f"vmap, {patients} at once", patients
        self._network, self._loss, self._autocast = network, loss, autocast
        self._names = list(trainable(network))
        self._records: dict[Any, Callable[..., Any]] = {}

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """See :class:`Path`; a parameter that the loss does not reach has zeros."""
        state = {name: p.detach() for name, p in self._network.named_parameters()}
        chosen = {name: state.pop(name) for name in self._names}
        state |= dict(self._network.named_buffers())
        modes = tuple(module.training for module in self._network.modules())
        key = (images.shape, labels.shape, images.device, modes)
        with torch.no_grad():  # the gradient is part of the record
            if key not in self._records:
                self._records[key] = self._record(chosen, state, images, labels)
            found, losses = self._records[key](chosen, state, images, labels)
        return [found[name] for name in self._names], losses

    def _record(
        self, chosen: dict[str, Tensor], rest: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> Callable[..., Any]:
        def one(chosen: dict[str, Tensor], rest: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            def network(images: Tensor) -> Tensor:
                logits: Tensor = functional_call(self._network, (chosen, rest), (images,))
                return logits

            return _loss(network, self._loss, images, labels, self._autocast)

        gradient = grad_and_value(one)
        if self.patients == 1:  # the same without the detour over a batch of one

            def alone(chosen: Any, rest: Any, images: Tensor, labels: Tensor) -> Any:
                found, loss = gradient(chosen, rest, images[0], labels[0])
                return {name: g[None] for name, g in found.items()}, loss[None]

            every: Callable[..., Any] = alone
        else:
            every = vmap(gradient, in_dims=(None, None, 0, 0), randomness="different")
        from torch.fx.experimental.proxy_tensor import make_fx  # slow; studies without privacy need none

        with torch.enable_grad(), FusedNorms():
            record: Callable[..., Any] = make_fx(every)(chosen, rest, images, labels)
        return record


def _loss(
    network: Callable[[Tensor], Tensor], loss: Loss, images: Tensor, labels: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """The mean loss; only forward and backward are in ``dtype``."""
    # Without the cache a weight is cast anew for every call: a cached cast would outlive a record.
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        logits = network(images)
    return loss(logits.float(), labels)
