# SPDX-License-Identifier: Apache-2.0
"""The study: what a consortium agrees to learn, typed, ranged and hashed.

The study is the first thing that crosses a hospital's wall, so it belongs to this room: the coordinator
reads it from a TOML file (:mod:`fedneuro.privacy.study_file`), every message carries its canonical form, and
each node parses and hashes that form again before it looks at anything else. Unknown keys are refused on
both sides. The *study hash* is the SHA-256 of the canonical form; it is on every message, ledger entry and
report, so one changed digit is another study.

Canonical form: the effective study (defaults filled in) as JSON, keys sorted, no white space, UTF-8.
"""

import hashlib
import json
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..models.spec import OUTCOMES, SUITED_LOSSES, ModelSection, Section, TaskSection, Trainable, contradiction
from .errors import ContractViolation
from .study_data import DataSection
from .study_evaluation import BOUNDED_METRICS, DEFAULT_METRICS, EvaluationSection
from .study_init import PHANTOM_MODALITIES, InitSection
from .study_privacy import PrivacySection
from .study_strategy import StrategySection, WireSection, check_strategy

__all__ = [
    "DataSection",
    "EvaluationSection",
    "PrivacySection",
    "StrategySection",
    "Study",
    "StudySection",
    "TrainingSection",
    "WireSection",
]

SMALLEST_RESNET_PATCH = 32


class StudySection(Section):
    """Who we are."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", description="Short name: lower case, digits, hyphens.")
    description: str = Field(
        default="", max_length=2000, description="What the consortium wants to learn, in a sentence."
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        description="Seed of initialisation, crops and augmentation. Never of privacy noise.",
    )


class TrainingSection(Section):
    """How a hospital trains between two rounds."""

    rounds: int = Field(default=10, ge=1, le=10_000, description="Rounds of the federation.")
    local_steps: int = Field(default=0, ge=0, le=100_000, description="Optimiser steps per round. 0: use local_epochs.")
    local_epochs: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Passes over the training patients per round (one crop each). 0: use local_steps.",
    )
    batch_size: int = Field(
        default=8, ge=1, le=4096, description="Crops per step. Not used under privacy (see privacy)."
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adam", description="Local optimiser.")
    learning_rate: float = Field(default=1e-3, gt=0, le=100, description="Step size.")
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0, description="sgd: momentum.")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="Weight decay.")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="Learning rate over all steps of the study: constant, or cosine to zero."
    )
    optimizer_state: Literal["keep", "reset"] = Field(
        default="keep", description="A site's optimiser state between rounds: kept at the site, or started anew."
    )
    loss: Literal["dice_ce", "dice", "cross_entropy", "focal", "mse", "l1", "huber", "hazard"] = Field(
        default="dice_ce",
        description="Loss, a mean over images. Dice losses are for segmentation; mse, l1, huber for regression; "
        "hazard, the likelihood of survival in intervals of time, for survival.",
    )
    ema: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Decay per round of the averaged global model that is evaluated. 0: none.",
    )
    trainable: Trainable = "all"
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Arithmetic of forward and backward."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: the GPU where there is one.")
    threads: int = Field(
        default=1,
        ge=1,
        le=256,
        description="CPU threads of one site. Part of the study: the order of sums, and so the bits, depend on it.",
    )
    init: InitSection = Field(
        default_factory=InitSection, description="What the first round starts from: a table, [training.init]."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.local_steps > 0) == (self.local_epochs > 0):
            found = (
                "both local_steps and local_epochs are set"
                if self.local_steps
                else "neither local_steps nor local_epochs is set"
            )
            raise contradiction("local_steps", found, "give exactly one of them, at least 1")
        if self.momentum and self.optimizer != "sgd":
            raise contradiction(
                "momentum", f'momentum with optimizer = "{self.optimizer}"', 'momentum belongs to "sgd"'
            )
        return self


class Study(Section):
    """A whole study, validated. See the module's text for its canonical form and hash.

    Example:
        >>> study = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 2}})
        >>> study.privacy.mode, len(study.hash)
        ('local', 64)
    """

    study: StudySection
    task: TaskSection = Field(default_factory=TaskSection)
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection
    strategy: StrategySection = Field(default_factory=StrategySection)
    wire: WireSection = Field(default_factory=WireSection)
    privacy: PrivacySection = Field(default_factory=PrivacySection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "Study":
        """Build from plain values, as TOML or JSON give them.

        Raises:
            pydantic.ValidationError: with one entry per wrong key; the edges turn it into a ``StudyError``.
        """
        return cls.model_validate_json(json.dumps(values))

    @classmethod
    def from_canonical(cls, canonical: bytes, expected_hash: str) -> "Study":
        """Read a study that came in a message, and prove that it is the one that was named.

        Raises:
            ContractViolation: not a valid study, not in canonical form, or of another hash.
        """
        if hashlib.sha256(canonical).hexdigest() != expected_hash:
            raise ContractViolation("the study in the message does not have the hash that the message names")
        try:
            study = cls.model_validate_json(canonical)
        except ValidationError as error:
            raise ContractViolation(f"the study in the message is not valid: {error.error_count()} faults") from error
        if study.canonical != canonical:
            raise ContractViolation("the study in the message is not in canonical form (another version of FedNeuro?)")
        return study

    @cached_property
    def canonical(self) -> bytes:
        """The canonical form; its SHA-256 is the study hash."""
        values = self.model_dump(mode="json")
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @cached_property
    def hash(self) -> str:
        """Study hash: 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics that a site returns, in the order of the study."""
        if self.evaluation.metrics:
            return self.evaluation.metrics
        if self.privacy.metrics == "noise":
            return DEFAULT_METRICS[self.task.kind][:1]
        return DEFAULT_METRICS[self.task.kind]

    @property
    def select_metric(self) -> str:
        """Metric that chooses the round, or ``"last"``."""
        return self.evaluation.select or self.metric_names[0]

    @property
    def total_steps(self) -> int:
        """Private steps that one site takes in the whole study (mode ``local`` needs ``local_steps``)."""
        return self.training.rounds * self.training.local_steps

    @model_validator(mode="after")
    def _check_distributed(self) -> Self:
        if self.privacy.mode != "distributed":
            return self
        if self.training.local_steps != 1:
            raise contradiction(
                "training.local_steps",
                f'training.local_steps = {self.training.local_steps} with privacy.mode = "distributed"',
                "a round is one step over all hospitals together: set training.local_steps = 1, and more rounds",
            )
        if not self.privacy.delta:
            raise contradiction(
                "privacy.delta",
                'privacy.delta = 0 with privacy.mode = "distributed"',
                "the hospitals share one noise, so they need one delta: set it below 1 / the largest cohort",
            )
        return self

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        check_strategy(self)
        return self

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if self.training.init.source != "phantoms":
            return self
        key, supported = "training.init.from", "phantoms teach segmentation of one label on scans that they know"
        if self.task.kind != "segmentation" or len(self.task.labels) != 1:
            found = f"phantoms for {self.task.kind} of {len(self.task.labels)} labels"
            raise contradiction(key, found, f'{supported}: use "checkpoint" or ""')
        if unknown := [m for m in self.data.modalities if m.rsplit("_", 1)[-1] not in PHANTOM_MODALITIES]:
            raise contradiction(key, f'phantoms for the modality "{unknown[0]}"', f"{supported}: {PHANTOM_MODALITIES}")
        if self.data.normalise not in ("zscore", "percentile"):
            found = f'phantoms with data.normalise = "{self.data.normalise}"'
            raise contradiction(key, found, 'their grey levels mean nothing by themselves: use "zscore"')
        return self

    @model_validator(mode="after")
    def _check_released_metrics(self) -> Self:
        if self.privacy.metrics != "noise":
            return self
        if self.privacy.mode == "none":
            raise contradiction(
                "privacy.metrics", 'privacy.metrics = "noise" with privacy.mode = "none"', 'use "suppress"'
            )
        if self.task.kind in OUTCOMES:
            found = f'privacy.metrics = "noise" with task.kind = "{self.task.kind}"'
            raise contradiction("privacy.metrics", found, 'its metrics have no bound to scale noise by: use "suppress"')
        for key, names in (("metrics", self.evaluation.metrics), ("select", (self.evaluation.select,))):
            if unbounded := sorted(set(names) - BOUNDED_METRICS - {"", "last"}):
                raise contradiction(
                    f"evaluation.{key}",
                    f'"{unbounded[0]}" with privacy.metrics = "noise"',
                    "only dice and accuracy can be noised: they are means over patients of values from 0 to 1",
                )
        if self.evaluation.strata:
            found = 'groups of patients with privacy.metrics = "noise"'
            raise contradiction("evaluation.strata", found, "leave it empty: a group's metric is not noised")
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        task, model, data = self.task, self.model, self.data
        segmentation = task.kind == "segmentation"
        wanted = "unet" if segmentation else "resnet"
        if model.name != wanted:
            raise contradiction(
                "model.name", f'model.name = "{model.name}" for task.kind = "{task.kind}"', f'use "{wanted}"'
            )
        if len(data.patch) != model.dims:
            raise contradiction(
                "data.patch",
                f"data.patch has {len(data.patch)} numbers while model.dims = {model.dims}",
                f"give {model.dims}",
            )
        if any(side % model.stride for side in data.patch):
            raise contradiction(
                "data.patch",
                f"data.patch = {list(data.patch)} with {len(model.channels)} levels in model.channels",
                f"every side must be a multiple of {model.stride}",
            )
        if model.name == "resnet" and model.norm == "instance" and min(data.patch) <= SMALLEST_RESNET_PATCH:
            raise contradiction(
                "data.patch",
                f'data.patch = {list(data.patch)} for resnet with norm = "instance"',
                f"every side must be above {SMALLEST_RESNET_PATCH}: the last stage needs more than one voxel",
            )
        self.privacy.check_beside(model.name, self.training.trainable, self.training.precision)
        if data.spacing and len(data.spacing) != 3:
            raise contradiction("data.spacing", f"{len(data.spacing)} numbers", "give three numbers in mm, or none")
        if self.training.loss not in (suited := SUITED_LOSSES[task.kind]):
            allowed = " or ".join(f'"{name}"' for name in suited)
            raise contradiction("training.loss", f'"{self.training.loss}" for {task.kind}', f"use {allowed}")
        self.evaluation.check_beside(task.kind, self.metric_names)
        if self.privacy.mode != "none" and not self.training.local_steps:
            raise contradiction(
                "training.local_steps",
                f'training.local_epochs with privacy.mode = "{self.privacy.mode}"',
                "private training counts Poisson steps: set training.local_steps and leave local_epochs out",
            )
        return self
