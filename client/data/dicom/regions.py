# SPDX-License-Identifier: Apache-2.0
"""Turns drawn regions (DICOM SEG and RTSTRUCT) into masks on the grid of the image that they were drawn on.

SEG is read by highdicom, which knows its multi-frame layout and leaves empty frames out as the standard does. Contours
of RTSTRUCT are filled here: a voxel belongs to a region if its centre lies inside the contours of its slice, an inner
contour cutting a hole (even-odd rule). rt-utils does the same with OpenCV on whole pixel corners, half a pixel off,
and would bring 60 MB of OpenCV with it.

Reference: DICOM PS3.3 C.8.20 (segmentation) and C.8.8.6 (ROI contour).
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from ....privacy.errors import DataError
from ..words import said
from .series import Series

__all__ = ["Region", "label_of", "read_regions", "referenced_series", "region_names"]

OFF_PLANE: Final = 0.25
"""A contour may be this share of the slice distance beside the centre of its slice."""
MAX_POINTS: Final = 100_000

Region = tuple[str, NDArray[np.uint8]]
"""Name of a region as its author typed it, and its mask."""


def referenced_series(series: Series) -> set[str]:
    """UIDs of the image series that a SEG or RTSTRUCT says it was drawn on."""
    header = series.first.header
    found = {str(item.get("SeriesInstanceUID", "")) for item in header.get("ReferencedSeriesSequence", [])}
    for frame in header.get("ReferencedFrameOfReferenceSequence", []):
        for study in frame.get("RTReferencedStudySequence", []):
            for item in study.get("RTReferencedSeriesSequence", []):
                found.add(str(item.get("SeriesInstanceUID", "")))
    return found - {""}


def region_names(series: Series) -> list[str]:
    """Names of the regions in a SEG or RTSTRUCT, in their order.

    Raises:
        DataError: the object is damaged.
    """
    try:
        return _names(series)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged object raises inside pydicom
        raise DataError("damaged object with regions; export it again") from error


def _names(series: Series) -> list[str]:
    whole = _read(series)
    if series.kind == "segmentation":
        return [str(item.get("SegmentLabel", "")) for item in whole.get("SegmentSequence", [])]
    drawn = {int(item.ReferencedROINumber) for item in whole.get("ROIContourSequence", []) if "ContourSequence" in item}
    rois = whole.get("StructureSetROISequence", [])
    return [str(item.get("ROIName", "")) for item in rois if int(item.ROINumber) in drawn]


def label_of(name: str, number: int) -> str:
    """A region's name as a BIDS label: letters and digits in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())[:24] or f"region{number}"


def read_regions(series: Series, affine: NDArray[np.float64], shape: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Masks in the order of :func:`region_names`, each of ``shape``, with 1 inside.

    Args:
        series: of kind ``segmentation`` or ``structures``.
        affine: of the image that they were drawn on, (4, 4), voxel to RAS in mm.
        shape: its voxels (X, Y, Z).

    Raises:
        DataError: the object is damaged, or lies beside the image's grid.
    """
    fill = _segments if series.kind == "segmentation" else _structures
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fill(series, affine, (int(shape[0]), int(shape[1]), int(shape[2])))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged object raises inside pydicom and highdicom
        raise DataError(f"the regions cannot be read ({said(error)}); export them again as DICOM SEG") from error


def _read(series: Series) -> Any:
    try:
        return dcmread(series.first.path)
    except Exception as error:  # whatever a broken file raises inside pydicom
        raise DataError("damaged object with regions; export it again") from error


def _segments(series: Series, affine: NDArray[np.float64], shape: tuple[int, int, int]) -> list[NDArray[np.uint8]]:
    import highdicom

    masks = [np.zeros(shape, np.uint8) for _ in region_names(series)]
    inverse = np.linalg.inv(affine)
    segmentation = highdicom.seg.segread(str(series.first.path))
    for place, number in enumerate(segmentation.segment_numbers):
        volume = segmentation.get_volume(segment_numbers=[number])
        drawn = np.argwhere(np.asarray(volume.array)[..., 0] > 0.5)
        if not len(drawn):
            continue
        to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(volume.affine, np.float64)
        turn = inverse @ to_ras
        if np.abs(np.abs(np.linalg.det(turn[:3, :3])) - 1) > 0.01 or np.abs(turn[:3] - np.rint(turn[:3])).max() > 0.05:
            raise DataError(
                "the segmentation lies on another grid than the image; expected the image's own voxels; export it "
                "again on the grid of the image that it was drawn on"
            )
        voxels = np.rint(turn[:3, :3] @ drawn.T + turn[:3, 3:]).astype(int)
        if (voxels < 0).any() or (voxels >= np.array(shape)[:, None]).any():
            raise DataError("the segmentation reaches beyond the image; expected the image that it was drawn on")
        masks[place][tuple(voxels)] = 1
    return masks


def _structures(series: Series, affine: NDArray[np.float64], shape: tuple[int, int, int]) -> list[NDArray[np.uint8]]:
    whole = _read(series)
    contours = {int(item.ReferencedROINumber): item for item in whole.get("ROIContourSequence", [])}
    inverse = np.linalg.inv(affine).astype(np.float64)
    masks = []
    for roi in whole.get("StructureSetROISequence", []):
        item = contours.get(int(roi.ROINumber))
        if item is None or "ContourSequence" not in item:
            continue
        mask = np.zeros(shape, np.uint8)
        for contour in item.ContourSequence:
            if str(contour.get("ContourGeometricType", "")) == "CLOSED_PLANAR":
                _fill(mask, np.asarray(contour.ContourData, dtype=np.float64).reshape(-1, 3), inverse)
        masks.append(mask)
    return masks


def _fill(mask: NDArray[np.uint8], points: NDArray[np.float64], inverse: NDArray[np.float64]) -> None:
    """Turn over (even-odd) the voxels of one slice whose centres lie inside a contour given in LPS mm."""
    if not 3 <= len(points) <= MAX_POINTS:
        return
    voxel = (points * [-1, -1, 1]) @ inverse[:3, :3].T + inverse[:3, 3]
    axis = int(np.argmin(np.ptp(voxel, axis=0)))  # the contour's plane lies across this axis of the voxel grid
    place = float(voxel[:, axis].mean())
    index = round(place)
    if np.abs(voxel[:, axis] - index).max() > OFF_PLANE:
        raise DataError("a contour lies between the slices of the image; expected the image that it was drawn on")
    if not 0 <= index < mask.shape[axis]:
        raise DataError("a contour lies beyond the image; expected the image that it was drawn on")
    flat = np.delete(voxel, axis, axis=1)
    plane = mask.take(index, axis=axis)
    inside = _inside(flat, (int(np.size(plane, 0)), int(np.size(plane, 1))))
    where: list[Any] = [slice(None)] * 3
    where[axis] = index
    mask[tuple(where)] = plane ^ inside


def _inside(polygon: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """1 where the centre of a pixel lies inside the polygon: crossings of a ray along the second axis are counted."""
    crossings = np.zeros(shape, np.int32)
    rows = np.arange(shape[0])
    columns = np.arange(shape[1])
    for (a_row, a_column), (b_row, b_column) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if a_row == b_row:
            continue
        low, high = min(a_row, b_row), max(a_row, b_row)
        hit = rows[(rows >= low) & (rows < high)]
        at = a_column + (hit - a_row) * (b_column - a_column) / (b_row - a_row)
        crossings[hit] += columns[None, :] < at[:, None]
    return (crossings % 2).astype(np.uint8)
