# SPDX-License-Identifier: Apache-2.0
"""What is learned: the ``[task]`` and ``[model]`` sections of a study.

They live in this room because networks, losses and metrics are built from them alone; the whole study
(:mod:`fedneuro.privacy.study`) composes them with the sections that the other rooms read.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = ["ModelSection", "Section", "TaskSection", "Trainable", "contradiction"]

Trainable = Annotated[
    Literal["all", "norm+bias", "norm+bias+head", "head", "decoder"],
    Field(
        description="Parameters that are trained; the others stay as they came. norm+bias: normalisations, slopes of "
        "activations and biases; head: the last layer; decoder: the upward path of a unet, with its head."
    ),
]
Label = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9 _-]{0,31}$")]


class Section(BaseModel):
    """Base of every section: frozen, strict types, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def contradiction(key: str, found: str, allowed: str) -> PydanticCustomError:
    """An error about ``key`` (within the section, or ``section.key``) that only shows beside other keys."""
    return PydanticCustomError("contradiction", "{found}; {allowed}", {"key": key, "found": found, "allowed": allowed})


class TaskSection(Section):
    """What the model predicts."""

    kind: Literal["segmentation", "classification"] = Field(
        default="segmentation", description="What is predicted: a label per voxel, or a class per patient."
    )
    labels: tuple[Label, ...] = Field(
        default=("lesion",),
        min_length=1,
        max_length=32,
        description="Segmentation: names of the mask values 1, 2, … (0 is background). "
        "Classification: names of the classes, as they stand in the target column.",
    )
    mask: str = Field(
        default="label-lesion_mask",
        pattern=r"^([a-z]+-[A-Za-z0-9]+_)*(mask|dseg)$",
        description="Segmentation: BIDS name of the mask below derivatives/, entities and suffix.",
    )
    target: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_]{0,64}$",
        description="Classification: column of participants.tsv that holds the class.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise contradiction("labels", f"labels repeat a name: {list(self.labels)}", "name each label once")
        if self.kind == "classification" and not self.target:
            raise contradiction(
                "target", 'target is empty while kind = "classification"', "name the column of participants.tsv"
            )
        if self.kind == "classification" and len(self.labels) < 2:
            raise contradiction("labels", "one class only", "classification needs at least two classes")
        return self

    @property
    def channels(self) -> int:
        """Number of output channels of the network: background counts for segmentation."""
        return len(self.labels) + (1 if self.kind == "segmentation" else 0)


class ModelSection(Section):
    """Which network, and how large."""

    name: Literal["unet", "resnet"] = Field(
        default="unet", description="unet for segmentation, resnet for classification."
    )
    dims: Literal[2, 3] = Field(default=2, description="2: slices, 3: volumes.")
    channels: tuple[Annotated[int, Field(ge=2, le=1024)], ...] = Field(
        default=(16, 32, 64, 128),
        min_length=2,
        max_length=7,
        description="Feature maps per level, finest first. unet: one down-sampling by 2 between levels; "
        "resnet: exactly four stages.",
    )
    residual_units: int = Field(
        default=2, ge=0, le=6, description="unet: residual units per level; 0 gives plain convolutions."
    )
    depth: Literal[10, 18, 34] = Field(default=10, description="resnet: number of layers.")
    norm: Literal["instance", "group"] = Field(
        default="instance",
        description="Normalisation. Both keep patients apart, as differential privacy needs; "
        "BatchNorm does not, and is not on offer.",
    )
    dropout: float = Field(default=0.0, ge=0.0, le=0.8, description="Drop-out probability.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "resnet" and len(self.channels) != 4:
            raise contradiction(
                "channels", f"{len(self.channels)} stages for resnet", "resnet takes four, such as [16, 32, 64, 128]"
            )
        if self.norm == "group" and any(c % 4 for c in self.channels):
            raise contradiction("channels", f'{list(self.channels)} with norm = "group"', "use multiples of 4")
        return self

    @property
    def stride(self) -> int:
        """Total down-sampling factor; every patch side must be a multiple of it (unet)."""
        return int(2 ** (len(self.channels) - 1)) if self.name == "unet" else 1
