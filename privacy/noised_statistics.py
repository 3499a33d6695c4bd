# SPDX-License-Identifier: Apache-2.0
"""What a hospital may tell of its data set for a private study: histograms with noise, paid for from its ledger.

The grid is public: the study names modalities and labels, :data:`QUESTIONS` the bins. So neither which histograms
stand in the file, nor how many bins they have, depends on a patient. A file asks m questions, with one histogram each,
and a patient counts once in one bin of each at most, however often scanned: zero-out of one patient moves all counts
together by at most √m in L2 norm. What is released is the counts + N(0, σ²m), rounded to whole numbers, with σ
calibrated to the ε that the hospital grants (:func:`event_for`). Whether a file is made depends on the *public* cohort
size alone.

Unit: the patient. Neighbouring relation: zero-out of one patient. Everything computed from the file afterwards is free:
:func:`pooled` adds hospitals up, since all have the same bins, and :func:`between` tells where a percentile lies as far
as the noise lets one say. It is never a minimum or maximum: the outer bins have no end.

Method: Gaussian mechanism (Dwork and Roth 2014, §3.5.3 and A) over joint histograms of bounded contribution.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from ..models.spec import Section, contradiction
from .accounting import MIN_NOISE, GaussianEvent, calibrate, epsilon
from .budget import site_delta
from .data_statistics import LEAST, Count
from .study import Study

__all__ = ["QUESTIONS", "Histogram", "Noised", "between", "event_for", "pooled", "questions"]

QUESTIONS: Final[Mapping[str, tuple[float, ...]]] = {
    "patients": (),
    "finest_voxel_mm": (0.4, 0.6, 0.8, 0.95, 1.05, 1.5, 2.5, 3.5, 4.5, 6.0),
    "coarsest_voxel_mm": (0.4, 0.6, 0.8, 0.95, 1.05, 1.5, 2.5, 3.5, 4.5, 6.0),
    "grey_p50": (0.0, 0.1, 1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6),
    "volume_ml": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3),
}
"""Inner edges of the bins of each question; the first and last bin have no end. Part of format 2: never changed."""
OF_MODALITY: Final = ("patients", "finest_voxel_mm", "coarsest_voxel_mm", "grey_p50")
OF_LABEL: Final = ("patients", "volume_ml")
LEVELS: Final = (5, 25, 50, 75, 95)
Whole = Annotated[int, Field(ge=-100_000_000, le=100_000_000)]


class Histogram(Section):
    """Noised counts of patients: bin i lies between inner edges i - 1 and i."""

    question: Literal["patients", "finest_voxel_mm", "coarsest_voxel_mm", "grey_p50", "volume_ml"]
    of: Annotated[str, Field(max_length=80)]
    """A modality, or ``MASK VALUE``."""
    counts: tuple[Whole, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        bins = len(QUESTIONS[self.question]) + 1
        if len(self.counts) != bins:
            raise contradiction("counts", f"{len(self.counts)} bins of {self.question}", f"expected {bins}")
        return self


class Noised(Section):
    """Everything that the file holds."""

    format: Literal[2] = 2
    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    study: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    threshold: int = Field(ge=LEAST, le=10_000)
    patients: Count
    """The public cohort size, rounded: declared, not counted."""
    epsilon: float = Field(gt=0, le=1000)
    """What the file cost each patient of the data set, at ``delta``."""
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(ge=MIN_NOISE, le=1e6)
    neighbours: Literal["zero-out of one patient"] = "zero-out of one patient"
    histograms: tuple[Histogram, ...] = Field(min_length=1, max_length=128, strict=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({(h.question, h.of) for h in self.histograms}) < len(self.histograms):
            raise contradiction("histograms", "a question is there twice", "expected each once")
        if self.patients < self.threshold // 5 * 5:
            raise contradiction("threshold", f"public size {self.patients} under {self.threshold}", "release nothing")
        event = GaussianEvent(sample_rate=1.0, noise_multiplier=self.noise_multiplier)
        if epsilon([event], self.delta) > self.epsilon * (1 + 1e-6):
            found = f"noise {self.noise_multiplier:g} costs more than ε = {self.epsilon:g}"
            raise contradiction("epsilon", found, "expected an ε that the noise keeps")
        return self

    @property
    def noise(self) -> float:
        """Standard deviation of the noise of each count, in patients."""
        return self.noise_multiplier * math.sqrt(len(self.histograms))


def questions(study: Study) -> list[tuple[str, str]]:
    """What a study's file asks: question and modality or ``MASK VALUE``, in order; from the study alone.

    Example:
        >>> study = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}})
        >>> len(questions(study)), questions(study)[0], questions(study)[-1]
        (6, ('patients', 'FLAIR'), ('volume_ml', 'label-lesion_mask 1'))
    """
    asked = [(question, modality) for modality in study.data.modalities for question in OF_MODALITY]
    if study.task.kind == "segmentation":
        values = range(1, len(study.task.labels) + 1)
        asked += [(question, f"{study.task.mask} {value}") for value in values for question in OF_LABEL]
    return asked


def event_for(study: Study, public_size: int, wanted: float) -> GaussianEvent:
    """The release that costs ε ``wanted`` at the site's δ: every patient takes part.

    Raises:
        BadInput: ``wanted`` is no positive number, or no sensible noise reaches it.
    """
    delta = site_delta(study.privacy.delta, public_size)
    return GaussianEvent(sample_rate=1.0, noise_multiplier=calibrate(wanted, delta, 1.0, 1))


def pooled(files: Sequence[Noised]) -> list[dict[str, Any]]:
    """Each question over all hospitals that asked it: counts added up, and what can be said of percentiles.

    Returns:
        For each: question, of, sites, edges, counts, noise (standard deviation of one count), percentiles.
    """
    found = []
    for question, of in dict.fromkeys((h.question, h.of) for file in files for h in file.histograms):
        parts = [(f, h) for f in files for h in f.histograms if (h.question, h.of) == (question, of)]
        counts = [sum(column) for column in zip(*(h.counts for _, h in parts), strict=True)]
        noise = math.sqrt(sum(file.noise**2 for file, _ in parts))
        edges = QUESTIONS[question]
        levels = {f"p{p}": between(counts, noise, edges, p / 100) for p in LEVELS} if edges else {}
        found.append({
            "question": question, "of": of, "sites": [file.site for file, _ in parts], "edges": list(edges),
            "counts": counts, "noise": round(noise, 2), "percentiles": {k: v for k, v in levels.items() if v},
        })  # fmt: skip
    return found


def between(
    counts: Sequence[int], noise: float, edges: Sequence[float], rank: float
) -> tuple[float | None, float | None] | None:
    """Where a percentile lies, as far as the noise lets one say.

    The sum below each edge is held against the sum above it: their balance, (1 - rank) × below - rank × above, is
    negative left of the percentile. From the left, edges are passed while the balance is below zero by more than 1.96
    standard deviations of its noise; likewise from the right. A bound is wrong only if the first edge beyond the
    percentile is passed, so each holds with at least 97.5 %, whatever the number of edges.

    Args:
        counts: noised, one more than ``edges``.
        noise: standard deviation of each.
        edges: rising.
        rank: in (0, 1).

    Returns:
        Lower and upper bound, None where it is open; None where nothing can be said.

    Example:
        >>> between([0, 50, 49, 1], 1.0, (1.0, 2.0, 3.0), 0.5), between([0, 5, 4, 1], 9.0, (1.0, 2.0, 3.0), 0.5)
        ((1.0, 3.0), None)
    """
    total, beyond = sum(counts), []
    for number, below in enumerate(accumulate(counts[:-1]), start=1):
        balance = (1 - rank) * below - rank * (total - below)
        spread = noise * math.sqrt(number * (1 - rank) ** 2 + (len(counts) - number) * rank**2)
        beyond.append(balance / max(spread, 1e-9))
    left = next((i for i, score in enumerate(beyond) if score >= -1.96), len(edges))
    right = next((i for i, score in enumerate(reversed(beyond)) if score <= 1.96), len(edges))
    low = edges[left - 1] if left else None
    high = edges[len(edges) - right] if right else None
    return None if low is None and high is None else (low, high)
