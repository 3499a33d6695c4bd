# SPDX-License-Identifier: Apache-2.0
"""The self-test before a study: leave every patient out once, an outlier among them, and see how the sum moves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import Refused
from ..noise import SecureRandom
from .gradient import Clipping, PatientGradient
from .paths import Loop, Loss, Path
from .validators import check_loss, check_network

__all__ = ["largest_contribution", "self_test", "synthetic_patients"]

Patient = tuple[Tensor, Tensor]

_TOLERANCE = 1e-5  # on contributions in units of C
_COUPLING = 1e-3  # relative: convolutions of one and of two images may round apart


def self_test(
    network: nn.Module,
    loss: Loss,
    shape: Sequence[int],
    clip: float,
    *,
    path: Path | None = None,
    clipping: Clipping = "clip",
) -> None:
    """Prove on synthetic patients, one of them an outlier, that no patient can contribute more than C.

    Checked, through the code that trains: layers and loss (:mod:`.validators`); a forward pass changes no buffer; an
    image's logits and the loss do not depend on the other images; leaving any one patient out moves the clipped
    sum by at most C. The outlier is needed: without it even BatchNorm passes. Patients are as many as fill one
    group of the path and begin another, so that the same patient is computed in different company.

    Args:
        network: as it will be trained, on its device. Drop-out rests during the test; ``.grad`` is cleared.
        loss: as it will be used.
        shape: one patient's images ``(K, channels, *spatial)``. Small is enough.
        clip: C.
        path: as it will be used; None: :class:`~.paths.Loop` in float32.
        clipping: as it will be used.

    Raises:
        BadInput: a layer or loss that cannot be used.
        Refused: the bound does not hold, naming the network and the contribution.
    """
    check_network(network)
    check_loss(loss)
    name = type(network).__name__
    path = path or Loop(network, loss)
    with _resting(network):
        patients = synthetic_patients(network, shape, count=max(3, path.patients + 1))
        _check_apart(network, loss, patients, name)
        engine = PatientGradient(
            network,
            loss,
            clip=clip,
            noise_multiplier=1.0,
            expected_patients=1.0,
            random=SecureRandom(),
            path=path,
            clipping=clipping,
        )

        def clipped_sum(members: Sequence[Patient]) -> Tensor:
            for images, labels in members:
                engine.accumulate(images, labels)
            return engine.take_sum()

        found = largest_contribution(clipped_sum, patients) / clip
        for parameter in network.parameters():
            parameter.grad = None
    if not found <= 1 + _TOLERANCE:
        raise Refused(
            f"{name}: one patient moves the clipped sum by {found:.4f} C instead of at most C, so ε would be wrong; "
            "use a network and a loss that keep patients apart"
        )


def largest_contribution(clipped_sum: Callable[[Sequence[Patient]], Tensor], patients: Sequence[Patient]) -> float:
    """The sensitivity that these patients show: the largest norm by which leaving one out moves the sum.

    Args:
        clipped_sum: S, the sum of clipped gradients over the given patients, flat.
        patients: D; put an outlier among them.
    """
    everyone = clipped_sum(patients).double()
    without = [clipped_sum([*patients[:i], *patients[i + 1 :]]).double() for i in range(len(patients))]
    return max(float(torch.linalg.vector_norm(everyone - rest).item()) for rest in without)


def synthetic_patients(network: nn.Module, shape: Sequence[int], count: int = 3) -> list[Patient]:
    """Ordinary patients and one outlier: a hundred times brighter, shifted, and labelled against the others.

    Args:
        network: decides the size of the labels, and the device.
        shape: one patient's images ``(K, channels, *spatial)``.
        count: patients in all, at least 2; the outlier is the last.
    """
    generator = torch.Generator().manual_seed(0)  # no secret: these patients are made up
    device = next(network.parameters()).device
    noise = torch.randn((count, *shape), generator=generator).to(device)
    with torch.no_grad():
        logits = network(noise[0])
    size, classes = (logits.shape[0], *logits.shape[2:]), logits.shape[1]
    ordinary = torch.randint(classes, (count - 1, *size), generator=generator).to(device)
    outlier = (100.0 * noise[-1] + 50.0, torch.full(size, classes - 1, device=device))
    return [*zip(noise[:-1], ordinary, strict=True), outlier]


@contextmanager
def _resting(network: nn.Module) -> Iterator[None]:
    """Training mode, but with drop-out off, for the time of a test."""
    modes = {module: module.training for module in network.modules()}
    try:
        for module in modes:
            module.training = not isinstance(module, _DropoutNd)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_apart(network: nn.Module, loss: Loss, patients: Sequence[Patient], name: str) -> None:
    """Refuse a network or a loss in which images of one batch know of each other, and buffers that move."""
    before = {key: buffer.clone() for key, buffer in network.named_buffers()}
    (images, labels), (strange, strange_labels) = patients[0], patients[-1]
    with torch.no_grad():
        alone, beside = network(images[:1]), network(torch.cat([images[:1], strange[:1]]))
        # The loss is judged on logits of its own: an untrained network's hardly differ between images.
        generator = torch.Generator().manual_seed(1)
        logits = 3 * torch.randn(beside.shape, generator=generator).to(beside.device)
        targets = torch.cat([labels[:1], strange_labels[:1]])
        mean = (loss(logits[:1], targets[:1]) + loss(logits[1:], targets[1:])) / 2
        both = loss(logits, targets)
    for key, buffer in network.named_buffers():
        if not torch.equal(buffer, before[key]):
            raise Refused(
                f"{name}: a forward pass changes buffer {key}, which would leave without noise; use a layer without it"
            )
    if float((beside[:1] - alone).abs().max()) > _COUPLING * (1 + float(alone.abs().max())):
        raise Refused(
            f"{name}: an image's result depends on the other images of the batch; use layers that keep images apart"
        )
    if abs(float(both - mean)) > _COUPLING * (1 + abs(float(mean))):
        raise Refused(
            "the loss of two images is not the mean of their losses: it couples patients; use a loss per image"
        )
