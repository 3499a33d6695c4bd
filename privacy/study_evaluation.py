# SPDX-License-Identifier: Apache-2.0
"""The study's ``[evaluation]``: who judges, by which metrics, and what is told of groups of patients.

A metric is a thing that leaves a hospital, so its name is one of a fixed list; so are the names of the groups
(:data:`STRATA`), which depend on the study alone and never on what a hospital holds.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..models.spec import Section, contradiction

__all__ = [
    "BOUNDED_METRICS",
    "DEFAULT_METRICS",
    "LESION_METRICS",
    "SUITED_METRICS",
    "EvaluationSection",
    "Metric",
    "SiteName",
    "Stratum",
    "strata_cells",
]

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Metric = Literal[
    "dice", "nsd", "hd95", "volume_difference",
    "lesion_f1", "lesion_sensitivity", "false_positives", "lesion_count_difference", "lesion_dice", "lesion_hd95",
    "accuracy", "auroc", "auprc", "sensitivity", "specificity", "brier", "ece", "reliability",
    "mae", "rmse", "c_index",
]  # fmt: skip
"""Names of metrics; what each means is in :mod:`fedneuro.models.metrics` and ``docs/results.md``."""
Stratum = Literal["age", "sex", "vendor", "field", "size"]

LESION_METRICS: Final = frozenset(
    {"lesion_f1", "lesion_sensitivity", "false_positives", "lesion_count_difference", "lesion_dice", "lesion_hd95"}
)
SUITED_METRICS: Final[Mapping[str, frozenset[str]]] = {
    "segmentation": LESION_METRICS | {"dice", "nsd", "hd95", "volume_difference"},
    "classification": frozenset(
        {"accuracy", "auroc", "auprc", "sensitivity", "specificity", "brier", "ece", "reliability"}
    ),
    "regression": frozenset({"mae", "rmse"}),
    "survival": frozenset({"c_index"}),
}
"""Metrics by kind of task."""
DEFAULT_METRICS: Final[Mapping[str, tuple[str, ...]]] = {
    "segmentation": ("dice", "hd95"),
    "classification": ("accuracy", "auroc"),
    "regression": ("mae", "rmse"),
    "survival": ("c_index",),
}
"""What a study that names none asks for."""
BOUNDED_METRICS: Final = frozenset({"dice", "accuracy"})
"""Means over patients of values from 0 to 1: what can be noised."""

SEXES: Final = ("F", "M", "other")
VENDORS: Final = ("siemens", "ge", "philips", "canon", "fujifilm", "united-imaging", "other")
FIELDS: Final = ("below-1T", "1.5T", "3T", "7T", "other")
SIZES: Final = ("small", "medium", "large")
UNKNOWN: Final = "unknown"
"""The cell of patients of whom it is not known; also a patient without any lesion, for ``size``."""


class EvaluationSection(Section):
    """How the model is judged."""

    heldout: tuple[SiteName, ...] = Field(default=(), description="Sites that never train. All other sites do.")
    validation_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of a training site's patients that are kept for validation."
    )
    every: int = Field(
        default=1, ge=0, le=10_000, description="Evaluate after every so many rounds. 0: only at the end."
    )
    metrics: tuple[Metric, ...] = Field(
        default=(),
        description="Metrics. Empty: dice and hd95 of a segmentation, accuracy and auroc of a classification, mae and "
        "rmse of a regression, c_index of survival. The costly ones are computed in the final evaluation only, unless "
        "they select: of a segmentation all but dice, of a classification all but accuracy and auroc.",
    )
    select: Metric | Literal["", "last"] = Field(
        default="",
        description="Metric on the validation patients of training sites that chooses the round. "
        'Empty: the first metric. "last": the last round. Held-out sites never choose.',
    )
    min_patients: int = Field(
        default=1, ge=1, le=1000, description="A site with fewer patients than this returns no metric."
    )
    bootstrap: int = Field(default=2000, ge=100, le=100_000, description="Resamples of patients for 95 % intervals.")
    interval: Literal["auto", "bca", "percentile"] = Field(
        default="auto",
        description="95 % intervals of means over patients. auto: of scores from 0 to 1 the Bayesian bootstrap with "
        "half an unseen patient at 0 and at 1; of distances, volumes, counts and errors BCa. bca, percentile: these "
        "bootstraps for all. docs/evidence.md says how often each covers.",
    )
    overlap: float = Field(default=0.25, ge=0, lt=1, description="model.dims = 3: overlap of the inference windows.")
    nsd_tolerance: float = Field(
        default=2.0, ge=0, le=20, description="nsd: mm by which two outlines may differ and still count as the same."
    )
    lesions: Literal["isles-2022", "brats-2023-gli", "brats-2023-men", "brats-2023-met"] = Field(
        default="isles-2022",
        description="What the lesion metrics count as a lesion, and as found, as these challenges did; all with "
        "26-connectivity. isles-2022: found where one voxel is shared. brats-2023: lesions that touch once grown by 3 "
        "voxels (men, met: 1) are one, found within that margin; those up to 50 mm³ (met: 2 mm³) do not count.",
    )
    lesion_cuts: tuple[Annotated[float, Field(gt=0, le=10_000)], ...] = Field(
        default=(0.1, 1.0),
        min_length=2,
        max_length=2,
        description="lesion_sensitivity: volumes in ml that part small, medium and large lesions.",
    )
    bins: int = Field(default=10, ge=2, le=20, description="ece and reliability: bins of equal width.")
    strata: tuple[Stratum, ...] = Field(
        default=(),
        description="Groups of patients for which the first metric is also told, in the final evaluation: by age band, "
        "sex, vendor and field strength of the scanner, volume of the lesions. A hospital must permit it "
        "(reply.strata in its policy), and groups below its minimum, or below five patients, are never told.",
    )
    age_cuts: tuple[Annotated[int, Field(ge=1, le=120)], ...] = Field(
        default=(40, 60, 75), min_length=1, max_length=8, description="Ages in years at which bands of age begin."
    )
    size_cuts: tuple[Annotated[float, Field(gt=0, le=10_000)], ...] = Field(
        default=(5.0, 30.0),
        min_length=2,
        max_length=2,
        description="Volumes in ml of all lesions of a patient that part small, medium and large, such as public "
        "tertiles. Fixed here: cut points of a hospital's own would tell of its patients.",
    )
    previews: int = Field(
        default=3, ge=0, le=50, description="Patients per site whose pictures stay in the site's folder."
    )
    worst: int = Field(
        default=5,
        ge=0,
        le=50,
        description="Patients with the worst scores in the site's own report, which stays there. 0: no such report.",
    )
    explain: bool = Field(
        default=True,
        description="The site's own report shows what the model looked at, or where it is unsure, for those patients.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("heldout", "metrics", "strata"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise contradiction(key, f"{key} repeats a name: {list(values)}", "name each once")
        for key in ("lesion_cuts", "age_cuts", "size_cuts"):
            values = getattr(self, key)
            if list(values) != sorted(set(values)):
                raise contradiction(key, f"{key} = {list(values)}", "give rising numbers")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that came later stands in the canonical form where it is used alone: older hashes hold."""
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if k != "interval" or v != "auto"}

    def check_beside(self, kind: str, names: tuple[str, ...]) -> None:
        """Refuse metrics and groups that do not go with the task's kind, or a selecting one that is not computed.

        Args:
            kind: ``task.kind``.
            names: metrics of the study, after defaults.

        Raises:
            PydanticCustomError: naming the key, what was found and what is allowed.
        """
        suited = SUITED_METRICS[kind]
        for key, given in (("metrics", self.metrics), ("select", (self.select,))):
            for name in given:
                if name not in suited | {"", "last"}:
                    raise contradiction(f"evaluation.{key}", f'"{name}" for {kind}', f"use {', '.join(sorted(suited))}")
        if self.select not in ("", "last", *names):
            raise contradiction("evaluation.select", f'"{self.select}" is not in evaluation.metrics', "add it there")
        if "reliability" in (self.select, names[0]):
            key = "select" if self.select == "reliability" else "metrics"
            found = '"reliability" selects, but is a curve' if key == "select" else '"reliability" is the first metric'
            raise contradiction(f"evaluation.{key}", found, "name another metric first, and select by it")
        if "size" in self.strata and kind != "segmentation":
            raise contradiction("evaluation.strata", f'"size" for {kind}', "only a segmentation has lesions to measure")


def strata_cells(section: EvaluationSection) -> dict[str, tuple[str, ...]]:
    """The cells of each group that the study names, in order; :data:`UNKNOWN` is always the last.

    Example:
        >>> strata_cells(EvaluationSection(strata=("age", "sex")))
        {'age': ('to-39', '40-59', '60-74', 'from-75', 'unknown'), 'sex': ('F', 'M', 'other', 'unknown')}
    """
    cuts = section.age_cuts
    bands = [f"to-{cuts[0] - 1}", *(f"{low}-{high - 1}" for low, high in pairwise(cuts))]
    cells: dict[str, tuple[str, ...]] = {
        "age": (*bands, f"from-{cuts[-1]}"), "sex": SEXES, "vendor": VENDORS, "field": FIELDS, "size": SIZES,
    }  # fmt: skip
    return {name: (*cells[name], UNKNOWN) for name in section.strata}
