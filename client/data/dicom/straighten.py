# SPDX-License-Identifier: Apache-2.0
"""A sheared stack of CT slices (gantry tilt) made straight, where the hospital's staff ask for it.

With the gantry tilted, slices are parallel and evenly spaced, but each lies a little beside the one before. NIfTI's
sform can say so, and most programs that read it cannot: they take voxel axes for perpendicular. So each slice is moved
within its own plane, by a part of a pixel with straight lines between neighbours; across slices nothing is mixed. Grey
values are then no longer the scanner's own, so this is never done unasked: ``action`` of the series in the mapping
file must say ``straighten``, and the side-car says that it was done. Uneven slices stay refused: what lies in a gap
would have to be invented.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from ....privacy.errors import DataError
from ..words import said
from .geometry import Stack
from .series import Series

__all__ = ["straight", "straightened"]

_PLAIN: Final = ("", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
_CT: Final = "1.2.840.10008.5.1.4.1.1.2"


def straightened(series: Series, stack: Stack) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Hounsfield units of a tilted CT on a straight grid, and its affine.

    Args:
        series: single-frame CT slices, one at each place.
        stack: its geometry, sheared.

    Raises:
        DataError: another kind of series, compressed pixels, or pixels that cannot be read.
    """
    if series.first.text("SOPClassUID") != _CT or stack.volumes != 1:
        raise DataError("only a CT series with one slice at each place is straightened; reformat it at the console")
    if any(instance.syntax not in _PLAIN for instance in series.instances):
        raise DataError("tilted and compressed; let the PACS send the series uncompressed, to have it straightened")
    slices = []
    for (number,) in stack.order:
        try:
            whole: Any = dcmread(series.instances[number].path)
            grey = whole.pixel_array.astype(np.float64) * float(whole.get("RescaleSlope", 1))
            slices.append((grey + float(whole.get("RescaleIntercept", 0))).T)
        except Exception as error:  # whatever damaged pixels raise inside pydicom
            detail = said(error)
            raise DataError(f"pixels cannot be read ({detail}); export the series again") from error
    if len({one.shape for one in slices}) > 1 or slices[0].ndim != 2:
        raise DataError("slices of different sizes in one series; export it again")
    voxels, affine = straight(np.stack(slices, axis=2), stack.affine)
    return np.rint(np.clip(voxels, -32768, 32767)).astype(np.int16), affine


def straight(voxels: NDArray[np.float64], sheared: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels of a sheared stack on the smallest straight grid that holds them all.

    Args:
        voxels: (X, Y, Z).
        sheared: affine whose first two axes are perpendicular, (4, 4).

    Returns:
        Voxels (X', Y', Z) with the smallest grey value where nothing was measured, and their affine, whose third axis
        is perpendicular to both others. Slices keep their planes.
    """
    from scipy import ndimage

    u, v, w = sheared[:3, 0], sheared[:3, 1], sheared[:3, 2]
    by = float(w @ u / (u @ u)), float(w @ v / (v @ v))  # pixels that each slice lies beside the one before
    last = voxels.shape[2] - 1
    low = [math.floor(min(0.0, step * last) + 1e-6) for step in by]
    size = [
        n + math.ceil(max(0.0, step * last) - 1e-6) - start
        for n, step, start in zip(voxels.shape, by, low, strict=False)
    ]
    fill = float(voxels.min())
    found = np.empty((size[0], size[1], voxels.shape[2]))
    for k in range(voxels.shape[2]):
        offset: Any = [start - step * k for start, step in zip(low, by, strict=True)]
        found[:, :, k] = ndimage.affine_transform(
            voxels[:, :, k], np.ones(2), offset, output_shape=tuple(size), order=1, mode="constant", cval=fill
        )
    affine = sheared.copy()
    affine[:3, 2] = w - by[0] * u - by[1] * v
    affine[:3, 3] = sheared[:3, 3] + low[0] * u + low[1] * v
    return found, affine
