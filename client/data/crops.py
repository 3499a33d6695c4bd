# SPDX-License-Identifier: Apache-2.0
"""Draws training crops: slices of volumes (``model.dims = 2``) or boxes from them (3), always from one patient.

A share ``data.foreground`` of the crops shows a labelled voxel, so that small lesions are learned from; the rest
is uniform. Drawing and changing a crop depend on the passed generator alone, and on no other patient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...privacy.errors import DataError
from ...privacy.study import Study
from .augment import augment
from .dataset import SiteData
from .opening import AXES
from .preprocess import Prepared

__all__ = ["Crops"]

VOXELS_KEPT = 10_000
"""Labelled voxels remembered per scan for centring boxes: evenly spread ones of a larger lesion do as well."""

Foreground = NDArray[np.int64]
"""2D: indices of the slices that show a label. 3D: flat indices of labelled voxels."""


@dataclass(frozen=True, slots=True)
class _Geometry:
    dims: int
    axis: int
    patch: tuple[int, ...]


class Crops:
    """Training crops of some patients of a site.

    Example:
        >>> crops = Crops(site, site.training(), study)  # doctest: +SKIP
        >>> images, labels = crops.batch(8, np.random.default_rng(0))  # doctest: +SKIP
    """

    def __init__(self, data: SiteData, patients: Sequence[str], study: Study) -> None:
        """Draw from ``patients`` only.

        Raises:
            DataError: there is no patient to draw from.
        """
        if not patients:
            raise DataError(
                f"{data.name}: no training patients; expected at least one; lower evaluation.validation_fraction, "
                "change data.split_key, or let the site be held out"
            )
        self.data, self.patients, self.study = data, tuple(patients), study
        self._geometry = _Geometry(study.model.dims, AXES[study.data.slice_axis], study.data.patch)
        self._channels = len(study.data.modalities)
        self._foreground: dict[str, tuple[Foreground, ...]] = {}

    def of_patient(self, patient: str, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Crops over all scans of one patient, drawn independently (with replacement).

        Args:
            patient: its id.
            count: how many.
            rng: decides everything that is random.

        Returns:
            Images, float32 (count, C, *patch), and labels, int64 (count, *patch), or (count,) of patients as a whole,
            which is float32 for regression.
        """
        return self._stack([patient] * count, rng)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One crop each of ``size`` patients, drawn uniformly with replacement; shapes as :meth:`of_patient`."""
        return self._stack([self.patients[i] for i in rng.integers(len(self.patients), size=size)], rng)

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One crop of every patient, in random order; the last batch may be smaller."""
        order = [self.patients[i] for i in rng.permutation(len(self.patients))]
        for start in range(0, len(order), batch_size):
            yield self._stack(order[start : start + batch_size], rng)

    def _stack(self, patients: Sequence[str], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        patch = self._geometry.patch
        segmentation = self.study.task.kind == "segmentation"
        images = torch.empty((len(patients), self._channels, *patch))
        kind = torch.float32 if self.study.task.kind == "regression" else torch.int64
        labels = torch.empty((len(patients), *patch) if segmentation else (len(patients),), dtype=kind)
        for i, patient in enumerate(patients):
            image, label = self._crop(patient, rng)
            images[i] = image
            labels[i] = self.data.classes[patient] if label is None else label
        return images, labels

    def _crop(self, patient: str, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        scans = self.data.prepared(patient)
        which = int(rng.integers(len(scans)))
        scan, foreground = scans[which], self._labelled(patient, scans)[which]
        centred = bool(rng.random() < self.study.data.foreground) and foreground.size > 0
        cut = _slice if self._geometry.dims == 2 else _box
        image, mask = cut(scan, foreground if centred else None, self._geometry, rng)
        label = None if mask is None else mask.to(torch.int64)
        return augment(image, label, self.study.data.augment, rng, self.study.data.augmentation)

    def _labelled(self, patient: str, scans: Sequence[Prepared]) -> tuple[Foreground, ...]:
        if patient not in self._foreground:
            self._foreground[patient] = tuple(_find_foreground(scan, self._geometry) for scan in scans)
        return self._foreground[patient]


def _find_foreground(scan: Prepared, geometry: _Geometry) -> Foreground:
    if scan.mask is None:
        return np.empty(0, np.int64)
    mask = scan.mask.numpy()
    if geometry.dims == 2:
        others = tuple(axis for axis in range(3) if axis != geometry.axis)
        return np.flatnonzero(mask.any(axis=others))
    found = np.flatnonzero(mask)
    if found.size > VOXELS_KEPT:
        found = found[np.linspace(0, found.size - 1, VOXELS_KEPT).astype(np.int64)]
    return found


def _slice(
    scan: Prepared, foreground: Foreground | None, geometry: _Geometry, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """A slice, image (C, *patch) and mask (*patch); with ``foreground`` one that shows a label."""
    depth = scan.image.shape[1 + geometry.axis]
    index = int(rng.integers(depth) if foreground is None else rng.choice(foreground))
    image = scan.image.select(1 + geometry.axis, index)
    mask = None if scan.mask is None else scan.mask.select(geometry.axis, index)
    centre = None
    if foreground is not None and mask is not None and _larger(mask.shape, geometry.patch):
        centre = rng.choice(np.argwhere(mask.numpy()))
    return _cut(image, mask, _window(image.shape[1:], centre, geometry.patch, rng), geometry.patch)


def _box(
    scan: Prepared, foreground: Foreground | None, geometry: _Geometry, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """A box, image (C, *patch) and mask (*patch); with ``foreground`` one that shows a label."""
    shape = scan.image.shape[1:]
    centre = None if foreground is None else np.array(np.unravel_index(int(rng.choice(foreground)), tuple(shape)))
    return _cut(scan.image, scan.mask, _window(shape, centre, geometry.patch, rng), geometry.patch)


def _larger(shape: Sequence[int], patch: Sequence[int]) -> bool:
    return any(n > p for n, p in zip(shape, patch, strict=True))


def _window(
    shape: Sequence[int], centre: NDArray[np.int64] | None, patch: Sequence[int], rng: np.random.Generator
) -> list[slice]:
    """Where to cut: around ``centre``, or anywhere; the whole axis where the image is not larger than the patch."""
    window = []
    for axis, (n, p) in enumerate(zip(shape, patch, strict=True)):
        room = max(n - p, 0)
        if centre is None:
            start = int(rng.integers(room + 1)) if room else 0
        else:
            start = min(max(int(centre[axis]) - p // 2, 0), room)
        window.append(slice(start, start + min(n, p)))
    return window


def _cut(image: Tensor, mask: Tensor | None, window: list[slice], patch: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Cut the window out and pad with zeros, evenly on both sides, to the patch."""
    image = image[(slice(None), *window)]
    mask = None if mask is None else mask[tuple(window)]
    missing = [p - n for n, p in zip(image.shape[1:], patch, strict=True)]
    if any(missing):
        pads = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]  # torch wants the last axis first
        image = F.pad(image, pads)
        mask = None if mask is None else F.pad(mask, pads)
    return image, mask
