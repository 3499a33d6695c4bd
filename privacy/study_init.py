# SPDX-License-Identifier: Apache-2.0
"""``[training.init]``: what the first round starts from, and what it may have seen.

A start that is public costs no privacy: no patient of the study has a part in it. It goes out from the
coordinator as the model of round 0, so hospitals need nothing new, and it is judged everywhere before anyone
trains: the row that private training must beat to be worth its ε.

The study hash covers the recipe of phantoms, or the digest of a checkpoint. Where the checkpoint lies is the
coordinator's own business: ``path`` is no part of the canonical form, and never travels.
"""

from typing import Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..models.spec import Section, contradiction

__all__ = ["PHANTOM_MODALITIES", "InitSection", "LesionKind"]

LesionKind = Literal["blob", "mass", "multifocal", "wedge"]

PHANTOM_MODALITIES: Final = ("FLAIR", "T1w", "T2w")
"""BIDS suffixes of the scans that phantoms can be seen in."""


class InitSection(Section):
    """What the first round starts from. Nothing here may depend on the patients of the study."""

    source: Literal["", "phantoms", "checkpoint"] = Field(
        default="",
        alias="from",
        description="Empty: an untrained network, seeded by study.seed. phantoms: pre-trained on synthetic heads with "
        "lesions, by the keys below. checkpoint: the file with digest sha256, such as another study's model.",
    )
    steps: int = Field(default=600, ge=1, le=1_000_000, description="phantoms: optimiser steps.")
    batch_size: int = Field(default=16, ge=1, le=1024, description="phantoms: crops per step.")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="phantoms: Adam's step size; cosine to zero.")
    patients: int = Field(default=48, ge=1, le=2000, description="phantoms: heads, each with three sets of lesions.")
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        description="phantoms: seed of heads, lesions, crops and contrasts; study.seed draws the first weights. "
        "Heads differ from those of every phantom hospital.",
    )
    contrast: Literal["usual", "wide", "any"] = Field(
        default="wide",
        description="phantoms: how far the grey levels of tissues vary. usual: as scanners show the modality; wide: "
        "the same order, far wider; any: every tissue anywhere, lesions brighter or darker.",
    )
    lesions: tuple[LesionKind, ...] = Field(
        default=("blob", "mass", "multifocal", "wedge"),
        min_length=1,
        max_length=16,
        description="phantoms: kinds of lesions, in turn; a kind that is named twice is twice as frequent. blob: a few "
        "rounded; mass: glioma-like with oedema and core; multifocal: many small; wedge: infarct-like.",
    )
    voxel_mm: float = Field(
        default=0.0,
        ge=0.0,
        le=10.0,
        description="phantoms: size of a patch's voxel in mm. 0: data.spacing where it is set; else slices on which a "
        "head fills the patch, and volumes of 2 mm.",
    )
    path: str = Field(
        default="",
        max_length=4096,
        exclude=True,
        description="checkpoint: the file, read by the coordinator or simulation alone, from where it is started. Not "
        "part of the study hash.",
    )
    sha256: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="checkpoint: SHA-256 of the file, as sha256sum prints it.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source == "checkpoint" and not self.sha256:
            raise contradiction(
                "sha256", 'no sha256 with from = "checkpoint"', "give what sha256sum prints of the file"
            )
        if self.source != "checkpoint":
            for key in ("path", "sha256"):
                if getattr(self, key):
                    raise contradiction(
                        key, f'{key} with from = "{self.source}"', f'{key} belongs to from = "checkpoint"'
                    )
        return self

    @model_serializer(mode="wrap")
    def _by_key(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The keys as a study file has them: ``from`` is no name that Python takes."""
        values: dict[str, Any] = handler(self)
        if "source" in values:
            values = {"from": values.pop("source"), **values}
        return values

    @property
    def title(self) -> str:
        """What a result that starts from here is compared with, in the report's words."""
        return {
            "": "untrained network",
            "phantoms": "pre-trained on phantoms, no private patient",
            "checkpoint": "starting checkpoint, no patient of this study",
        }[self.source]
