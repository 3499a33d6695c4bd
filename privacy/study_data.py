# SPDX-License-Identifier: Apache-2.0
"""``[data]``: what a hospital's data set must hold, and how a scan becomes an input, the same at every hospital.

Preprocessing and augmentation are part of the study, so they are in its hash, in every message and in the record of a
run, and no hospital can choose its own. Nothing here is learned from the patients of the study: each scan is prepared
from itself alone. The one exception in the literature, the standard scale of Nyúl's method, is given in the file
(``data.preprocessing.landmarks``), learned from public data or phantoms; FedNeuro computes none over hospitals.
"""

from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from ..models.spec import Section, contradiction

__all__ = ["LANDMARK_PERCENTILES", "AugmentationSection", "DataSection", "PreprocessingSection"]

LANDMARK_PERCENTILES: Final = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
"""Percentiles of a scan's foreground that Nyúl's method brings to the standard scale."""
MAX_MODALITIES: Final = 8


class PreprocessingSection(Section):
    """How a scan becomes an input, beyond ``data.spacing`` and ``data.normalise``.

    Order: turn to RAS+, find the foreground, correct the bias field, resample, normalise, crop.
    """

    image_interpolation: Literal["linear", "cubic", "nearest"] = Field(
        default="linear", description="data.spacing: interpolation of images. cubic is cut to the scan's own range."
    )
    label_interpolation: Literal["nearest", "linear"] = Field(
        default="nearest",
        description="data.spacing: interpolation of masks. linear: each label by itself, the largest wins.",
    )
    mask: Literal["none", "head", "brain", "supplied"] = Field(
        default="none",
        description="Foreground; the rest becomes 0. none: the voxels that are not 0, as they are. head: above Otsu's "
        "threshold, largest part, holes filled. brain: the same after an opening by mask_radius, which parts the brain "
        "from the scalp; simple, so look at the result. supplied: the file named by mask_name.",
    )
    mask_name: str = Field(
        default="label-brain_mask",
        pattern=r"^([a-z]+-[A-Za-z0-9]+_)*(mask|dseg)$",
        description='mask = "supplied": BIDS name of the brain mask below derivatives/; every scan needs one.',
    )
    mask_radius: float = Field(default=4.0, gt=0, le=20, description='mask = "brain": radius of the opening in mm.')
    bias_correction: Literal["none", "n4"] = Field(
        default="none",
        description="Slow change of brightness across the scan. n4: N4ITK (Tustison 2010), fitted in the foreground, "
        "or in the head where there is no mask.",
    )
    n4_shrink: int = Field(
        default=4, ge=1, le=16, description="n4: the field is fitted to one voxel in so many, along each axis."
    )
    n4_iterations: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(
        default=(50, 50, 50, 50), min_length=1, max_length=8, description="n4: most iterations at each level."
    )
    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
        default=(1.0, 99.0),
        min_length=2,
        max_length=2,
        description='data.normalise = "percentile": the two that become 0 and 1; of all voxels, or of the mask\'s.',
    )
    clip: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
        default=(),
        max_length=2,
        description='data.normalise = "zscore": percentiles of the foreground to which a scan is cut first, such as '
        "[0.5, 99.5]. Empty: not cut.",
    )
    window: tuple[Annotated[float, Field(ge=-10_000, le=100_000)], ...] = Field(
        default=(0.0, 80.0),
        min_length=2,
        max_length=2,
        description='data.normalise = "window": the grey values that become 0 and 1, in HU for CT. 0 to 80: brain.',
    )
    landmarks: tuple[Annotated[float, Field(ge=-100, le=100)], ...] = Field(
        default=(),
        max_length=MAX_MODALITIES * len(LANDMARK_PERCENTILES),
        description='data.normalise = "nyul": the standard scale, eleven rising numbers for each modality one after '
        "another, as fedneuro-sim landmarks prints them. From public data or phantoms, never from these patients.",
    )
    crop: Literal["none", "foreground"] = Field(
        default="none", description="foreground: the box around the foreground. A label outside of it is a fault."
    )
    crop_margin: int = Field(default=2, ge=0, le=64, description="crop: voxels that are kept around the foreground.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("percentiles", "clip", "window"):
            values = getattr(self, key)
            if values and (len(values) != 2 or values[0] >= values[1]):
                raise contradiction(key, f"{key} = {list(values)}", "give a smaller and a larger number")
        return self


class AugmentationSection(Section):
    """``data.augment = "custom"``: random changes of a crop, each from itself alone.

    ``flip``, ``affine``, ``elastic``, ``low_resolution``, ``bias``, ``gamma`` and ``noise`` are probabilities;
    the other keys say how strong. Voxels of exactly 0, the background and missing modalities, stay 0.
    """

    flip: float = Field(default=0.5, ge=0, le=1, description="Mirroring, for each axis by itself.")
    affine: float = Field(default=0.5, ge=0, le=1, description="Rotation, scaling and shift together.")
    rotation: float = Field(default=11.5, ge=0, le=180, description="affine: degrees at most, about every axis.")
    scaling: float = Field(default=0.1, ge=0, le=0.5, description="affine: larger or smaller by this share at most.")
    shift: float = Field(default=0.05, ge=0, le=0.5, description="affine: at most this share of the patch.")
    elastic: float = Field(default=0.0, ge=0, le=1, description="Smooth deformation.")
    elastic_voxels: float = Field(
        default=2.0, gt=0, le=20, description="elastic: largest displacement along an axis, in voxels."
    )
    low_resolution: float = Field(default=0.0, ge=0, le=1, description="Coarser voxels, brought back to the grid.")
    low_resolution_zoom: float = Field(default=0.5, ge=0.1, lt=1, description="low_resolution: coarsest, of the grid.")
    bias: float = Field(default=0.0, ge=0, le=1, description="Slow change of brightness across the crop.")
    bias_strength: float = Field(default=0.3, gt=0, le=2, description="bias: largest coefficient of the polynomial.")
    gamma: float = Field(default=0.3, ge=0, le=1, description="Other contrast: grey values to a power.")
    gamma_range: tuple[Annotated[float, Field(gt=0, le=10)], ...] = Field(
        default=(0.7, 1.5), min_length=2, max_length=2, description="gamma: smallest and largest power."
    )
    noise: float = Field(default=0.3, ge=0, le=1, description="Gaussian noise.")
    noise_std: float = Field(default=0.1, gt=0, le=10, description="noise: standard deviation at most.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gamma_range[0] >= self.gamma_range[1]:
            found = f"gamma_range = {list(self.gamma_range)}"
            raise contradiction("gamma_range", found, "give a smaller and a larger number")
        return self


class DataSection(Section):
    """What a hospital's data set must hold, and how a scan becomes an input."""

    modalities: tuple[Annotated[str, Field(pattern=r"^([a-z]+-[A-Za-z0-9]+_)*[A-Za-z0-9]+$")], ...] = Field(
        default=("FLAIR",),
        min_length=1,
        max_length=8,
        description='Input channels by BIDS suffix and entities, such as "FLAIR", "T1w", "ce-gadolinium_T1w".',
    )
    missing_modality: Literal["refuse", "exclude", "zero"] = Field(
        default="refuse",
        description="A patient who lacks a modality: refuse the data set, exclude the patient (counted and "
        "reported), or feed zeros in that channel.",
    )
    empty_masks: Literal["refuse", "keep"] = Field(
        default="refuse", description="A mask without foreground: a fault, or a patient without the disease."
    )
    spacing: tuple[Annotated[float, Field(gt=0, le=20)], ...] = Field(
        default=(), description="Resample to this voxel spacing in mm (three numbers). Empty: as acquired."
    )
    normalise: Literal["zscore", "percentile", "none", "nyul", "window"] = Field(
        default="zscore",
        description="Intensities per scan: zero mean and unit variance over the foreground; the 1st to 99th "
        "percentile mapped to 0–1; as stored; a standard scale (Nyúl 2000); or a window of grey values mapped to 0–1, "
        "for CT. See [data.preprocessing].",
    )
    patch: tuple[Annotated[int, Field(ge=8, le=1024)], ...] = Field(
        default=(128, 128),
        min_length=2,
        max_length=3,
        description="Size in voxels of the crops that are trained on: two numbers for slices, three for volumes. "
        "Smaller images are padded.",
    )
    slice_axis: Literal["sagittal", "coronal", "axial"] = Field(
        default="axial", description="model.dims = 2: the plane of the slices."
    )
    foreground: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="Share of crops that are centred on (2D: slices that show) a labelled voxel.",
    )
    augment: Literal["none", "light", "standard", "custom"] = Field(
        default="light",
        description="none; light: flips; standard: flips, small affine, gamma, noise; custom: as [data.augmentation] "
        "says. Never mixes patients.",
    )
    split_key: str = Field(
        default="fedneuro", min_length=1, max_length=128, description="Key of the hash that assigns patients to sides."
    )
    preprocessing: PreprocessingSection = Field(
        default_factory=PreprocessingSection, description="How a scan becomes an input: a table, [data.preprocessing]."
    )
    augmentation: AugmentationSection = Field(
        default_factory=AugmentationSection, description="Random changes of crops: a table, [data.augmentation]."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        table, given = self.preprocessing, len(self.preprocessing.landmarks)
        each = len(LANDMARK_PERCENTILES)
        wanted = each * len(self.modalities) if self.normalise == "nyul" else 0
        if given != wanted:
            raise contradiction(
                "data.preprocessing.landmarks",
                f'{given} numbers with data.normalise = "{self.normalise}"',
                f"give {each} for each of {len(self.modalities)} modalities: fedneuro-sim landmarks learns them from "
                "public data"
                if wanted
                else 'they belong to "nyul"',
            )
        scales = [table.landmarks[start : start + each] for start in range(0, given, each)]
        if any(low >= high for scale in scales for low, high in pairwise(scale)):
            raise contradiction("data.preprocessing.landmarks", "landmarks that do not rise", "rising numbers")
        if table.clip and self.normalise != "zscore":
            found = f'data.preprocessing.clip with data.normalise = "{self.normalise}"'
            raise contradiction("data.preprocessing.clip", found, 'clip belongs to "zscore"')
        if self.normalise == "window" and table.crop != "none" and table.mask == "none":
            found = 'data.preprocessing.crop with data.normalise = "window" and no mask'
            raise contradiction("data.preprocessing.crop", found, "0 HU is not background: choose a mask")
        if self.augment != "custom" and self.augmentation != AugmentationSection():
            found = f'[data.augmentation] with data.augment = "{self.augment}"'
            raise contradiction("data.augment", found, 'the table belongs to "custom"')
        return self
