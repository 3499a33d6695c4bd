# SPDX-License-Identifier: Apache-2.0
"""Patient-level DP-SGD: one patient, one gradient, one clip; then noise.

Step of the engine, with the patients that Poisson sampling chose:

1. for each patient, K crops over all of that patient's scans: the gradient of their mean loss;
2. clip it to L2 norm C in float32, whatever K is; a gradient that is not finite counts as zero;
3. sum; also over no patient at all, which is a release like any other;
4. add N(0, σ²C²) in float64 from :class:`~fedneuro.privacy.noise.SecureRandom` and round to a fixed grid;
5. divide by the *public* expected number of patients.

It is a plain loop over patients instead of a library's hooks: exact for every network and loss of one patient,
in the memory of one patient. Hooks were measured to break the bound silently (a contribution of 24 C with ghost
clipping and Dice, of K·C with K-crop loaders).

References: Abadi et al. 2016, https://arxiv.org/abs/1607.00133; De et al. 2022 (averaging crops before clipping),
https://arxiv.org/abs/2204.13650; Mironov 2012 (why noise is rounded), https://doi.org/10.1145/2382196.2382264.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .errors import BadInput, Refused
from .noise import SecureRandom

__all__ = ["PatientGradient", "StepReport", "check_network", "largest_contribution", "self_test"]

Loss = Callable[[Tensor, Tensor], Tensor]
Patient = tuple[Tensor, Tensor]

_MARGIN = 1 + 1e-6  # on the norm: float32 rounding must not carry a contribution past C
_GRID_BITS = 20  # the noise is rounded to multiples of about σC / 2^20
_CHUNK = 1 << 16  # parameters noised at a time
_TOLERANCE = 1e-5  # of the self-test, on contributions in units of C
_COUPLING = 1e-3  # of the self-test, relative: convolutions of one and of two images may round apart


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
        network: its trainable parameters get the gradient; see :func:`check_network`.
        loss: mean loss of images, from logits ``(K, C, *spatial)`` and labels to a scalar.
        clip: C, bound on the L2 norm of one patient's gradient, above 0.
        noise_multiplier: σ; the noise has standard deviation σC, above 0.
        expected_patients: public divisor: sample rate times public cohort size; never a count of this batch.
        random: source of the noise.
        autocast: arithmetic of forward and backward, such as ``torch.bfloat16``; norms and sums stay float32 or wider.

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
    ) -> None:
        for name, value in (
            ("clip", clip),
            ("noise_multiplier", noise_multiplier),
            ("expected_patients", expected_patients),
        ):
            if not 0 < value < math.inf:
                raise BadInput(f"{name} = {value}: give a positive, finite number")
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        if not self._parameters:
            raise BadInput("the network has no trainable parameter")
        self._network = network
        self._loss = loss
        self._clip = clip
        self._scale = noise_multiplier * clip
        self._expected = expected_patients
        self._random = random
        self._autocast = autocast
        # One flat buffer holds the sum and later the noised gradient; the views have the parameters' shapes.
        self._device = self._parameters[0].device
        self._sum = torch.zeros(sum(p.numel() for p in self._parameters), device=self._device)
        parts = torch.split(self._sum, [p.numel() for p in self._parameters])
        self._views = [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]
        self._patients = self._clipped = self._non_finite = 0
        self._loss_sum = 0.0
        self._finished = False
        self._start()

    def accumulate(self, images: Tensor, labels: Tensor) -> None:
        """Add one patient's clipped gradient.

        Args:
            images: the patient's crops ``(K, channels, *spatial)``, on the network's device.
            labels: their labels, int64, ``(K, *spatial)`` or ``(K,)``.
        """
        if self._finished:
            self._start()
        with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
            logits = self._network(images)
        loss = self._loss(logits.float(), labels)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        used = [(v, g) for v, g in zip(self._views, gradients, strict=True) if g is not None]
        norm = _norm([g for _, g in used])
        self._patients += 1
        if not math.isfinite(norm):
            self._non_finite += 1
            return
        self._loss_sum += loss.item()
        self._clipped += norm > self._clip
        scale = self._clip / max(self._clip, norm * _MARGIN)
        sums, parts = [v for v, _ in used], [g for _, g in used]
        torch._foreach_add_(sums, parts, alpha=scale)  # pyright: ignore[reportPrivateImportUsage]

    def finish(self) -> StepReport:
        """Add the noise, divide by the public number, write ``.grad`` of every trainable parameter.

        Without a patient this is a step of noise alone: leaving it out would tell that nobody was chosen.
        """
        if self._finished:
            self._start()
        self._add_noise()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        self._finished = True
        finite = self._patients - self._non_finite
        return StepReport(
            patients=self._patients,
            clipped=self._clipped,
            non_finite=self._non_finite,
            loss=self._loss_sum / finite if finite else None,
        )

    def _start(self) -> None:
        """Begin a step: zero the sum and take it away from the optimiser."""
        for parameter in self._parameters:
            parameter.grad = None
        self._sum.zero_()
        self._patients = self._clipped = self._non_finite = 0
        self._loss_sum = 0.0
        self._finished = False

    def _add_noise(self) -> None:
        # The grid depends on σC alone. Sums on such a grid, far coarser than the numbers' own spacing, do not
        # betray by their last bits which sum they came from.
        grid = 2.0 ** (math.floor(math.log2(self._scale)) - _GRID_BITS)
        for part in torch.split(self._sum, _CHUNK):
            noise = torch.from_numpy(self._random.normal(part.numel())).to(part.device)
            total = noise.mul_(self._scale).add_(part)
            part.copy_(total.div_(grid).round_().mul_(grid / self._expected))


def _norm(gradients: list[Tensor]) -> float:
    """L2 norm of all gradients together, in float64."""
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(gradients, 2, torch.float64)  # pyright: ignore[reportPrivateImportUsage]
    return float(torch.linalg.vector_norm(torch.stack(norms)).item())


def check_network(network: nn.Module) -> None:
    """Refuse a network that mixes patients or keeps statistics of them.

    Raises:
        BadInput: naming the layer, why it breaks the promise, and what to use.
    """
    for name, module in network.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            raise BadInput(
                f"layer {name} is {kind}: its statistics mix patients and are kept without noise; "
                "use InstanceNorm or GroupNorm"
            )
        if getattr(module, "track_running_stats", False):
            raise BadInput(
                f"layer {name} ({kind}) keeps running statistics of patients without noise; "
                "set track_running_stats=False"
            )


def self_test(network: nn.Module, loss: Loss, shape: Sequence[int], clip: float) -> None:
    """Prove on synthetic patients, one of them an outlier, that no patient can contribute more than C.

    Checked, through the code that trains: layers (:func:`check_network`); a forward pass changes no buffer; an
    image's logits and the loss do not depend on the other images; leaving any one patient out moves the clipped
    sum by at most C. The outlier is needed: without it even BatchNorm passes.

    Args:
        network: as it will be trained, on its device. Drop-out rests during the test; ``.grad`` is cleared.
        loss: as it will be used.
        shape: one patient's images ``(K, channels, *spatial)``; K is taken as at least 2. Small is enough.
        clip: C.

    Raises:
        BadInput: a layer that cannot be used.
        Refused: the bound does not hold, naming the network and the contribution.
    """
    check_network(network)
    name = type(network).__name__
    with _resting(network):
        patients = _synthetic_patients(network, (max(2, shape[0]), *shape[1:]))
        _check_apart(network, loss, patients, name)
        engine = PatientGradient(
            network, loss, clip=clip, noise_multiplier=1.0, expected_patients=1.0, random=SecureRandom()
        )

        def clipped_sum(members: Sequence[Patient]) -> Tensor:
            engine._start()
            for images, labels in members:
                engine.accumulate(images, labels)
            return engine._sum.clone()

        found = largest_contribution(clipped_sum, patients) / clip
        engine._start()  # clears the sum of synthetic patients
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


def _synthetic_patients(network: nn.Module, shape: Sequence[int]) -> list[Patient]:
    """Two ordinary patients and one outlier: a hundred times brighter, shifted, and labelled against the others."""
    generator = torch.Generator().manual_seed(0)  # no secret: these patients are made up
    device = next(network.parameters()).device
    noise = torch.randn((3, *shape), generator=generator).to(device)
    with torch.no_grad():
        logits = network(noise[0])
    size, classes = (logits.shape[0], *logits.shape[2:]), logits.shape[1]
    ordinary = torch.randint(classes, (2, *size), generator=generator).to(device)
    outlier = (100.0 * noise[2] + 50.0, torch.full(size, classes - 1, device=device))
    return [(noise[0], ordinary[0]), (noise[1], ordinary[1]), outlier]


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
