# SPDX-License-Identifier: Apache-2.0
"""What is learned: the ``[task]`` and ``[model]`` sections of a study.

They live in this room because networks, losses and metrics are built from them alone; the whole study
(:mod:`fedneuro.privacy.study`) composes them with the sections that the other rooms read.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

__all__ = ["OUTCOMES", "SUITED_LOSSES", "ModelSection", "Section", "TaskSection", "Trainable", "contradiction"]

OUTCOMES: Final = ("regression", "survival")
"""Kinds of task that predict an outcome of a patient: a number, or the time to an event."""
SUITED_LOSSES: Final[Mapping[str, tuple[str, ...]]] = {
    "segmentation": ("dice_ce", "dice", "cross_entropy", "focal"),
    "classification": ("cross_entropy", "focal"),
    "regression": ("mse", "l1", "huber"),
    "survival": ("hazard",),
}
"""Losses by kind of task; :mod:`.losses` has them."""

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

    kind: Literal["segmentation", "classification", "regression", "survival"] = Field(
        default="segmentation",
        description="What is predicted: a label per voxel; or per patient a class, a number, or the time to an event.",
    )
    labels: tuple[Label, ...] = Field(
        default=("lesion",),
        min_length=1,
        max_length=32,
        description="Segmentation: names of the mask values 1, 2, … (0 is background). "
        "Classification: names of the classes, as they stand in the target column. Outcomes have none.",
    )
    mask: str = Field(
        default="label-lesion_mask",
        pattern=r"^([a-z]+-[A-Za-z0-9]+_)*(mask|dseg)$",
        description="Segmentation: BIDS name of the mask below derivatives/, entities and suffix.",
    )
    target: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_]{0,64}$",
        description="Column of participants.tsv that holds the class, the number, or the time until the event or the "
        "end of observation.",
    )
    event: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_]{0,64}$",
        description="Survival: column of participants.tsv that is 1 where the event was seen at that time, 0 where "
        "observation ended without it.",
    )
    time_cuts: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = Field(
        default=(),
        max_length=64,
        description="Survival: rising times at which intervals end, the first of which begins at 0. The model gives "
        "the hazard of each. Public: fixed here, not taken from patients.",
    )
    centre: float = Field(
        default=0.0,
        ge=-1e9,
        le=1e9,
        description="Regression: a usual value, from the literature; the model learns (value - centre) / scale.",
    )
    scale: float = Field(
        default=1.0, gt=0, le=1e9, description="Regression: a usual spread, as centre; errors are told in the unit."
    )
    unit: str = Field(
        default="",
        pattern=r"^[A-Za-z][A-Za-z0-9 /%_-]{0,15}$|^$",
        description="Regression and survival: unit of the target, such as years, for reports.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise contradiction("labels", f"labels repeat a name: {list(self.labels)}", "name each label once")
        if self.kind != "segmentation" and not self.target:
            raise contradiction(
                "target", f'target is empty while kind = "{self.kind}"', "name the column of participants.tsv"
            )
        if self.kind == "classification" and len(self.labels) < 2:
            raise contradiction("labels", "one class only", "classification needs at least two classes")
        self._check_outcome()
        return self

    def _check_outcome(self) -> None:
        if self.kind in OUTCOMES and self.labels != ("lesion",):
            raise contradiction("labels", f'labels with kind = "{self.kind}"', "leave them out: an outcome has none")
        for key, owners in _OWNERS.items():
            if self.kind not in owners and getattr(self, key) != type(self).model_fields[key].default:
                raise contradiction(key, f'{key} with kind = "{self.kind}"', f"{key} belongs to {' and '.join(owners)}")
        if self.kind != "survival":
            return
        if not self.event:
            raise contradiction("event", 'event is empty while kind = "survival"', "name its column")
        if self.event == self.target:
            raise contradiction("event", f'"{self.event}" is the target, too', "time and event are two columns")
        if not self.time_cuts or list(self.time_cuts) != sorted(set(self.time_cuts)):
            found = f"time_cuts = {list(self.time_cuts)}"
            raise contradiction("time_cuts", found, "give rising times, such as [6.0, 12.0, 24.0]")

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that came with outcomes stand in the canonical form where they are used alone: older hashes hold."""
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {k: v for k, v in values.items() if k not in _OWNERS or getattr(self, k) != fields[k].default}

    @property
    def channels(self) -> int:
        """Number of output channels of the network: background counts for segmentation."""
        if self.kind in OUTCOMES:
            return len(self.time_cuts) or 1
        return len(self.labels) + (1 if self.kind == "segmentation" else 0)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what is predicted: the labels, the classes, or the outcome's column."""
        return (self.target,) if self.kind in OUTCOMES else self.labels


_OWNERS: Final[Mapping[str, tuple[str, ...]]] = {
    "event": ("survival",),
    "time_cuts": ("survival",),
    "centre": ("regression",),
    "scale": ("regression",),
    "unit": OUTCOMES,
}
"""Keys that came with outcomes, and the kinds that read them."""


class ModelSection(Section):
    """Which network, and how large."""

    name: Literal["unet", "resnet"] = Field(
        default="unet", description="unet for segmentation, resnet for classification and outcomes."
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
