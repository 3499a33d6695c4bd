# SPDX-License-Identifier: Apache-2.0
"""Whether a mask belongs to its image: grids, place, and how sharply it parts bright from dark.

The *contrast* of a mask is the difference of the image inside it and in a shell of two voxels around it, over their
deviation (Cohen's d). The right mask of a visible structure has a clear contrast; a mirrored, shifted or foreign one
does not. What counts as clear is taken from the other patients, so structures that cannot be told by brightness
give no findings.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from ....privacy.errors import DataError
from ..checks import check_same_grid
from ..nifti import Volume
from .catalogue import Finding
from .files import File, Scan
from .look import foreground_of

__all__ = ["Fit", "judge_pairing"]

SHELL: Final = 2
OUTSIDE_SHARE: Final = 0.5
MOST_RIM: Final = 0.25
"""Where more of the volume's outermost voxels are head than this, a part was cut out and there is hardly any air."""
Bits = NDArray[np.bool_]


@dataclass
class Fit:
    """How one mask fits one image."""

    mask: File
    image: File
    contrast: float
    mirrored: float  # contrast of the mask flipped left to right
    shifted: dict[tuple[int, int, int], float] = field(default_factory=dict)
    small: Bits | None = None  # the mask itself, cut to its box, and where the box starts
    corner: tuple[int, int, int] = (0, 0, 0)
    label: int = 0  # the label value with most voxels: a union of bright and dark parts has no contrast


def judge_pairing(scan: Scan, volumes: dict[File, Volume]) -> tuple[list[Fit], list[Finding]]:
    """Compare images and masks of one session.

    Args:
        scan: its files.
        volumes: those that could be read.
    """
    findings: list[Finding] = []
    patient = (scan.patient,)
    images = [file for file in scan.images if file in volumes]
    masks = [file for file in scan.masks if file in volumes]
    for variant in sorted({file.variant for file in images}):
        here = [file for file in images if file.variant == variant]
        for other in here[1:]:
            text = _apart(volumes[other], volumes[here[0]])
            if text:
                findings.append(Finding("grid-differs", patient, text))
    fits = []
    for mask in masks:
        near = [f for f in images if f.variant == mask.variant] or images
        same = [f for f in near if not _apart(volumes[mask], volumes[f])]
        if near and not same:
            findings.append(Finding("grid-differs", patient, _apart(volumes[mask], volumes[near[0]])))
        drawn = volumes[mask].data > 0.5
        if not drawn.any() or not same:
            continue
        head = np.any([_head(volumes[f].data) for f in same], axis=0)
        outside = float((drawn & ~head).sum() / drawn.sum())
        if outside > OUTSIDE_SHARE and _rim(head) < MOST_RIM:
            findings.append(Finding("mask-outside", patient, f"{mask.path.name}: {outside:.0%} of it"))
        fits += [_fit(mask, volumes[mask].data, f, volumes[f].data) for f in same]
    findings += _overlaps(patient, masks, volumes)
    return fits, findings


def _apart(volume: Volume, first: Volume) -> str:
    try:
        check_same_grid(volume, first)
    except DataError as error:
        return str(error).rpartition("; ")[0]  # without the remedy, which the finding has
    return ""


def _head(data: NDArray[np.float32]) -> Bits:
    from scipy.ndimage import binary_fill_holes

    head = foreground_of(np.nan_to_num(data))
    return np.asarray(binary_fill_holes(binary_dilation(head)), bool)


def _rim(head: Bits) -> float:
    """Share of the head among the outermost voxels in plane (slices at both ends always cut the head)."""
    return float(np.concatenate([head[0].ravel(), head[-1].ravel(), head[:, 0].ravel(), head[:, -1].ravel()]).mean())


def _overlaps(patient: tuple[str, ...], masks: list[File], volumes: dict[File, Volume]) -> list[Finding]:
    found = []
    for place, one in enumerate(masks):
        for other in masks[place + 1 :]:
            a, b = volumes[one].data, volumes[other].data
            if one.variant == other.variant and a.shape == b.shape and bool(((a > 0.5) & (b > 0.5)).any()):
                found.append(Finding("mask-overlap", patient, f"{one.path.name} and {other.path.name}"))
    return found


def contrast_of(drawn: Bits, data: NDArray[np.float32]) -> float:
    """Cohen's d of the image inside a mask against a shell around it; 0 where either is empty."""
    where = _box(drawn, SHELL + 1)
    drawn, data = drawn[where], data[where]
    shell = np.asarray(binary_dilation(drawn, np.ones((3, 3, 3)), iterations=SHELL), bool) & ~drawn
    inside, around = data[drawn], data[shell]
    if inside.size < 2 or around.size < 2:
        return 0.0
    spread = float(np.sqrt((inside.var() + around.var()) / 2))
    return float(inside.mean() - around.mean()) / spread if spread > 0 else 0.0


def _box(drawn: Bits, margin: int) -> tuple[slice, slice, slice]:
    spans = []
    for axis in range(3):
        hit = np.flatnonzero(drawn.any(axis=tuple(a for a in range(3) if a != axis)))
        spans.append(slice(max(int(hit[0]) - margin, 0), int(hit[-1]) + 1 + margin))
    return spans[0], spans[1], spans[2]


def _fit(mask: File, labels: NDArray[np.float32], image: File, data: NDArray[np.float32]) -> Fit:
    data = np.nan_to_num(data)
    whole = np.rint(labels).astype(np.int32)
    values, counts = np.unique(whole[whole > 0], return_counts=True)
    label = int(values[counts.argmax()])
    drawn = whole == label
    fit = Fit(mask, image, contrast_of(drawn, data), contrast_of(drawn[::-1], data), label=label)
    box = _box(drawn, 0)
    fit.small, fit.corner = drawn[box].copy(), (box[0].start, box[1].start, box[2].start)
    for axis in range(3):
        for step in (-1, 1):
            shift = [0, 0, 0]
            shift[axis] = step
            fit.shifted[shift[0], shift[1], shift[2]] = contrast_of(np.roll(drawn, step, axis), data)
    return fit
