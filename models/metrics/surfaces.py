# SPDX-License-Identifier: Apache-2.0
"""How far apart the outlines of prediction and reference are in one patient's volume: HD95 and surface Dice, in mm.

MONAI computes both, on the box around the two masks alone: the distances are those of the whole image, the time is not.
An outline is the mask's voxels that have a face neighbour outside the mask, or lie at the border of the image.

References: Huttenlocher et al. 1993 (Hausdorff distance); Nikolov et al. 2021, https://doi.org/10.2196/26151, and
Seidlitz et al. 2022, https://doi.org/10.1016/j.media.2022.102488 (surface Dice); Reinke et al. 2024, Understanding
metric-related pitfalls, https://doi.org/10.1038/s41592-023-02150-0 (empty masks).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .overlap import box_of, check_spacing, named, same_shape

__all__ = ["diagonal", "hausdorff95", "quietly", "surface_dice"]

_T = TypeVar("_T")


def hausdorff95(
    prediction: NDArray[np.generic],
    reference: NDArray[np.generic],
    labels: Sequence[str],
    spacing: Sequence[float],
) -> dict[str, float]:
    """95th-percentile symmetric Hausdorff distance between the surfaces of one patient's masks.

    Args:
        prediction: label per voxel of the whole volume ``(*spatial)``; 0 is background.
        reference: the truth, same shape.
        labels: names of the values 1, 2, …
        spacing: voxel spacing in mm, one number per axis.

    Returns:
        ``hd95`` in mm, the mean over labels; with several labels also ``hd95_<label>``. Both masks empty: 0; exactly
        one: the diagonal of the image.
    """
    same_shape(prediction, reference)
    check_spacing(spacing, prediction.ndim)
    distances = [_hausdorff95(prediction == value, reference == value, spacing) for value in range(1, len(labels) + 1)]
    return named("hd95", distances, labels)


def surface_dice(
    prediction: NDArray[np.generic],
    reference: NDArray[np.generic],
    labels: Sequence[str],
    spacing: Sequence[float],
    tolerance: float,
) -> dict[str, float]:
    """Normalised surface Dice (NSD): the share of both outlines that lies within ``tolerance`` of the other.

    Args:
        prediction: label per voxel of the whole volume ``(*spatial)``, two or three axes; 0 is background.
        reference: the truth, same shape.
        labels: names of the values 1, 2, …
        spacing: voxel spacing in mm, one number per axis.
        tolerance: in mm, at least 0.

    Returns:
        ``nsd``, the mean over labels, in [0, 1]; with several labels also ``nsd_<label>``. Both masks empty: 1; exactly
        one: 0.
    """
    same_shape(prediction, reference)
    check_spacing(spacing, prediction.ndim)
    shares = [
        _surface_dice(prediction == value, reference == value, spacing, tolerance)
        for value in range(1, len(labels) + 1)
    ]
    return named("nsd", shares, labels)


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the diagonal of an image in mm: the HD95 of a patient of whom one mask alone is empty."""
    return math.sqrt(sum((side * mm) ** 2 for side, mm in zip(shape, spacing, strict=True)))


def _hausdorff95(mine: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    some, other = bool(mine.any()), bool(truth.any())
    if some != other:
        return diagonal(mine.shape, spacing)
    if not some:
        return 0.0
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    pair = _boxed(mine, truth)
    found = quietly(
        lambda: compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=[float(mm) for mm in spacing]
        )
    )
    return float(found.item())


def _surface_dice(
    mine: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> float:
    some, other = bool(mine.any()), bool(truth.any())
    if not (some and other):
        return float(some == other)
    import torch
    from monai.metrics.surface_dice import compute_surface_dice

    here, there = _boxed(mine, truth)
    pair = torch.from_numpy(here), torch.from_numpy(there)
    found = quietly(
        lambda: compute_surface_dice(*pair, [tolerance], include_background=True, spacing=[float(mm) for mm in spacing])
    )
    return float(found.item())


def _boxed(mine: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks ``(1, 1, *spatial)`` within the box around them.

    The margin of one voxel keeps the surfaces, and so the distances, exactly those of the whole image.
    """
    box = box_of(mine | truth, 1)
    return np.ascontiguousarray(mine[box])[None, None], np.ascontiguousarray(truth[box])[None, None]


def quietly(compute: Callable[[], _T]) -> _T:
    """``compute()`` without MONAI's warnings to itself: 1.5 and 1.6 pass on an argument that they have deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        return compute()
