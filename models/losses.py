# SPDX-License-Identifier: Apache-2.0
"""Losses, by the name that a study gives in ``[training] loss``.

Every loss is a mean over images: the loss of a batch equals the mean of the losses of its images alone. That
is what keeps patients apart. Losses that couple the images of a batch (``DiceLoss(batch=True)``, class weights or
an ignored index with a batch mean) change a patient's gradient with who else is in the batch, and are not
on offer.

Dice and focal loss are written out here because MONAI's one-hot coding of the labels (1.6) does not work under
``torch.func.vmap``, which private training uses; their values are MONAI's.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import SUITED_LOSSES, TaskSection

__all__ = ["LOSSES", "Loss", "build_loss"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(B, C, *spatial)`` and int64 labels ``(B, *spatial)`` to a scalar; ``*spatial`` is empty for what is known
of a patient as a whole: a class, a number (float32), or the code of a time (:func:`hazard`)."""

GAMMA = 2.0
"""Exponent of the focal loss: 0 is cross entropy (over the number of classes); more looks at the hard voxels."""

SMOOTH = 1.0
"""Voxels added to numerator and denominator of soft Dice. With MONAI's 1e-5 an image without foreground has loss 1
and no gradient, so half of the slices teach nothing. Glioma slices, 300 pooled steps, held-out Dice: 0.635 at 1e-5,
0.716 at 1 (one seed)."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over voxels and images; all images of a batch have the same size."""
    return F.cross_entropy(logits, labels)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - soft Dice, smoothed by :data:`SMOOTH`, mean over images and foreground labels (Milletari et al. 2016)."""
    predicted = torch.softmax(logits, 1)[:, 1:].flatten(2)
    truth = _one_hot(labels, logits)[:, 1:].flatten(2)
    overlap = (predicted * truth).sum(-1)
    size = predicted.sum(-1) + truth.sum(-1)
    return (1 - (2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of :func:`dice` and :func:`cross_entropy`."""
    return dice(logits, labels) + cross_entropy(logits, labels)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss, mean over voxels, classes and images (Lin et al. 2017)."""
    log_p = torch.log_softmax(logits, 1)
    return -((1 - log_p.exp()) ** GAMMA * log_p * _one_hot(labels, logits)).mean()


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of ``outputs`` ``(B, 1)`` against ``targets`` ``(B,)``, mean over images."""
    return F.mse_loss(outputs[:, 0], targets.to(outputs.dtype))


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error; as :func:`mse`."""
    return F.l1_loss(outputs[:, 0], targets.to(outputs.dtype))


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """Huber loss: squared below an error of 1 (``task.scale``), linear above (Huber 1964); as :func:`mse`."""
    return F.huber_loss(outputs[:, 0], targets.to(outputs.dtype))


def hazard(logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood of discrete-time survival, mean over images (Gensheimer & Narasimhan 2019, eq. 3).

    A patient is alive in interval k with probability 1 - h_k, h = sigmoid(logits), and leaves the likelihood after the
    event or the end of observation. Each image has a term of its own; Cox's partial likelihood, which compares each
    patient with all others at risk, would couple patients, and is not on offer.

    Args:
        logits: ``(B, K)``, one hazard per interval.
        codes: int64 ``(B,)``: 2 × intervals that were survived (0 … K), plus 1 where the event came in the next one.

    References: Gensheimer & Narasimhan 2019, https://doi.org/10.7717/peerj.6257.
    """
    interval = torch.arange(logits.shape[1], device=logits.device)
    survived, event = (codes >> 1)[:, None], (codes & 1)[:, None]
    alive = (interval < survived).to(logits.dtype)
    died = ((interval == survived) & (event == 1)).to(logits.dtype)
    return (alive * F.softplus(logits) + died * F.softplus(-logits)).sum(1).mean()


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels ``(B, *spatial)`` as 0 and 1, ``(B, C, *spatial)`` like the logits."""
    classes = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    return (labels[:, None] == classes).to(logits.dtype)


LOSSES: Mapping[str, Loss] = {
    "dice_ce": dice_ce,
    "dice": dice,
    "cross_entropy": cross_entropy,
    "focal": focal,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "hazard": hazard,
}
"""The losses. ``dice``: soft Dice of the foreground labels, mean per image and label (Milletari et al.
2016); ``dice_ce``: its sum with cross entropy; ``focal``: gamma 2 (Lin et al. 2017); ``mse``, ``l1``, ``huber`` of a
number; ``hazard`` of the time to an event."""


def build_loss(name: str, task: TaskSection) -> Loss:
    """The loss ``name`` for ``task``.

    Raises:
        ValueError: no such loss, or one that is for another kind of task.
    """
    if name not in LOSSES:
        raise ValueError(f'loss "{name}" is not on offer; choose one of {", ".join(LOSSES)}')
    if name not in SUITED_LOSSES[task.kind]:
        suited = " or ".join(f'"{loss}"' for loss in SUITED_LOSSES[task.kind])
        raise ValueError(f'loss "{name}" is not for {task.kind}; use {suited}')
    return LOSSES[name]
