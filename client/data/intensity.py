# SPDX-License-Identifier: Apache-2.0
"""Grey values of one scan, brought to a common scale. Each channel of each scan by itself: nothing mixes patients.

The statistics are computed by numpy in 64 bits, on one thread: a sum in torch depends on the number of threads,
and the same scan must give the same bits in every engine.

Reference: Nyúl, Udupa and Zhang, New variants of a method of MRI scale standardization, IEEE Trans Med Imaging
2000;19:143-150.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...privacy.study_data import LANDMARK_PERCENTILES, PreprocessingSection
from .foreground import Bits

__all__ = ["PERCENTILES", "landmarks_of", "normalised", "on_standard_scale", "standard_scale"]

PERCENTILES: Final = (1.0, 99.0)
SCALE: Final = (0.0, 1.0)
"""Where the standard scale puts the first and last landmark."""


def normalised(
    channel: NDArray[np.float32],
    how: str,
    *,
    inside: Bits | None = None,
    table: PreprocessingSection | None = None,
    number: int = 0,
) -> NDArray[np.float32]:
    """One channel of one scan, normalised.

    Args:
        channel: finite values of any range, shape (X, Y, Z).
        how: ``data.normalise``. ``zscore``: zero mean and unit variance over the foreground; ``percentile``: the 1st to
            99th percentile mapped to 0–1, values beyond them cut off; ``window``: the same with two fixed values;
            ``nyul``: eleven percentiles of the foreground brought to the study's landmarks, straight lines between
            and beyond them; ``none``: as stored.
        inside: the foreground, same shape; what lies outside becomes 0. None: the voxels that are not 0 (background
            stays 0), and all voxels for ``percentile``.
        table: percentiles, window, landmarks and clipping; None: the defaults.
        number: of the channel, from 0, for ``nyul``.

    Returns:
        Same shape. A constant image gives zeros, but for ``none`` and ``window``.
    """
    table = table or PreprocessingSection()
    if how == "none":
        return channel if inside is None else np.where(inside, channel, np.float32(0))
    values = channel.astype(np.float64)
    if how == "zscore":
        result = _zscore(values, values != 0 if inside is None else inside, table.clip)
    elif how == "nyul":
        each = len(LANDMARK_PERCENTILES)
        scale = table.landmarks[number * each : (number + 1) * each]
        where = values != 0 if inside is None else inside
        result = np.where(where, on_standard_scale(values, landmarks_of(channel, where), scale), 0.0)
    elif how == "window":
        result = _stretched(values, *table.window)
    else:
        body = values if inside is None or not inside.any() else values[inside]
        low, high = np.percentile(body, table.percentiles)
        if high <= low:  # nearly all voxels are equal
            low, high = body.min(), body.max()
        result = _stretched(values, float(low), float(high))
    if inside is not None:
        result = np.where(inside, result, 0.0)
    return result.astype(np.float32)


def _zscore(values: NDArray[np.float64], inside: Bits, clip: Sequence[float]) -> NDArray[np.float64]:
    body = values[inside]
    if clip and body.size:
        body = np.clip(body, *np.percentile(body, clip))
    spread = float(body.std()) if body.size else 0.0
    result = np.zeros_like(values)
    if spread > 0:
        result[inside] = (body - body.mean()) / spread
    return result


def _stretched(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def landmarks_of(channel: NDArray[np.float32], inside: Bits) -> NDArray[np.float64]:
    """The percentiles of one scan's foreground that Nyúl's method matches, (11,); zeros where there is none."""
    body = channel[inside].astype(np.float64)
    return np.asarray(np.percentile(body, LANDMARK_PERCENTILES)) if body.size else np.zeros(len(LANDMARK_PERCENTILES))


def standard_scale(scans: Sequence[NDArray[np.float64]]) -> list[float]:
    """Landmarks of a standard scale, learned from scans of one modality.

    Each scan's first and last landmark are brought to 0 and 1, and the means over scans are the scale.

    Args:
        scans: :func:`landmarks_of` each; constant ones are passed over.

    Returns:
        Eleven rising numbers, the first 0 and the last 1.

    Raises:
        ValueError: no scan can be used.
    """
    sound = [marks for marks in scans if marks[-1] > marks[0]]
    if not sound:
        raise ValueError("no scan with different grey values")
    mean = np.mean([(marks - marks[0]) / (marks[-1] - marks[0]) for marks in sound], axis=0)
    # Equal neighbours (few grey values) are parted, as the study asks for rising numbers.
    steps = np.maximum(np.diff(mean), 1e-4)
    scale = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    return [round(SCALE[0] + float(v) * (SCALE[1] - SCALE[0]), 5) for v in scale]


def on_standard_scale(
    values: NDArray[np.float64], marks: NDArray[np.float64], scale: Sequence[float]
) -> NDArray[np.float64]:
    """Values by straight lines from a scan's landmarks to those of the study, the outer lines going on.

    Args:
        values: any shape.
        marks: of the scan, not falling.
        scale: of the study, rising, as many.

    Returns:
        Same shape; zeros where all landmarks are equal.
    """
    kept = np.concatenate([[True], np.diff(marks) > 0])
    x, y = marks[kept], np.asarray(scale, np.float64)[kept]
    if len(x) < 2:
        return np.zeros_like(values)
    result: NDArray[np.float64] = np.interp(values, x, y)
    below, above = values < x[0], values > x[-1]
    result[below] = y[0] + (values[below] - x[0]) * (y[1] - y[0]) / (x[1] - x[0])
    result[above] = y[-1] + (values[above] - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
    return result
