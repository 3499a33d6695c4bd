# SPDX-License-Identifier: Apache-2.0
"""Masks against the other patients' masks: whose contrast is unlike theirs, and what would explain it.

For each mask and modality whose contrast is clear and of one sign in the cohort, a mask that lacks it is tried
mirrored, shifted by a voxel, and on the other patients' images; the best explanation that restores the usual contrast
is reported.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .catalogue import Finding
from .files import File
from .pairing import Fit, contrast_of

__all__ = ["judge_masks"]

FEWEST: Final = 6
CLEAR: Final = 1.0
"""Median contrast from which on a structure is told by its brightness."""
STEADY: Final = 0.85
"""Share of the patients whose contrast must have one sign."""
SOME: Final = 0.5
"""Median contrast from which on a second modality may vouch for a mask."""
EDGE: Final = 1.2
"""Contrast of either sign from which on a modality vouches for a mask by itself: the mask follows an edge there."""
ENOUGH: Final = 0.6
"""A mask with this share of the usual contrast is as it should be."""
LOW: Final = 0.35
"""A mask with less than this share of the usual contrast is looked into."""
SHIFT_GAIN: Final = 0.15
"""A shift must raise the contrast by this share of the usual one."""

Reader = Callable[[File], NDArray[np.float32] | None]


def judge_masks(fits: list[Fit], read: Reader) -> Iterator[Finding]:
    """Findings over all masks.

    Args:
        fits: of every mask with every image of its scan.
        read: gives the voxels of an image again, in RAS+ order.
    """
    by_kind: dict[tuple[str, str, int], list[Fit]] = defaultdict(list)
    for fit in fits:
        by_kind[fit.mask.what, fit.image.what, fit.label].append(fit)
    told: set[tuple[str, str]] = set()
    vouched = _vouched(list(by_kind.values()))
    order = sorted(by_kind.values(), key=lambda group: -abs(float(np.median([f.contrast for f in group]))))
    for group in order:
        usual = float(np.median([fit.contrast for fit in group]))
        same_sign = np.mean([np.sign(fit.contrast) == np.sign(usual) for fit in group])
        if len(group) < FEWEST or abs(usual) < CLEAR or same_sign < STEADY:
            continue
        low = [
            fit
            for fit in group
            if fit.contrast * np.sign(usual) < LOW * abs(usual) and not vouched.get(fit.mask, set()) - {fit.image.what}
        ]
        for finding in _explain(low, group, usual, read):
            if told.isdisjoint((finding.check, patient) for patient in finding.patients):
                yield finding
            told.update((finding.check, patient) for patient in finding.patients)
        yield from _shifts([fit for fit in group if fit not in low], usual, told)


def _vouched(groups: list[list[Fit]]) -> dict[File, set[str]]:
    """Masks that fit some modality as the others do: a cyst is dark where a solid tumour is bright, and still there."""
    found: dict[File, set[str]] = defaultdict(set)
    for group in groups:
        usual = float(np.median([fit.contrast for fit in group]))
        for fit in group:
            as_usual = abs(usual) >= SOME and fit.contrast * np.sign(usual) > ENOUGH * abs(usual)
            if len(group) >= FEWEST and (as_usual or abs(fit.contrast) >= EDGE):
                found[fit.mask].add(fit.image.what)
    return found


def _explain(low: list[Fit], group: list[Fit], usual: float, read: Reader) -> Iterator[Finding]:
    sign = float(np.sign(usual))
    enough = ENOUGH * abs(usual)
    left = []
    for fit in low:
        if fit.mirrored * sign > enough:
            words = f"{fit.mask.path.name}: contrast {fit.contrast:.2f}, mirrored {fit.mirrored:.2f}, usual {usual:.2f}"
            yield Finding("mask-mirrored", (fit.mask.patient,), words)
        else:
            left.append(fit)
    pairs = set()
    for fit in left:
        for other in left:
            if fit is not other and _on(fit, other, read) * sign > enough and _on(other, fit, read) * sign > enough:
                pairs.add(tuple(sorted((fit.mask.patient, other.mask.patient))))
    for first, second in sorted(pairs):
        yield Finding("mask-swapped", (first, second), f"{group[0].mask.what} against {group[0].image.what}")
    swapped = {patient for pair in pairs for patient in pair}
    for fit in left:
        if fit.mask.patient not in swapped:
            words = f"{fit.mask.path.name}: contrast {fit.contrast:.2f} on {fit.image.what}, usual {usual:.2f}"
            yield Finding("mask-unlike-image", (fit.mask.patient,), words)


def _on(fit: Fit, other: Fit, read: Reader) -> float:
    """Contrast of one patient's mask on another one's image, put at the same voxels."""
    data = read(other.image)
    if data is None or fit.small is None:
        return 0.0
    drawn = np.zeros(data.shape, bool)
    where = tuple(slice(c, min(c + n, m)) for c, n, m in zip(fit.corner, fit.small.shape, data.shape, strict=True))
    part = drawn[where]
    drawn[where] = fit.small[tuple(slice(0, n) for n in part.shape)]
    return contrast_of(drawn, np.nan_to_num(data)) if drawn.any() else 0.0


def _shifts(group: list[Fit], usual: float, told: set[tuple[str, str]]) -> Iterator[Finding]:
    """Masks that a shift by one voxel would fit clearly better, where the others fit best as they are."""
    sign = float(np.sign(usual))
    gains = []
    for fit in group:
        if fit.shifted:
            best = max(fit.shifted, key=lambda shift: fit.shifted[shift] * sign)
            gains.append((fit, best, (fit.shifted[best] - fit.contrast) * sign))
    if len(gains) < FEWEST:
        return
    usual_gain = float(np.percentile([gain for _, _, gain in gains], 75))
    for fit, best, gain in gains:
        if gain > SHIFT_GAIN * abs(usual) and gain > usual_gain + SHIFT_GAIN * abs(usual):
            if ("mask-shifted", fit.mask.patient) in told:
                continue
            told.add(("mask-shifted", fit.mask.patient))
            better = fit.contrast + gain * sign
            words = f"{fit.mask.path.name}: contrast {fit.contrast:.2f}, moved by {best} voxels {better:.2f}"
            yield Finding("mask-shifted", (fit.mask.patient,), words)
