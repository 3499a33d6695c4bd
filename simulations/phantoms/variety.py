# SPDX-License-Identifier: Apache-2.0
"""Training crops of phantoms in endless variety: a few heads, another scanner for every crop.

In the spirit of SynthSeg (Billot et al., Medical Image Analysis 86 (2023) 102789): what a network should not rely
on is drawn at random. Heads with lesions are made once, as tissue fractions. Each crop then takes a head, a set
of lesions and a slice (or box), turns, scales and bends it, gives every tissue a grey level, and passes it through
an invented scanner: texture, bias field, ghost, spike, blur, Rician noise, an air that is zero or not, a skull
that is there or not. All of that is a few tensor operations on a batch, an order of magnitude less than a
training step on it.

Intensities are normalised as the study normalises a whole scan: mean and variance over the scan follow exactly from
the grey levels and the scan's first and second moments of tissue fractions, without making the scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .anatomy import TISSUES, Grid, draw_anatomy
from .face import add_face
from .lesions import draw_kind
from .style import LEVELS, generator_of

__all__ = [
    "Contrast",
    "Head",
    "Variety",
    "contrast_of",
    "draw_head",
    "scan_statistics",
    "with_lesion",
    "without_skull",
]

SETS_PER_HEAD: Final = 3
"""Sets of lesions that each head is shown with."""

CLASSES: Final = (*TISSUES, "fat", "lesion", "core", "air")
"""Channels of a crop's fractions."""

FAT, LESION, CORE, AIR = 6, 7, 8, 9
SCALE: Final = (0.9, 1.4)
"""Size of a head on the patch, relative to filling it (or to its true size where the voxel size is known)."""
TURN: Final = 0.15  # radians
BEND: Final = 0.015  # standard deviation of the displacement, relative to the patch
AIR_SHOWN: Final = 0.8
"""Share of scans whose air holds noise; in the others it is 0, and left out of the statistics."""
STRIPPED: Final = 0.1
"""Share of scans without skull and scalp."""


@dataclass(frozen=True, slots=True)
class Head:
    """One head with its sets of lesions, kept in bytes: a voxel of 7 + 2 × 3 classes takes 13.

    ``tissue``: uint8 (7, X, Y, Z), 255 = whole voxel. ``lesions``: uint8 (sets, 2, X, Y, Z), lesion and core.
    ``moments``: float64 (sets, 10, 10), mean over the field of view of the products of two classes' fractions.
    """

    tissue: Tensor
    lesions: Tensor
    moments: Tensor


@dataclass(frozen=True, slots=True)
class Contrast:
    """Range of each class's grey level for one channel, (10,), and whether lesions may be darker than their place."""

    low: Tensor
    high: Tensor
    either: bool


def draw_head(seed: int, number: int, grid: Grid, kinds: Sequence[str]) -> Head:
    """Head ``number`` of a seed on ``grid``: independent of every other number, and of every phantom hospital."""
    generator = generator_of("pre-training", seed, number)
    anatomy = draw_anatomy(generator, grid, age=float(generator.uniform(20, 85)))
    sets = []
    for index in range(SETS_PER_HEAD):
        fraction, core = draw_kind(kinds[(number * SETS_PER_HEAD + index) % len(kinds)], generator, anatomy)
        sets.append(np.stack([fraction, np.minimum(core, fraction)]))
    parts, fat = add_face(generator, anatomy)
    tissue = torch.from_numpy(np.concatenate([parts, fat[None]]))
    lesions = torch.from_numpy(np.stack(sets))
    moments = []
    for pair in lesions:
        classes = with_lesion(tissue, pair).reshape(len(CLASSES), -1).double()
        moments.append(classes @ classes.T / classes.shape[1])
    return Head((tissue * 255).round().byte(), (lesions * 255).round().byte(), torch.stack(moments))


def with_lesion(tissue: Tensor, pair: Tensor) -> Tensor:
    """Fractions of all ten classes, (10, …), sum 1, of tissue (7, …) and of lesion and core (2, …)."""
    lesion, core = pair[:1], pair[1:]
    healthy = tissue * (1 - lesion)
    found = torch.cat([healthy, lesion - core, core])
    return torch.cat([found, (1 - found.sum(0, keepdim=True)).clamp(min=0)])


def contrast_of(modality: str, width: str) -> Contrast:
    """How a modality shows the classes.

    Args:
        modality: BIDS suffix, one of :data:`~.style.MODALITIES`, with its entities.
        width: ``usual``: as the phantom hospitals' scanners; ``wide``: the modality's order of tissues, far wider
            ranges; ``any``: every tissue anywhere, as in SynthSeg, lesions brighter or darker than white matter.
    """
    table = LEVELS[modality.rsplit("_", 1)[-1]]
    low, high = torch.tensor([table[name] for name in (*TISSUES, "scalp", "lesion")]).T
    if width == "any":
        low, high = torch.zeros(8), torch.ones(8)
    elif width == "wide":
        # Fat may be suppressed or not, marrow may shine, air-filled and soft parts of the base lie side by side.
        spread = torch.tensor([0.06, 0.05, 0.05, 0.08, 0.4, 0.15, 0.2, 0.1])
        low, high = (low - spread).clamp(min=0.02), high + spread
        high[FAT] *= 2
    zero = torch.zeros(2)
    # With contrast agent a lesion may shine or not.
    either = width == "any" or modality.startswith("ce-")
    return Contrast(torch.cat([low, zero]), torch.cat([high, zero]), either)


class Variety:
    """Crops of ``heads`` as a study's training would see them.

    Args:
        heads: from :func:`draw_head`, all on one grid.
        patch: voxels of a crop: two numbers for slices, three for boxes.
        axis: axis of slices (0 sagittal, 1 coronal, 2 axial); not used for boxes.
        ratio: voxels of the head's grid per voxel of the crop, before the random scale.
        contrasts: one per input channel.
        foreground: share of crops that show a lesion.
        percentile: normalise to the 1st to 99th percentile of the crop rather than to the scan's mean and variance.
        flip: mirror at random.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        *,
        patch: tuple[int, ...],
        axis: int,
        ratio: float,
        contrasts: Sequence[Contrast],
        foreground: float,
        percentile: bool,
        flip: bool,
    ) -> None:
        self._heads, self._patch, self._axis, self._ratio = heads, patch, axis, ratio
        self._contrasts, self._foreground = contrasts, foreground
        self._percentile, self._flip = percentile, flip
        self._shown = [[self._find(pair[0]) for pair in head.lesions] for head in heads]

    def _find(self, lesion: Tensor) -> Tensor:
        """2D: slices that show a lesion, by index. 3D: voxels of it, (n, 3)."""
        mask = lesion > 127
        if len(self._patch) == 3:
            return mask.nonzero()[:: max(1, int(mask.sum()) // 2000)]
        others = [axis for axis in range(3) if axis != self._axis]
        return (mask.sum(others) > 3).nonzero().flatten()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images, float32 (size, C, *patch), and labels, int64 (size, *patch), 0 or 1."""
        cut, moments = zip(*(self._draw(generator) for _ in range(size)), strict=True)
        classes = torch.stack(list(cut))
        labels = (classes[:, LESION] + classes[:, CORE] > 0.5).long()
        stripped = torch.rand(size, generator=generator) < STRIPPED
        classes, second = without_skull(classes, torch.stack(list(moments)), stripped)
        images = [self._scan(classes, second, contrast, generator) for contrast in self._contrasts]
        return torch.stack(images, 1), labels

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fractions of one crop, (10, *patch), and the moments of the scan that it is cut from."""
        number = _integer(len(self._heads), generator)
        head = self._heads[number]
        index = _integer(head.lesions.shape[0], generator)
        shown = self._shown[number][index]
        centred = _uniform(generator) < self._foreground and len(shown) > 0
        if len(self._patch) == 2:
            depth = head.tissue.shape[1 + self._axis]
            at = int(shown[_integer(len(shown), generator)]) if centred else _integer(depth, generator)
            tissue = head.tissue.select(1 + self._axis, at)
            pair = head.lesions[index].select(1 + self._axis, at)
            voxels = (pair[0] > 127).nonzero()
        else:
            tissue, pair, voxels = head.tissue, head.lesions[index], shown
        focus = voxels[_integer(len(voxels), generator)] if centred else None
        stacked = torch.cat([tissue, pair])
        moved = self._place(stacked.float() / 255, focus, generator)
        return with_lesion(moved[:7], moved[7:]), head.moments[index]

    def _place(self, image: Tensor, focus: Tensor | None, generator: torch.Generator) -> Tensor:
        """Cut (9, *sides) out onto the patch: turned, scaled, mirrored, bent."""
        dims, sides = len(self._patch), torch.tensor(image.shape[1:], dtype=torch.float32)
        patch = torch.tensor(self._patch, dtype=torch.float32)
        low, high = SCALE
        scale = (
            self._ratio
            / (low + (high - low) * _uniform(generator))
            * (1 + 0.06 * torch.randn(dims, generator=generator))
        )
        room = (sides - patch * scale).clamp(min=0)
        if focus is None:
            centre = sides / 2 + room * (torch.rand(dims, generator=generator) - 0.5)
        else:
            jitter = 0.15 * patch * scale * torch.randn(dims, generator=generator)
            centre = torch.clamp(focus + jitter, sides / 2 - room / 2, sides / 2 + room / 2)
        centre = centre + 0.04 * sides * torch.randn(dims, generator=generator)
        turn = TURN * torch.randn(dims, dims, generator=generator)
        matrix = torch.eye(dims) + (turn - turn.T) / 2 + 0.04 * torch.randn(dims, dims, generator=generator)
        if self._flip:
            matrix = matrix * torch.where(torch.rand(dims, generator=generator) < 0.5, -1.0, 1.0)
        steps = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in self._patch]
        grid = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
        bend = _noise((1, dims), self._patch, 4, generator)[0].movedim(0, -1) * (BEND * patch)
        where = ((grid + bend) @ matrix.T) * scale + centre - 0.5
        # grid_sample wants the last axis first, from -1 at the first voxel's centre to 1 at the last one's.
        points = (where / (sides - 1) * 2 - 1).flip(-1)
        return F.grid_sample(image[None], points[None], align_corners=True, padding_mode="zeros")[0]

    def _scan(self, classes: Tensor, second: Tensor, contrast: Contrast, generator: torch.Generator) -> Tensor:
        """One channel, (B, *patch): grey levels, texture, field, artefacts, blur, noise, normalised."""
        size, patch, dims = classes.shape[0], self._patch, len(self._patch)
        one = (size, *(1,) * dims)

        def draw(low: float, high: float, share: float = 1.0) -> Tensor:
            value = low + (high - low) * torch.rand(size, generator=generator)
            return value * (torch.rand(size, generator=generator) < share) if share < 1 else value

        sigma = draw(0.004, 0.035)
        levels = _levels(contrast, size, generator)
        levels[:, AIR] = draw(0.5, 1.5) * sigma * (torch.rand(size, generator=generator) < AIR_SHOWN)
        air_is_zero = levels[:, AIR] == 0
        brain = 1 + 0.05 * _noise((size,), patch, _lattice(patch, 5), generator)
        soft = torch.exp(draw(0.2, 0.6).view(one) * _noise((size,), patch, _lattice(patch, 12), generator) - 0.1)
        base = torch.exp(draw(0.3, 0.9).view(one) * _noise((size,), patch, _lattice(patch, 7), generator) - 0.2)
        within = 1 + draw(0.05, 0.3).view(one) * _noise((size,), patch, _lattice(patch, 6), generator)
        texture = torch.stack([brain, brain, brain, soft, soft, base, soft, within, within, torch.ones_like(brain)], 1)
        signal = (classes * texture * levels.view(size, len(CLASSES), *(1,) * dims)).sum(1)
        signal = signal * torch.exp(draw(0.0, 0.25).view(one) * _noise((size,), patch, 3, generator))
        signal = signal + draw(0.02, 0.08, 0.15).view(one) * signal.roll(patch[-1] // 2, -1)
        signal = signal + _spike(patch, draw(0.01, 0.05, 0.06).view(one), generator)
        signal = _blur(signal, draw(0.3, 0.9))
        noise = sigma.view(1, *one) * torch.randn((2, *signal.shape), generator=generator)
        signal = torch.hypot(signal + noise[0], noise[1])
        air = classes[:, AIR] > 0.5
        signal = torch.where(air & air_is_zero.view(one), 0.0, signal)
        if self._percentile:
            flat = signal.flatten(1)
            low, high = flat.quantile(0.01, 1).view(one), flat.quantile(0.99, 1).view(one)
            return ((signal - low) / (high - low).clamp(min=1e-3)).clamp(0, 1)
        mean, spread = scan_statistics(levels, second, air_is_zero)
        shift, factor = (
            0.1 * torch.randn(size, generator=generator),
            torch.exp(0.1 * torch.randn(size, generator=generator)),
        )
        normal = (signal - mean.view(one)) / spread.view(one) * factor.view(one) + shift.view(one)
        return torch.where(signal == 0, 0.0, normal)


def without_skull(classes: Tensor, second: Tensor, stripped: Tensor) -> tuple[Tensor, Tensor]:
    """Turn bone, scalp and base into air where a scan is without them; in the crop and in its moments."""
    kept = torch.ones(len(stripped), len(CLASSES))
    kept[stripped, 3:7] = 0
    fractions = classes * kept.view(*kept.shape, *(1,) * (classes.ndim - 2))
    fractions[:, AIR] += (classes - fractions).sum(1)
    # The moments of air grow by those of what became air: T M Tᵀ with T the map of fractions.
    change = torch.diag_embed(kept.double())
    change[:, AIR] += (1 - kept).double()
    return fractions, change @ second @ change.transpose(1, 2)


def _levels(contrast: Contrast, size: int, generator: torch.Generator) -> Tensor:
    """Grey level of each class, (size, 10)."""
    levels = contrast.low + (contrast.high - contrast.low) * torch.rand(size, len(CLASSES), generator=generator)
    white = levels[:, 2]
    if contrast.either:
        step = 0.15 + 0.45 * torch.rand(size, generator=generator)
        sign = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
        levels[:, LESION] = (white + sign * step).clamp(min=0.02)
    else:
        strength = 0.35 + 0.9 * torch.rand(size, generator=generator)
        levels[:, LESION] = white + strength * (levels[:, LESION] - white)
    # The scalp is mostly fat.
    levels[:, 4] = levels[:, FAT] * (0.4 + 0.6 * torch.rand(size, generator=generator))
    # A core is fluid, tissue, or more of the lesion.
    towards = levels[torch.arange(size), torch.randint(0, 3, (size,), generator=generator)]
    mix = torch.rand(size, generator=generator)
    more = levels[:, LESION] + 0.5 * (levels[:, LESION] - white)
    levels[:, CORE] = torch.where(mix < 0.5, towards + (levels[:, LESION] - towards) * mix, more)
    return levels


def scan_statistics(levels: Tensor, second: Tensor, air_is_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scan over its voxels that are not zero, (B,) each."""
    levels = levels.double()
    first = second.sum(2)  # the fractions of a voxel sum to one
    mean, square = (first * levels).sum(1), torch.einsum("bi,bij,bj->b", levels, second, levels)
    inside = torch.where(air_is_zero, 1 - first[:, AIR], torch.ones_like(mean)).clamp(min=1e-3)
    mean, square = mean / inside, square / inside
    return mean.float(), (square - mean**2).clamp(min=1e-6).sqrt().float()


def _lattice(patch: Sequence[int], voxels: int) -> int:
    return max(3, max(patch) // voxels)


def _noise(lead: tuple[int, ...], patch: Sequence[int], points: int, generator: torch.Generator) -> Tensor:
    """Smooth fields of about unit variance, (*lead, *patch): random values on a lattice, interpolated."""
    coarse = torch.randn((1, int(np.prod(lead)), *(points,) * len(patch)), generator=generator)
    mode = "bicubic" if len(patch) == 2 else "trilinear"
    field = F.interpolate(coarse, size=tuple(patch), mode=mode, align_corners=True)[0]
    return field.reshape(*lead, *patch) * (1.4 if len(patch) == 2 else 1.6)


def _spike(patch: Sequence[int], strength: Tensor, generator: torch.Generator) -> Tensor:
    """A stripe pattern, as one spoiled point of k-space gives."""
    phase = torch.zeros(tuple(patch))
    for axis, n in enumerate(patch):
        steps = torch.arange(n, dtype=torch.float32).view(*(-1 if i == axis else 1 for i in range(len(patch))))
        phase = phase + steps * (3.0 * _uniform(generator))
    return strength * torch.cos(phase)


def _blur(signal: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each image (B, *patch) with its own width in voxels, one axis after the other."""
    taps = torch.arange(-2, 3, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    size, dims = signal.shape[0], signal.ndim - 1
    convolve = F.conv2d if dims == 2 else F.conv3d
    for axis in range(dims):
        shape = [size, 1, *(5 if i == axis else 1 for i in range(dims))]
        padding = [2 if i == axis else 0 for i in range(dims)]
        signal = convolve(signal[None], kernel.view(shape), padding=padding, groups=size)[0]
    return signal


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand(1, generator=generator))
