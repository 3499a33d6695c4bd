# SPDX-License-Identifier: Apache-2.0
"""Turns the files of one scan into tensors: read, check, resample where asked, normalise intensities.

Read and turned to RAS+ by nibabel, then a chain of MONAI dictionary transforms. The intensity statistics are
computed by numpy in 64 bits, on one thread: a sum in torch depends on the number of threads, and the same
scan must give the same bits in every engine.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...privacy.errors import DataError
from ...privacy.study import DataSection, Study
from . import checks
from .bids import ScanFiles
from .nifti import Volume, digest_of, read_volume

if TYPE_CHECKING:
    from monai.transforms.compose import Compose

__all__ = ["Prepared", "content_key", "prepare"]

FORMAT = 1
"""Version of what :func:`prepare` makes. Raise it with every change of its result, and old entries are passed over."""
MAX_VOXELS = 10**9
"""A resampled scan beyond this is a wrong voxel size in the header, not a scan."""
PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scan ready for crops and inference, as compact as it is kept in memory and on disk."""

    image: torch.Tensor  # float32 (C, X, Y, Z)
    mask: torch.Tensor | None  # uint8 (X, Y, Z); None for classification
    spacing: tuple[float, float, float] | None  # mm
    oriented: bool

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
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
                "labels": len(task.labels) if task.kind == "segmentation" else None,
                "empty_masks": data.empty_masks,
                "spacing": data.spacing,
                "normalise": data.normalise,
            },
            sort_keys=True,
        ).encode()
    ).hexdigest()


@cache
def _libraries() -> dict[str, str]:
    return {name: version(name) for name in ("monai", "nibabel", "numpy", "torch")}


def prepare(files: ScanFiles, study: Study) -> Prepared:
    """Read, check and preprocess one scan.

    Args:
        files: with at least one image, and a mask for segmentation.
        study: decides labels, resampling and normalisation.

    Raises:
        DataError: the first fault that the files show.
    """
    volumes = [read_volume(path) if path else None for path in files.images]
    first = next(volume for volume in volumes if volume is not None)
    for volume in volumes:
        if volume is not None:
            checks.check_image(volume)
            checks.check_same_grid(volume, first)
    # A missing modality (data.missing_modality = "zero") is a channel of zeros, before and after normalising.
    image = np.stack([np.zeros_like(first.data) if volume is None else volume.data for volume in volumes])
    mask = None
    if files.mask is not None:
        drawn = read_volume(files.mask)
        checks.check_same_grid(drawn, first)
        mask = checks.check_mask(drawn, study.task.labels, empty_allowed=study.data.empty_masks == "keep")
    return _transform(image, mask, first, study.data)


def _transform(
    image: NDArray[np.float32], mask: NDArray[np.uint8] | None, first: Volume, data: DataSection
) -> Prepared:
    from monai.data.meta_tensor import MetaTensor

    spacing = first.spacing
    sample: dict[str, Any] = {"image": image}
    if mask is not None:
        sample["mask"] = mask[None]
    if data.spacing:
        if spacing is None:
            raise DataError(
                f"{first.name}: voxel size unknown (the header has no unit); expected mm, to resample to "
                f"{list(data.spacing)}; correct the header, or run with --set 'data.spacing=[]'"
            )
        voxels = np.prod([n * was / new for n, was, new in zip(first.data.shape, spacing, data.spacing, strict=True)])
        if voxels > MAX_VOXELS:
            raise DataError(
                f"{first.name}: voxels of {spacing[0]:g}×{spacing[1]:g}×{spacing[2]:g} mm would become {voxels:.0e} of "
                f"{list(data.spacing)} mm; expected at most {MAX_VOXELS:.0e}; correct the header's voxel size or unit"
            )
        # World axes of the affine are irrelevant here: a diagonal one of the voxel sizes resamples along RAS+.
        affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
        sample = {key: MetaTensor(torch.as_tensor(value), affine=affine) for key, value in sample.items()}
        x, y, z = data.spacing
        spacing = (x, y, z)
    result: Any = _pipeline(data.spacing, data.normalise, mask is not None)(sample)
    tensors = {key: torch.as_tensor(np.ascontiguousarray(np.asarray(value))) for key, value in result.items()}
    label = tensors["mask"][0].to(torch.uint8).contiguous() if mask is not None else None
    return Prepared(tensors["image"].to(torch.float32), label, spacing, first.oriented)


@lru_cache(maxsize=8)
def _pipeline(spacing: tuple[float, ...], normalise: str, has_mask: bool) -> "Compose":
    from monai.transforms.compose import Compose
    from monai.transforms.spatial.dictionary import Spacingd
    from monai.transforms.transform import MapTransform

    class Normalised(MapTransform):
        """Intensities of each channel by :func:`normalised`, as a MONAI dictionary transform."""

        def __call__(self, sample: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
            result = dict(sample)
            for key in self.key_iterator(result):
                result[key] = np.stack([normalised(np.asarray(channel), normalise) for channel in sample[key]])
            return result

    keys = ["image", "mask"] if has_mask else ["image"]
    modes = ["bilinear", "nearest"][: len(keys)]
    steps: list[MapTransform] = [Spacingd(keys, pixdim=spacing, mode=modes, padding_mode="border")] if spacing else []
    return Compose([*steps, Normalised(["image"])])


def normalised(channel: NDArray[np.float32], how: str) -> NDArray[np.float32]:
    """One channel of one scan, normalised.

    Args:
        channel: finite values of any range, shape (X, Y, Z).
        how: ``zscore``: zero mean and unit variance over the voxels that are not 0, which stay 0 (background);
            ``percentile``: the 1st to 99th percentile mapped to 0–1, values beyond them cut off;
            ``none``: as stored.

    Returns:
        Same shape. A constant image gives zeros, but for ``none``.
    """
    if how == "none":
        return channel
    values = channel.astype(np.float64)
    if how == "zscore":
        inside = values != 0
        body = values[inside]
        spread = float(body.std()) if body.size else 0.0
        result = np.zeros_like(values)
        if spread > 0:
            result[inside] = (body - body.mean()) / spread
    else:
        low, high = np.percentile(values, PERCENTILES)
        if high <= low:  # nearly all voxels are equal
            low, high = values.min(), values.max()
        result = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    return result.astype(np.float32)
