# SPDX-License-Identifier: Apache-2.0
"""Seconds per round without work: what a deployment itself costs."""

from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["write_tiny_site"]


def write_tiny_site(
    folder: Path, *, patients: int = 8, seed: int = 0, shape: tuple[int, int, int] = (16, 16, 4)
) -> None:
    """Write a BIDS data set of noise with a bright cube as the lesion; every image has ``shape`` voxels of 1 mm."""
    rng = np.random.default_rng(seed)
    for number in range(1, patients + 1):
        name = f"sub-{number:02d}"
        image = rng.normal(100.0, 10.0, shape).astype(np.float32)
        mask = np.zeros(shape, np.uint8)
        mask[4:10, 4:10, 1:3] = 1
        image += 60.0 * mask
        for path, array in (
            (folder / name / "anat" / f"{name}_FLAIR.nii.gz", image),
            (folder / "derivatives" / "manual" / name / "anat" / f"{name}_label-lesion_mask.nii.gz", mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    description = '{"Name": "tiny", "BIDSVersion": "1.10.0"}\n'
    (folder / "dataset_description.json").write_text(description, encoding="utf-8")
