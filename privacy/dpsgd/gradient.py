# SPDX-License-Identifier: Apache-2.0
"""The clipped, noised sum of one step: :class:`PatientGradient`."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..noise import SecureRandom
from .paths import Loop, Loss, Path, trainable

__all__ = ["Clipping", "PatientGradient", "StepReport"]

Clipping = Literal["clip", "normalise"]

_MARGIN = 1 + 1e-6  # on the norm: float32 rounding must not carry a contribution past C
_GAMMA = 0.01  # of normalised clipping, as in Bu et al.
_GRID_BITS = 20  # the noise is rounded to multiples of about σC / 2^20
_CHUNK = 1 << 16  # parameters noised at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What happened in one step. For the hospital's eyes only: none of it is noised, so none of it may leave.

    Attributes:
        patients: patients in the step.
        clipped: patients whose gradient was longer than C.
        non_finite: patients who counted as zero because their gradient was not finite.
        loss: mean loss of the patients with a finite gradient, or None if there was none.
    """

    patients: int
    clipped: int
    non_finite: int
    loss: float | None


class PatientGradient:
    """Accumulates clipped patient gradients and turns them into one noised gradient.

    Guarantees:
        Unit: the patient. Neighbouring relation: zero-out of one patient. One patient changes the sum by at
        most C in L2 norm, whatever the number of crops, the network and the loss. Until :meth:`finish` has
        added the noise no parameter has a ``.grad``, so an optimiser cannot step on the bare sum.

    Args:
        network: its trainable parameters get the gradient; see :func:`~fedneuro.privacy.dpsgd.check_network`.
        loss: mean loss of images, from logits ``(K, C, *spatial)`` and labels to a scalar.
        clip: C, bound on the L2 norm of one patient's gradient, above 0.
        noise_multiplier: σ; the noise has standard deviation σC, above 0.
        expected_patients: public divisor: sample rate times public cohort size; never a count of this batch.
        random: source of the noise.
        autocast: arithmetic of forward and backward, such as ``torch.bfloat16``; norms and sums stay float32 or wider.
        path: how gradients are computed; None: :class:`~.paths.Loop` with ``autocast``. A path has its own arithmetic.
        clipping: ``clip``: a gradient g becomes g·min(1, C/‖g‖). ``normalise``: g·C/(‖g‖ + 0.01), so that every
            patient counts nearly the same and C is no longer tuned beside the learning rate (Bu et al. 2023,
            Automatic Clipping, https://arxiv.org/abs/2206.07136). The sensitivity is C either way.

    Raises:
        BadInput: a number is out of range, or the network has nothing to train.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        clip: float,
        noise_multiplier: float,
        expected_patients: float,
        random: SecureRandom,
        autocast: torch.dtype | None = None,
        path: Path | None = None,
        clipping: Clipping = "clip",
    ) -> None:
        for name, value in (
            ("clip", clip),
            ("noise_multiplier", noise_multiplier),
            ("expected_patients", expected_patients),
        ):
            if not 0 < value < math.inf:
                raise BadInput(f"{name} = {value}: give a positive, finite number")
        self._parameters = list(trainable(network).values())
        if not self._parameters:
            raise BadInput("the network has no trainable parameter")
        self._path = path or Loop(network, loss, autocast=autocast)
        self._clip, self._clipping = clip, clipping
        self._scale = noise_multiplier * clip
        self._expected = expected_patients
        self._random = random
        # One flat buffer holds the sum and later the noised gradient; the views have the parameters' shapes.
        self._device = self._parameters[0].device
        self._sum = torch.zeros(sum(p.numel() for p in self._parameters), device=self._device)
        parts = torch.split(self._sum, [p.numel() for p in self._parameters])
        self._views = [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._patients = self._clipped = self._non_finite = 0
        self._loss_sum = 0.0
        self._finished = False
        self._start()

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each number of the gradient: σC over the public divisor."""
        return self._scale / self._expected

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Add one patient's clipped gradient.

        Args:
            images: the patient's crops ``(K, channels, *spatial)``, on the network's device; K is the same for all.
            labels: their labels, int64, ``(K, *spatial)`` or ``(K,)``.
        """
        if self._finished:
            self._start()
        self._waiting.append((images, labels))
        if len(self._waiting) == self._path.patients:
            self._compute()

    def take_sum(self) -> Tensor:
        """The clipped sum of the step, without noise and without division, flat in the order of the parameters.

        It protects nobody and must never leave the process as it is: it is for a mechanism that adds the noise
        itself before anything is sent (mode ``distributed``). The next :meth:`accumulate` begins a new step.

        Returns:
            A copy ``(parameters,)`` in float32; its L2 norm changes by at most C with one patient.
        """
        if self._finished:
            self._start()
        self._compute()
        total = self._sum.clone()
        self._finished = True
        return total

    def report(self) -> StepReport:
        """What happened in the step that :meth:`finish` or :meth:`take_sum` ended."""
        finite = self._patients - self._non_finite
        return StepReport(
            patients=self._patients,
            clipped=self._clipped,
            non_finite=self._non_finite,
            loss=self._loss_sum / finite if finite else None,
        )

    def finish(self) -> StepReport:
        """Add the noise, divide by the public number, write ``.grad`` of every trainable parameter.

        Without a patient this is a step of noise alone: leaving it out would tell that nobody was chosen.
        """
        if self._finished:
            self._start()
        self._compute()
        self._add_noise()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        self._finished = True
        return self.report()

    def _start(self) -> None:
        """Begin a step: zero the sum and take it away from the optimiser."""
        for parameter in self._parameters:
            parameter.grad = None
        self._sum.zero_()
        self._waiting.clear()
        self._patients = self._clipped = self._non_finite = 0
        self._loss_sum = 0.0
        self._finished = False

    def _compute(self) -> None:
        """Clip and add the patients who wait; a group that is not full is filled up with copies that do not count."""
        count = len(self._waiting)
        if not count:
            return
        group = self._waiting + [self._waiting[-1]] * (self._path.patients - count)
        images, labels = torch.stack([i for i, _ in group]), torch.stack([y for _, y in group])
        self._waiting.clear()
        gradients, losses = self._path.gradients(images, labels)
        used = [(v, g[:count]) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        norms = _norms([g for _, g in used], count)
        self._patients += count
        finite = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
        self._non_finite += count - len(finite)
        if not finite:
            return
        self._loss_sum += float(losses[finite].sum())
        self._clipped += sum(norms[i] > self._clip for i in finite)
        scales = [self._factor(norms[i]) for i in finite]
        if count == 1:
            sums, parts = [v for v, _ in used], [g[0] for _, g in used]
            torch._foreach_add_(sums, parts, alpha=scales[0])  # pyright: ignore[reportPrivateImportUsage]
            return
        for i, scale in zip(finite, scales, strict=True):
            sums, parts = [v for v, _ in used], [g[i] for _, g in used]
            torch._foreach_add_(sums, parts, alpha=scale)  # pyright: ignore[reportPrivateImportUsage]

    def _factor(self, norm: float) -> float:
        """What a gradient of this norm is multiplied with; the product is at most C long."""
        if self._clipping == "normalise":
            return self._clip / (norm * _MARGIN + _GAMMA)
        return self._clip / max(self._clip, norm * _MARGIN)

    def _add_noise(self) -> None:
        # The grid depends on σC alone. Sums on such a grid, far coarser than the numbers' own spacing, do not
        # betray by their last bits which sum they came from.
        grid = 2.0 ** (math.floor(math.log2(self._scale)) - _GRID_BITS)
        for part in torch.split(self._sum, _CHUNK):
            noise = torch.from_numpy(self._random.normal(part.numel())).to(part.device)
            total = noise.mul_(self._scale / grid).add_(part, alpha=1 / grid)
            part.copy_(total.round_().mul_(grid / self._expected))


def _norms(gradients: list[Tensor], count: int) -> list[float]:
    """L2 norm of each patient's gradients together, in float64."""
    if not gradients:
        return [0.0] * count
    rows = [
        torch.stack(torch._foreach_norm([g[i] for g in gradients], 2, torch.float64))  # pyright: ignore[reportPrivateImportUsage]
        for i in range(count)
    ]
    found: list[float] = torch.linalg.vector_norm(torch.stack(rows), dim=1).tolist()
    return found
