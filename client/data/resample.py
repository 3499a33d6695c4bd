# SPDX-License-Identifier: Apache-2.0
"""Images and masks on a grid of another voxel size, by MONAI; axes are RAS+ and stay so.

*cubic* is a spline of third order, which overshoots at edges: values are cut to the scan's own range, and background
of exactly 0 is kept where it was. Masks are taken by the nearest voxel, or, with *linear*, each label is interpolated
by itself and the largest wins, which keeps surfaces smooth.

Half of the time goes into the list of places to sample at, which MONAI makes anew for every image. It depends on the
grids alone, so all images of a scan, and all scans of one shape, share it here; what is sampled is the same to the bit.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from monai.transforms.spatial.dictionary import Spacingd

__all__ = ["forget_places", "resample_image", "resample_mask"]

_MODES: Final[dict[str, tuple[Any, str]]] = {
    "linear": ("bilinear", "border"), "nearest": ("nearest", "border"), "cubic": (3, "nearest"),
}  # fmt: skip
"""MONAI's words for the interpolation and for what lies beyond the edge: splines are computed by scipy."""
NEARLY: Final = 2e-3
"""Within this share or so many mm, MONAI decides whether a voxel size is another one at all."""
MOST_PLACES: Final = 10_000_000
"""Voxels of the wanted grid whose places are kept: 24 bytes each."""


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


def forget_places() -> None:
    """Free what is kept for the next scan of the same shape."""
    _places.cache_clear()


def _moved(array: NDArray[Any], was: Sequence[float], spacing: tuple[float, ...], how: str) -> NDArray[Any]:
    """(C, X, Y, Z) to float32 on the other grid."""
    if how == "cubic" or all(abs(a - b) <= NEARLY * max(a, b, 1) for a, b in zip(was, spacing, strict=True)):
        return _moved_by_monai(array, was, spacing, how)
    mode, edge = _MODES[how]
    shape = (int(array.shape[1]), int(array.shape[2]), int(array.shape[3]))
    keep = prod(n * a / b for n, a, b in zip(shape, was, spacing, strict=True)) < MOST_PLACES
    places = (_places if keep else _places.__wrapped__)(shape, tuple(was), tuple(spacing))
    source = torch.as_tensor(array).to(torch.float64)[None].contiguous()
    sampled = torch.nn.functional.grid_sample(source, places, mode=mode, padding_mode=edge, align_corners=False)
    return np.ascontiguousarray(sampled[0].to(torch.float32).numpy())


@lru_cache(maxsize=1)
def _places(shape: tuple[int, int, int], was: tuple[float, ...], spacing: tuple[float, ...]) -> torch.Tensor:
    """Where MONAI's transform samples: (1, X', Y', Z', 3), in the range of -1 to 1, last axis first."""
    from monai.data.meta_tensor import MetaTensor
    from monai.networks.utils import to_norm_affine
    from monai.transforms.spatial.array import Spacing
    from monai.utils.enums import LazyAttr

    affine = torch.diag(torch.tensor([*was, 1.0], dtype=torch.float64))
    planned: Any = Spacing(spacing, lazy=True)(MetaTensor(torch.empty(1, *shape), affine=affine))
    step = planned.pending_operations[-1]
    turn, size = torch.as_tensor(step[LazyAttr.AFFINE]), [int(n) for n in step[LazyAttr.SHAPE]]
    theta = to_norm_affine(turn.to(torch.float64)[None], shape, size, align_corners=False)[:, :3]
    theta = theta[:, [2, 1, 0]][:, :, [2, 1, 0, 3]]
    return torch.nn.functional.affine_grid(theta, [1, 1, *size], align_corners=False)


def _moved_by_monai(array: NDArray[Any], was: Sequence[float], spacing: tuple[float, ...], how: str) -> NDArray[Any]:
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
