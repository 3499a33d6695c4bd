# SPDX-License-Identifier: Apache-2.0
"""Images and masks on a grid of another voxel size, by MONAI; axes are RAS+ and stay so.

*cubic* is a spline of third order, which overshoots at edges: values are cut to the scan's own range, and background
of exactly 0 is kept where it was. Masks are taken by the nearest voxel, or, with *linear*, each label is interpolated
by itself and the largest wins, which keeps surfaces smooth.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from monai.transforms.spatial.dictionary import Spacingd

__all__ = ["resample_image", "resample_mask"]

_MODES: Final[dict[str, tuple[Any, str]]] = {
    "linear": ("bilinear", "border"), "nearest": ("nearest", "border"), "cubic": (3, "nearest"),
}  # fmt: skip
"""MONAI's words for the interpolation and for what lies beyond the edge: splines are computed by scipy."""


def resample_image(
    image: NDArray[np.float32], was: Sequence[float], spacing: tuple[float, ...], how: str
) -> NDArray[np.float32]:
    """An image on another grid.

    Args:
        image: (C, X, Y, Z).
        was: present size of a voxel along X, Y and Z, mm.
        spacing: wanted size, mm.
        how: ``linear``, ``cubic`` or ``nearest``.

    Returns:
        (C, X', Y', Z').
    """
    result = np.asarray(_moved(image, was, spacing, how), np.float32)
    if how == "cubic":
        low, high = (
            np.asarray(edge(image, axis=(1, 2, 3)), np.float32)[:, None, None, None] for edge in (np.min, np.max)
        )
        background = _moved((image != 0).astype(np.float32), was, spacing, "nearest") == 0
        result = np.where(background, np.float32(0), np.clip(result, low, high))
    return result


def resample_mask(
    mask: NDArray[np.uint8], was: Sequence[float], spacing: tuple[float, ...], how: str
) -> NDArray[np.uint8]:
    """A label map on another grid.

    Args:
        mask: (X, Y, Z).
        was: present size of a voxel, mm.
        spacing: wanted size, mm.
        how: ``nearest`` or ``linear``.
    """
    if how == "nearest":
        return np.asarray(_moved(mask[None], was, spacing, "nearest")[0], np.uint8)
    best, chosen = None, None
    for label in np.unique(mask):
        share = _moved((mask == label).astype(np.float32)[None], was, spacing, "linear")[0]
        if best is None or chosen is None:
            best, chosen = share, np.full(share.shape, label, np.uint8)
            continue
        better = share > best
        best[better], chosen[better] = share[better], label
    assert chosen is not None  # noqa: S101 - a mask has voxels
    return chosen


def _moved(array: NDArray[Any], was: Sequence[float], spacing: tuple[float, ...], how: str) -> NDArray[Any]:
    from monai.data.meta_tensor import MetaTensor

    # World axes of the affine are irrelevant here: a diagonal one of the voxel sizes resamples along RAS+.
    affine = torch.diag(torch.tensor([*was, 1.0], dtype=torch.float64))
    moved: Any = _transform(spacing, how)({"x": MetaTensor(torch.as_tensor(array), affine=affine)})
    return np.ascontiguousarray(np.asarray(moved["x"]))


@lru_cache(maxsize=8)
def _transform(spacing: tuple[float, ...], how: str) -> "Spacingd":
    from monai.transforms.spatial.dictionary import Spacingd

    mode, edge = _MODES[how]
    return Spacingd(["x"], pixdim=spacing, mode=mode, padding_mode=edge)
