# SPDX-License-Identifier: Apache-2.0
"""N4ITK: takes a slow change of brightness, as receive coils make it, out of a scan.

The field is fitted on a coarser grid and evaluated on the scan's own. One thread: ITK's sums depend on the number of
threads, and every hospital must get the same bits from the same scan.

Reference: Tustison et al., N4ITK: improved N3 bias correction, IEEE Trans Med Imaging 2010;29:1310-1320.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...privacy.errors import EnvironmentProblem
from .foreground import Bits

__all__ = ["correct_bias"]

FEWEST: Final = 8
"""An axis is not shrunk to fewer voxels than this: the spline needs some."""


def correct_bias(
    data: NDArray[np.float32],
    inside: Bits,
    sizes: Sequence[float],
    *,
    shrink: int,
    iterations: Sequence[int],
) -> NDArray[np.float32]:
    """One image without its bias field.

    Args:
        data: finite grey values, (X, Y, Z). The logarithm is taken, so only voxels above 0 decide the field.
        inside: voxels that the field is fitted to, same shape.
        sizes: of a voxel along the three axes, mm.
        shrink: the fit uses one voxel in so many along each axis, at least 1.
        iterations: most iterations at each level of the spline.

    Returns:
        Same shape; 0 stays 0. The image itself where fewer than two different values lie inside.

    Raises:
        EnvironmentProblem: SimpleITK is not installed.
    """
    used = inside & (data > 0)
    if not used.any() or np.ptp(data[used]) <= 0:
        return data
    sitk = _sitk()
    flat = [axis for axis, n in enumerate(data.shape) if n == 1]
    kept = [axis for axis in range(3) if axis not in flat]
    if len(kept) < 2:
        return data
    image = _image(sitk, np.squeeze(np.maximum(data, 0), tuple(flat)), [sizes[a] for a in kept])
    mask = _image(sitk, np.squeeze(used, tuple(flat)).astype(np.uint8), [sizes[a] for a in kept])
    factors = [max(1, min(shrink, data.shape[axis] // FEWEST)) for axis in kept]
    small = sitk.Shrink(mask, factors)
    if not sitk.GetArrayViewFromImage(small).any():
        return data  # nothing is left of the mask on the coarse grid
    filter_ = sitk.N4BiasFieldCorrectionImageFilter()
    filter_.SetMaximumNumberOfIterations([int(n) for n in iterations])
    filter_.Execute(sitk.Shrink(image, factors), small)
    log_field = sitk.GetArrayFromImage(filter_.GetLogBiasFieldAsImage(image))
    field = np.exp(np.asarray(log_field, np.float64).transpose()).reshape(data.shape)
    return np.asarray(data / field, np.float32)


def _image(sitk: Any, array: NDArray[Any], sizes: Sequence[float]) -> Any:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))  # SimpleITK counts the last axis first
    image.SetSpacing([float(s) for s in sizes])
    return image


def _sitk() -> Any:
    try:
        sitk: Any = import_module("SimpleITK")
    except ImportError as error:
        raise EnvironmentProblem(
            "SimpleITK is not installed, and the study corrects bias fields; run: pip install 'SimpleITK>=2.4'"
        ) from error
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return sitk
