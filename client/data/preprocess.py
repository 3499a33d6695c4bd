# SPDX-License-Identifier: Apache-2.0
"""Turns the files of one scan into tensors, as the study's ``[data]`` and ``[data.preprocessing]`` say.

Steps: 1 read, check, turn to RAS+ (:mod:`.nifti`, :mod:`.checks`); 2 find the foreground (:mod:`.foreground`);
3 correct the bias field (:mod:`.bias`); 4 resample (:mod:`.resample`); 5 normalise (:mod:`.intensity`); 6 crop. A
modality that is missing (``data.missing_modality = "zero"``) is a channel of zeros in every step, never normalised.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from numpy.typing import NDArray

from ...privacy.errors import DataError
from ...privacy.study import Study
from ...privacy.study_data import DataSection
from . import checks
from .bias import correct_bias
from .bids import ScanFiles
from .foreground import Bits, box_around, brain_of, head_of
from .intensity import normalised
from .nifti import Volume, digest_of, read_volume
from .resample import resample_image, resample_mask

__all__ = ["Prepared", "content_key", "normalised", "prepare"]

FORMAT = 2
"""Version of what :func:`prepare` makes. Raise it with every change of its result, and old entries are passed over."""
MAX_VOXELS = 10**9
"""A resampled scan beyond this is a wrong voxel size in the header, not a scan."""
UNIT = (1.0, 1.0, 1.0)
"""Voxel size that stands in where the header has no unit and only proportions matter."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scan ready for crops and inference, as compact as it is kept in memory and on disk."""

    image: torch.Tensor  # float32 (C, X, Y, Z)
    mask: torch.Tensor | None  # uint8 (X, Y, Z); None for classification
    spacing: tuple[float, float, float] | None  # mm
    oriented: bool
    mapped: bool = False  # the voxels lie in a file of the cache, and in the system's page cache
    corner: tuple[int, int, int] = (0, 0, 0)  # first voxel that a crop kept; not kept in the cache

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return self.image.nbytes + (self.mask.nbytes if self.mask is not None else 0)


def content_key(files: ScanFiles, study: Study) -> str:
    """SHA-256 over the files' bytes and every setting and library that the result of :func:`prepare` depends on.

    Raises:
        DataError: a file cannot be read.
    """
    data, task = study.data, study.task
    return hashlib.sha256(
        json.dumps(
            {
                "format": FORMAT,
                "libraries": _libraries(),
                "images": [digest_of(path) if path else None for path in files.images],
                "mask": digest_of(files.mask) if files.mask else None,
                "brain": digest_of(files.brain) if files.brain else None,
                "labels": len(task.labels) if task.kind == "segmentation" else None,
                "empty_masks": data.empty_masks,
                "spacing": data.spacing,
                "normalise": data.normalise,
                "preprocessing": data.preprocessing.model_dump(mode="json"),
            },
            sort_keys=True,
        ).encode()
    ).hexdigest()


@cache
def _libraries() -> dict[str, str]:
    found = {}
    for name in ("monai", "nibabel", "numpy", "scipy", "simpleitk", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # SimpleITK, where no study needs it
            found[name] = ""
    return found


def prepare(files: ScanFiles, study: Study) -> Prepared:
    """Read, check and preprocess one scan.

    Args:
        files: with at least one image, and a mask for segmentation.
        study: decides labels and preprocessing.

    Raises:
        DataError: the first fault that the files show.
        EnvironmentProblem: the study corrects bias fields, and SimpleITK is not installed.
    """
    volumes = [read_volume(path) if path else None for path in files.images]
    first = next(volume for volume in volumes if volume is not None)
    for volume in volumes:
        if volume is not None:
            checks.check_image(volume)
            checks.check_same_grid(volume, first)
    mask = None
    if files.mask is not None:
        drawn = read_volume(files.mask)
        checks.check_same_grid(drawn, first)
        mask = checks.check_mask(drawn, study.task.labels, empty_allowed=study.data.empty_masks == "keep")
    work = _Work(study.data, first, [volume is not None for volume in volumes])
    image = np.stack([np.zeros_like(first.data) if volume is None else volume.data for volume in volumes])
    return work.run(image, mask, _foreground(files, first, study.data))


def _foreground(files: ScanFiles, first: Volume, data: DataSection) -> Bits | None:
    """The foreground on the scan's own grid; None: the voxels that are not 0."""
    table = data.preprocessing
    if table.mask == "none":
        return None
    if table.mask == "head":
        return head_of(first.data)
    if table.mask == "brain":
        return brain_of(first.data, _known_spacing(first, "to find the brain"), table.mask_radius)
    if files.brain is None:
        raise DataError(
            f"{files.name}: no mask {files.name}_{table.mask_name}.nii.gz below derivatives/*/{files.patient}; the "
            "study takes the foreground from it; add it, or take the patient out of the data set"
        )
    supplied = read_volume(files.brain)
    checks.check_image(supplied)
    checks.check_same_grid(supplied, first)
    inside = np.asarray(supplied.data > 0.5)
    if not inside.any():
        raise DataError(f"{supplied.name}: empty mask; expected the brain; draw it")
    return inside


def _known_spacing(volume: Volume, what_for: str) -> tuple[float, float, float]:
    if volume.spacing is None:
        raise DataError(
            f"{volume.name}: voxel size unknown (the header has no unit); expected mm, {what_for}; correct the header"
        )
    return volume.spacing


@dataclass(frozen=True, slots=True)
class _Work:
    """Steps 3 to 6 of one scan."""

    data: DataSection
    first: Volume
    present: Sequence[bool]  # by channel

    def run(self, image: NDArray[np.float32], mask: NDArray[np.uint8] | None, inside: Bits | None) -> Prepared:
        data, spacing = self.data, self.first.spacing
        if data.preprocessing.bias_correction == "n4":
            image = self._unbiased(image, inside)
        if data.spacing:
            image, mask, inside = self._resampled(image, mask, inside)
            x, y, z = data.spacing
            spacing = (x, y, z)
        box = None
        if data.preprocessing.crop == "foreground":
            body = inside if inside is not None else (image != 0).any(axis=0)
            box = box_around(body, data.preprocessing.crop_margin)
        if data.normalise != "none" or inside is not None:
            image = np.stack([self._normalised(channel, inside, c) for c, channel in enumerate(image)])
        if box is not None:
            self._check_kept(mask, box)
            image, mask = image[:, *box], None if mask is None else mask[box]
        label = None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))
        corner = (box[0].start, box[1].start, box[2].start) if box else (0, 0, 0)
        tensor = torch.from_numpy(np.ascontiguousarray(image))
        return Prepared(tensor, label, spacing, self.first.oriented, corner=corner)

    def _unbiased(self, image: NDArray[np.float32], inside: Bits | None) -> NDArray[np.float32]:
        table = self.data.preprocessing
        return np.stack(
            [
                correct_bias(
                    channel,
                    head_of(channel) if inside is None else inside,
                    self.first.spacing or UNIT,
                    shrink=table.n4_shrink,
                    iterations=table.n4_iterations,
                )
                if there
                else channel
                for channel, there in zip(image, self.present, strict=True)
            ]
        )

    def _resampled(
        self, image: NDArray[np.float32], mask: NDArray[np.uint8] | None, inside: Bits | None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None, Bits | None]:
        data, first = self.data, self.first
        if first.spacing is None:
            raise DataError(
                f"{first.name}: voxel size unknown (the header has no unit); expected mm, to resample to "
                f"{list(data.spacing)}; correct the header, or run with --set 'data.spacing=[]'"
            )
        was, table = first.spacing, data.preprocessing
        voxels = np.prod([n * old / new for n, old, new in zip(first.data.shape, was, data.spacing, strict=True)])
        if voxels > MAX_VOXELS:
            raise DataError(
                f"{first.name}: voxels of {was[0]:g}×{was[1]:g}×{was[2]:g} mm would become {voxels:.0e} of "
                f"{list(data.spacing)} mm; expected at most {MAX_VOXELS:.0e}; correct the header's voxel size or unit"
            )
        image = resample_image(image, was, data.spacing, table.image_interpolation)
        if mask is not None:
            mask = resample_mask(mask, was, data.spacing, table.label_interpolation)
        if inside is not None:
            inside = resample_mask(inside.astype(np.uint8), was, data.spacing, "nearest") > 0
        return image, mask, inside

    def _normalised(self, channel: NDArray[np.float32], inside: Bits | None, number: int) -> NDArray[np.float32]:
        if not self.present[number]:
            return channel  # zeros say that nothing was measured; a window would make grey of them
        data = self.data
        return normalised(channel, data.normalise, inside=inside, table=data.preprocessing, number=number)

    def _check_kept(self, mask: NDArray[np.uint8] | None, box: tuple[slice, slice, slice]) -> None:
        if mask is None:
            return
        lost = int(np.count_nonzero(mask)) - int(np.count_nonzero(mask[box]))
        if lost:
            raise DataError(
                f"{self.first.name}: {lost} labelled voxels lie outside of the foreground that the study crops to; "
                "expected all inside; correct the mask, or agree on a larger data.preprocessing.crop_margin"
            )
