# SPDX-License-Identifier: Apache-2.0
"""Which voxels of a scan count: a simple mask of the head or the brain, and the box around it.

*head*: above Otsu's threshold of the clipped grey values, the largest connected part, holes filled. On images
whose skull was removed that is the brain. *brain*: the same voxels are opened by a ball, which cuts the thin bridges
between brain and scalp (the idea of Brummer et al. 1993), and the largest part that remains is grown back. It knows no
anatomy: eyes, neck or sinuses may stay, bright tumours at the surface may go. Where that matters, give a mask.

Reference: Otsu, IEEE Trans SMC 1979;9:62-66; Brummer et al., IEEE Trans Med Imaging 1993;12:153-166.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "box_around", "brain_of", "head_of"]

Bits = NDArray[np.bool_]
CLIP: Final = (0.5, 99.5)
"""Percentiles between which the threshold is looked for: a few bright vessels must not decide it."""


def head_of(data: NDArray[np.float32]) -> Bits:
    """The head.

    Args:
        data: finite grey values, (X, Y, Z).

    Returns:
        Same shape; all voxels where the image is constant.
    """
    return _filled(_largest(_bright(data)))


def brain_of(data: NDArray[np.float32], sizes: Sequence[float], radius: float) -> Bits:
    """The brain, roughly.

    Args:
        data: finite grey values, (X, Y, Z).
        sizes: of a voxel along the three axes, mm.
        radius: of the opening, mm; half the thickness of what is cut away.

    Returns:
        Same shape; :func:`head_of` where nothing is as thick as the ball.
    """
    ndimage = _ndimage()
    bright = _bright(data)
    # A frame of background: what touches the edge of the image must be eroded from there too.
    depth = ndimage.distance_transform_edt(np.pad(bright, 1), sampling=sizes)[1:-1, 1:-1, 1:-1]
    core = depth > radius
    if not core.any():
        return head_of(data)
    grown = ndimage.distance_transform_edt(~_largest(core), sampling=sizes) <= radius
    return _filled(grown & bright)


def box_around(inside: Bits, margin: int) -> tuple[slice, slice, slice]:
    """The smallest box that holds all voxels, and ``margin`` more on each side; everything where there is none.

    Args:
        inside: (X, Y, Z).
        margin: voxels, at least 0.
    """
    spans = []
    for axis, size in enumerate(inside.shape):
        hit = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (int(hit[0]), int(hit[-1])) if hit.size else (0, size - 1)
        spans.append(slice(max(first - margin, 0), min(last + 1 + margin, size)))
    return spans[0], spans[1], spans[2]


def _bright(data: NDArray[np.float32]) -> Bits:
    from .quality.metrics import otsu

    low, high = np.percentile(data, CLIP)
    clipped = np.clip(data, low, high)
    limit = otsu(clipped)
    bright = np.asarray(clipped >= limit)
    return bright if bright.any() else np.ones(data.shape, bool)


def _largest(bits: Bits) -> Bits:
    labels, count = _ndimage().label(bits)
    if count < 2:
        return bits
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == int(sizes.argmax()))


def _filled(bits: Bits) -> Bits:
    """Holes filled, slice by slice along each axis: ventricles may be open to the cut edge of a thin stack."""
    ndimage = _ndimage()
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        within = np.moveaxis(np.zeros((3, 3, 3), bool), axis, 0)
        within[1] = ndimage.generate_binary_structure(2, 1)
        labels, count = ndimage.label(~bits, np.moveaxis(within, 0, axis))
        outside = np.zeros(count + 1, bool)
        for other in others:
            outside[labels.take([0, -1], axis=other).ravel()] = True
        bits = bits | ~(outside[labels] | bits)
    return np.ascontiguousarray(bits)


def _ndimage() -> Any:
    from scipy import ndimage

    return ndimage
