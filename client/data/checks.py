# SPDX-License-Identifier: Apache-2.0
"""Judges what a hospital's files hold, before any training: every fault is one line that says what to do.

A line names the site, the patient, the file, what was found, what was expected and the remedy. All faults of
a data set are collected, so that a hospital repairs it in one go. The lines stay at the hospital.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...privacy.errors import DataError
from .bids import ScanFiles
from .nifti import Volume

__all__ = [
    "Faults",
    "check_can_train",
    "check_has_mask",
    "check_image",
    "check_mask",
    "check_same_grid",
    "check_slices",
    "check_target",
    "class_of",
    "missing_line",
    "missing_modalities",
]

MAX_LINES = 10
"""Faults that are told at once; the rest are counted."""
GRID_TOLERANCE = 0.1
"""Two grids are the same if none of their corners lies further apart than this share of the smallest voxel."""
LABEL_TOLERANCE = 1e-3
"""Masks that were stored as float hold label values to within this."""


class Faults:
    """Collects the faults of one site and raises them as one error."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.lines: list[str] = []

    def add(self, error: DataError, patient: str = "") -> None:
        """Keep a fault, of one patient or of the whole data set."""
        text = str(error)
        named = text.startswith(f"{patient}:")
        self.lines.append(": ".join(part for part in (self.site, "" if named else patient, text) if part))

    def raise_if_any(self) -> None:
        """Raise one DataError with a line per fault, at most :data:`MAX_LINES`, and the number of the others."""
        if self.lines:
            more = len(self.lines) - MAX_LINES
            raise DataError("\n".join(self.lines[:MAX_LINES] + ([f"… and {more} more"] if more > 0 else [])))


def check_has_mask(scan: ScanFiles, mask: str) -> None:
    """The scan has its mask.

    Raises:
        DataError: with the name that the file must have.
    """
    if scan.mask is None:
        raise DataError(
            f"{scan.name}: no mask {scan.name}_{mask}.nii.gz below derivatives/*/{scan.patient}; expected one per "
            "scan; add it, name another mask with task.mask, or take the patient out of the data set"
        )


def missing_modalities(scans: Sequence[ScanFiles], modalities: Sequence[str]) -> list[str]:
    """Modalities that at least one of the scans lacks, in the order of the study; all where there is no scan."""
    return [name for i, name in enumerate(modalities) if not scans or any(scan.images[i] is None for scan in scans)]


def missing_line(name: str, lacking: Sequence[str]) -> str:
    """The fault of a missing modality."""
    return (
        f"{name}: no {' and no '.join(lacking)} image in anat; expected every modality of the study; add it, or "
        'run with --set data.missing_modality="exclude" (leave such patients out) or "zero" (feed zeros)'
    )


def check_image(image: Volume) -> None:
    """Every voxel is a finite number.

    Raises:
        DataError: with the count of those that are not.
    """
    bad = image.data.size - int(np.isfinite(image.data).sum())
    if bad:
        raise DataError(
            f"{image.name}: {bad} of {image.data.size} voxels are NaN or infinite; expected finite numbers; "
            "export the image again, or set those voxels to 0"
        )


def check_same_grid(image: Volume, first: Volume) -> None:
    """``image`` has the shape and lies at the place of ``first``.

    Raises:
        DataError: naming both files and the difference.
    """
    remedy = f"resample it onto {first.name}"
    if image.data.shape != first.data.shape:
        shapes = ["×".join(map(str, v.data.shape)) for v in (image, first)]
        raise DataError(f"{image.name}: shape {shapes[0]}; expected {shapes[1]}, as {first.name}; {remedy}")
    ends = np.array(np.meshgrid(*([0, n - 1] for n in first.data.shape), [1], indexing="ij")).reshape(4, -1)
    apart = float(np.linalg.norm(((image.affine - first.affine) @ ends)[:3], axis=0).max())
    voxel = float(np.linalg.norm(first.affine[:3, :3], axis=0).min())
    if not apart <= GRID_TOLERANCE * voxel:  # also refuses NaN
        raise DataError(
            f"{image.name}: its affine puts voxels up to {apart:.3g} units away from those of {first.name}; "
            f"expected the same place within {GRID_TOLERANCE} voxel; {remedy}"
        )


def check_mask(mask: Volume, labels: Sequence[str], *, empty_allowed: bool) -> NDArray[np.uint8]:
    """The mask's label values.

    Args:
        mask: shape (X, Y, Z).
        labels: names of the values 1, 2, …
        empty_allowed: whether a mask without foreground is a patient without the disease.

    Returns:
        Values 0 to ``len(labels)``, shape (X, Y, Z).

    Raises:
        DataError: another value, or an empty mask that is not allowed.
    """
    check_image(mask)
    rounded = np.rint(mask.data)
    odd = (np.abs(mask.data - rounded) > LABEL_TOLERANCE) | (rounded < 0) | (rounded > len(labels))
    if odd.any():
        wrong = np.unique(mask.data[odd])
        shown = ", ".join(f"{v:g}" for v in wrong[:5]) + (", …" if wrong.size > 5 else "")
        meaning = ", ".join(["0 background", *(f"{i} {name}" for i, name in enumerate(labels, 1))])
        raise DataError(
            f"{mask.name}: mask holds {shown}; expected only {meaning}; rewrite the mask, or list its labels "
            "in task.labels"
        )
    if not rounded.any() and not empty_allowed:
        raise DataError(
            f"{mask.name}: empty mask; expected at least one labelled voxel; draw it, or, if such patients have no "
            'disease, run with --set data.empty_masks="keep"'
        )
    return rounded.astype(np.uint8)


def check_slices(name: str, shape: Sequence[int], axis: int) -> None:
    """Slices across ``axis`` (0 sagittal, 1 coronal, 2 axial) are pictures, not lines.

    Raises:
        DataError: with the axis that fits.
    """
    sides = [n for i, n in enumerate(shape) if i != axis]
    if min(sides) == 1:
        fitting = ("sagittal", "coronal", "axial")[int(np.argmin(shape))]
        raise DataError(
            f"{name}: slices of {sides[0]}×{sides[1]} voxels; expected images; run with "
            f'--set data.slice_axis="{fitting}"'
        )


def check_target(table: Mapping[str, Mapping[str, str]] | None, target: str) -> Mapping[str, Mapping[str, str]]:
    """The table of participants, which must be there and have the column of the class.

    Raises:
        DataError: no table, or no such column.
    """
    if table is None:
        raise DataError(f"no participants.tsv; expected the class of each patient in its column {target}; add the file")
    columns = list(next(iter(table.values()), {}))
    if target not in columns:
        raise DataError(
            f"participants.tsv: no column {target} (it has {', '.join(columns[:6]) or 'none'}); expected the class "
            "there; add it, or name another with task.target"
        )
    return table


def class_of(table: Mapping[str, Mapping[str, str]], patient: str, target: str, labels: Sequence[str]) -> int:
    """Class of a patient, as its place in ``labels``.

    Raises:
        DataError: no row, or a value that is no class.
    """
    where = f"participants.tsv: {patient}"
    row = table.get(patient)
    if row is None:
        raise DataError(f"{where} has no row; expected one with the class in column {target}; add it")
    if row[target] not in labels:
        raise DataError(
            f"{where} has {target} = {row[target] or 'nothing'!r}; expected one of {', '.join(labels)}; "
            "correct it, or list it in task.labels"
        )
    return list(labels).index(row[target])


def check_can_train(site: str, patients: int, training: int) -> None:
    """At least one patient trains.

    Raises:
        DataError: with the settings that decide it.
    """
    if not training:
        raise DataError(
            f"{site}: no training patients: all {patients} are on the validation side; expected at least one; "
            "lower evaluation.validation_fraction, change data.split_key, or list the site in evaluation.heldout"
        )
