# SPDX-License-Identifier: Apache-2.0
"""How much of one patient's volume prediction and reference share: Dice, and the difference of their volumes.

Label maps are of the whole volume, never of a slice.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["box_of", "dice", "named", "same_shape", "volume_difference"]

MM3_PER_ML = 1000.0


def dice(prediction: NDArray[np.generic], reference: NDArray[np.generic], labels: Sequence[str]) -> dict[str, float]:
    """Dice coefficient of one patient: 2|P ∩ R| / (|P| + |R|) (Dice 1945).

    Args:
        prediction: label per voxel of the whole volume, any shape; 0 is background.
        reference: the truth, same shape.
        labels: names of the values 1, 2, …

    Returns:
        ``dice``, the mean over labels, in [0, 1]; with several labels also ``dice_<label>``. Both masks empty: 1;
        exactly one: 0.
    """
    same_shape(prediction, reference)
    scores = []
    for value in range(1, len(labels) + 1):
        mine, truth = prediction == value, reference == value
        total = int(np.count_nonzero(mine)) + int(np.count_nonzero(truth))
        scores.append(2.0 * int(np.count_nonzero(mine & truth)) / total if total else 1.0)
    return named("dice", scores, labels)


def volume_difference(
    prediction: NDArray[np.generic],
    reference: NDArray[np.generic],
    labels: Sequence[str],
    spacing: Sequence[float],
) -> dict[str, float]:
    """Absolute difference of the volumes of one patient's masks, in ml (ISLES'22).

    Reference: Hernandez Petzsche et al. 2022, https://doi.org/10.1038/s41597-022-01875-5.

    Args:
        prediction: label per voxel of the whole volume ``(*spatial)``; 0 is background.
        reference: the truth, same shape.
        labels: names of the values 1, 2, …
        spacing: voxel spacing in mm, one number per axis.

    Returns:
        ``volume_difference`` in ml, the mean over labels, from 0; with several labels also one for each. A mask that is
        empty has the volume 0.
    """
    same_shape(prediction, reference)
    check_spacing(spacing, prediction.ndim)
    millilitres = float(np.prod(spacing)) / MM3_PER_ML
    differences = []
    for value in range(1, len(labels) + 1):
        voxels = int(np.count_nonzero(prediction == value)) - int(np.count_nonzero(reference == value))
        differences.append(abs(voxels) * millilitres)
    return named("volume_difference", differences, labels)


def box_of(mask: NDArray[np.bool_], margin: int) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty, ``margin`` voxels wider where the image allows."""
    box = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(inside[0]) - margin, 0), int(inside[-1]) + 1 + margin))
    return tuple(box)


def named(metric: str, values: Sequence[float], labels: Sequence[str]) -> dict[str, float]:
    """The mean over labels under the metric's name, and, with several labels, each under its own."""
    found = {metric: float(np.mean(values))}
    if len(labels) > 1:
        found |= {f"{metric}_{label}": float(value) for label, value in zip(labels, values, strict=True)}
    return found


def same_shape(prediction: NDArray[np.generic], reference: NDArray[np.generic]) -> None:
    """Refuse two images that cannot be laid over each other.

    Raises:
        ValueError: they differ in shape.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")


def check_spacing(spacing: Sequence[float], axes: int) -> None:
    """Refuse a spacing for another number of axes.

    Raises:
        ValueError: with both numbers.
    """
    if len(spacing) != axes:
        raise ValueError(f"spacing has {len(spacing)} numbers for an image of {axes} axes")
