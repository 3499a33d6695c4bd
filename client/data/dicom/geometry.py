# SPDX-License-Identifier: Apache-2.0
"""Where the voxels lie, from the DICOM headers alone: the reference that every converted volume is held against.

World coordinates are RAS+ in mm, as in NIfTI; DICOM counts LPS, so the first two are negated. Axes of a reference
are (column, row, slice): moving along the first follows a row of the picture to the right.

Reference: DICOM PS3.3 C.7.6.2.1.1 (equation C.7.6.2.1-1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ....privacy.errors import DataError

__all__ = ["MAX_ERROR_MM", "Plane", "Stack", "Tilted", "align", "stack_planes"]

MAX_ERROR_MM: Final = 1e-3
"""A converted volume may be this far from the headers' geometry, in mm, at any of its corners."""
MAX_UNEVEN: Final = 0.01
"""Slices may be this share of their distance away from an even stack: what rounding in headers explains."""
MAX_TILT_DEGREES: Final = 0.1
_LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0])

Floats = NDArray[np.float64]


class Tilted(DataError):
    """The stack is sheared and otherwise sound."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One picture in space: position of the centre of its first pixel and its six direction cosines, in LPS, mm."""

    position: Floats  # (3,)
    orientation: Floats  # (6,) along a row, then along a column
    spacing: tuple[float, float]  # mm between rows, between columns

    @property
    def normal(self) -> Floats:
        """Unit vector across the picture."""
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True, slots=True)
class Stack:
    """Evenly spaced parallel pictures: an affine, and how many pictures lie at each place."""

    affine: Floats  # (4, 4), (column, row, slice) to RAS mm
    slices: int
    volumes: int
    order: tuple[tuple[int, ...], ...]  # for each slice, the planes (as numbered by the caller) that lie there
    tilt: float = 0.0  # degrees by which the stack is sheared; 0: straight


def stack_planes(planes: Sequence[Plane], *, tilted: bool = False) -> Stack:
    """Order pictures in space and check that they make an even stack.

    Args:
        planes: at least one.
        tilted: a sheared stack is no fault.

    Raises:
        Tilted: gantry tilt is all that is wrong.
        DataError: several orientations, uneven or missing slices, a different number of pictures per place.
    """
    first = planes[0]
    if any(np.abs(p.orientation - first.orientation).max() > 1e-3 for p in planes):
        raise DataError("pictures of several orientations in one series: a localiser, or several stacks; import none")
    if any(max(abs(a - b) for a, b in zip(p.spacing, first.spacing, strict=True)) > 1e-4 for p in planes):
        raise DataError("pixel sizes differ within the series; expected one; export the series again")
    along = np.array([p.position @ first.normal for p in planes])
    places = _group(along)
    heights = np.array([along[list(members)].mean() for members in places])
    per_place = {len(members) for members in places}
    if len(per_place) > 1:
        few, many = min(per_place), max(per_place)
        short = sum(len(members) < many for members in places)
        raise DataError(
            f"missing slices: {short} of {len(places)} places have {few} pictures instead of {many}; "
            "send the whole series again from the PACS"
        )
    start, end = (planes[members[0]].position for members in (places[0], places[-1]))
    count = len(places)
    step = (end - start) / (count - 1) if count > 1 else first.normal * 1.0
    tilt = 0.0
    if count > 1:
        tilt, uneven = _tilt(step, first.normal), _uneven(heights)
        said = "" if not tilt else _TILTED.format(tilt)
        if uneven:
            raise DataError("; ".join(filter(None, (said, uneven))))
        _check_line(np.array([planes[m[0]].position for m in places]), start, step)
        if tilt and not tilted:
            raise Tilted(said + ", or set action to straighten in the mapping file (CT)")
    affine = np.eye(4)
    rows, columns = first.spacing
    affine[:3, 0] = first.orientation[:3] * columns
    affine[:3, 1] = first.orientation[3:] * rows
    affine[:3, 2] = step
    affine[:3, 3] = start
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    return Stack(affine, count, per_place.pop(), tuple(places), tilt)


def _group(along: Floats) -> list[tuple[int, ...]]:
    """Pictures by place, from low to high; those within 0.01 mm share one."""
    order = np.argsort(along, kind="stable")
    places: list[list[int]] = []
    for index in order:
        if places and along[index] - along[places[-1][0]] < 0.01:
            places[-1].append(int(index))
        else:
            places.append([int(index)])
    return [tuple(sorted(members)) for members in places]


def _uneven(heights: Floats) -> str:
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if np.abs(gaps - usual).max() <= MAX_UNEVEN * usual:
        return ""
    share = gaps / usual
    if (np.abs(share - np.rint(share)) < 0.05).all():
        missing = int(np.rint(share).sum()) - len(gaps)
        return (
            f"missing slices: about {missing}, where the usual distance of {usual:.2f} mm becomes up to "
            f"{gaps.max():.2f} mm; send the whole series again from the PACS"
        )
    return (
        f"slice distances from {gaps.min():.2f} to {gaps.max():.2f} mm: NIfTI holds even slices only; reformat the "
        "series at the console, or resample it with dcm2niix (its _Eq_ file) and import the result"
    )


_TILTED: Final = "gantry tilt of {:.1f} degrees: the stack is sheared; reformat it at the console"


def _tilt(step: Floats, normal: Floats) -> float:
    """Degrees between the stack and the pictures' normal; 0 where rounding explains them."""
    cosine = abs(float(step @ normal)) / float(np.linalg.norm(step))
    degrees = float(np.degrees(np.arccos(min(cosine, 1.0))))
    return degrees if degrees > MAX_TILT_DEGREES else 0.0


def _check_line(positions: Floats, start: Floats, step: Floats) -> None:
    off = np.linalg.norm(positions - (start + np.arange(len(positions))[:, None] * step), axis=1).max()
    if off > MAX_UNEVEN * np.linalg.norm(step):
        raise DataError(f"slices lie up to {off:.2f} mm beside one line; reformat the series at the console")


def align(found: Floats, reference: Floats, shape: Sequence[int]) -> tuple[Floats, float]:
    """Hold a converter's affine against the reference, whatever the order and direction of its axes.

    Args:
        found: the converter's affine, (4, 4).
        reference: the headers' affine, (4, 4).
        shape: voxels of the reference along its three axes.

    Returns:
        The affine for the converter's voxels that follows from the reference exactly, and by how many mm the
        converter's was off at the worst corner.

    Raises:
        DataError: the two differ by more than :data:`MAX_ERROR_MM`.
    """
    turn = np.linalg.inv(found) @ reference
    whole = np.rint(turn)
    exact = reference @ np.linalg.inv(whole) if abs(np.linalg.det(whole[:3, :3])) == 1 else found
    corners = np.array(np.meshgrid(*([0, n - 1] for n in shape), [1], indexing="ij")).reshape(4, -1)
    apart = float(np.linalg.norm(((found @ whole - reference) @ corners)[:3], axis=0).max())
    if not apart <= MAX_ERROR_MM:
        raise DataError(
            f"the converter puts voxels up to {apart:.3g} mm away from where the headers say; expected at most "
            f"{MAX_ERROR_MM} mm; report the scanner model and leave the series out"
        )
    return exact, apart
