# SPDX-License-Identifier: Apache-2.0
"""A label map brought back from the study's grid to the grid of the scan that it was made of, and saved there.

The way back is the way of :mod:`.data.preprocess` in reverse: what was cropped is background, voxels are taken by the
nearest (MONAI's inverse of its own resampling), axes are turned from RAS+ to the file's own. Shape, affine, orientation
codes and unit of the file are kept, so any viewer lays the prediction over the scan.
"""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from ..privacy.errors import DataError
from .data.nifti import Volume
from .data.preprocess import Prepared

__all__ = ["on_scan_grid", "save_labels"]

_NIB: Any = nibabel
_RAS = np.array([[0, 1], [1, 1], [2, 1]])
_LABEL_INTENT = 1002  # NIfTI's code: values are labels


def on_scan_grid(labels: NDArray[np.integer[Any]], prepared: Prepared, volume: Volume) -> NDArray[np.uint8]:
    """A label map on the grid of the scan, axes in RAS+ order.

    Args:
        labels: on the prepared grid, ``(x, y, z)``.
        prepared: the scan as the network saw it.
        volume: the scan as it was read, ``(X, Y, Z)``.

    Returns:
        Shape ``(X, Y, Z)``.
    """
    if volume.spacing is None or prepared.spacing is None or prepared.spacing == volume.spacing:
        return _uncropped(labels, prepared.corner, volume.data.shape)
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Spacing

    affine = torch.diag(torch.tensor([*volume.spacing, 1.0], dtype=torch.float64))
    move = Spacing(prepared.spacing, mode="nearest", padding_mode="border")
    grid: Any = move(MetaTensor(torch.zeros((1, *volume.data.shape)), affine=affine))
    grid[0] = torch.from_numpy(_uncropped(labels, prepared.corner, tuple(grid.shape[1:])).astype(np.float32))
    back: Any = move.inverse(grid)
    return np.asarray(np.rint(np.asarray(back)[0]), dtype=np.uint8)


def _uncropped(
    labels: NDArray[np.integer[Any]], corner: tuple[int, int, int], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    whole = np.zeros(shape, np.uint8)
    whole[tuple(slice(first, first + n) for first, n in zip(corner, labels.shape, strict=True))] = labels
    return whole


def save_labels(path: Path, labels: NDArray[np.uint8], scan: Path) -> None:
    """Write a label map beside nothing but its scan's header: same shape, affine and unit.

    Args:
        path: new file, ``.nii.gz``.
        labels: as :func:`on_scan_grid` gives it.
        scan: the file whose grid it is.

    Raises:
        DataError: the scan can no longer be read.
    """
    try:
        image = _NIB.load(scan)
        shape, affine = image.shape, image.affine
    except (OSError, ValueError, ImageFileError) as error:
        raise DataError(f"{scan.name}: cannot be read ({error}); it was there a moment ago; start again") from error
    turn = _NIB.orientations.ornt_transform(_RAS, _NIB.io_orientation(affine))
    own = _NIB.orientations.apply_orientation(labels, turn).reshape(shape)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"], header["descrip"] = 0, 0, b""
    header.set_intent(_LABEL_INTENT)
    header.extensions.clear()  # notes of other programs about the scan's grey values, or about the patient
    path.parent.mkdir(parents=True, exist_ok=True)
    _NIB.save(type(image)(np.ascontiguousarray(own), affine, header), path)
