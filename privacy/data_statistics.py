# SPDX-License-Identifier: Apache-2.0
"""What a hospital may tell of its data set beside its public size: a file of its own, never part of a training message.

It is made by ``fedneuro-node data stats --release``, at the hospital, which reads it before it hands it over. Every
field is listed and bounded here, and both sides check it; with the node's settings it passes the policy and the audit
log, and is sealed with the node's key (:mod:`.site_seals`). Disclosure rules, for a threshold of k patients:

- a group (a modality, a label) of fewer than k patients is left out, and so are its quantiles;
- counts of patients are rounded to multiples of 5, so that differences of counts tell nothing of one patient either;
- the 5th and 95th percentiles are told from 4 k patients on, quartiles from 2 k, medians from k; never a minimum or
  maximum; all values are rounded to two digits;
- for a study with differential privacy these numbers would void its promise: it gets :mod:`.noised_statistics`.

This is statistical disclosure control, not differential privacy: it does not compose, so hand over one file, not many.
"""

import math
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from ..models.spec import Section, contradiction

__all__ = ["LEAST", "PURPOSE", "ROUNDING", "Group", "LabelGroup", "Quantiles", "Released", "quantiles", "rounded_count"]

PURPOSE: Final = "statistics"
"""What such a file is, under its seal (:mod:`.site_seals`) and in the audit log."""
LEAST: Final = 5
"""Smallest threshold that a hospital can choose."""
ROUNDING: Final = 5
_LEVELS: Final = {"p5": 4, "p25": 2, "p50": 1, "p75": 2, "p95": 4}
"""Multiples of the threshold from which each percentile is told."""
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Name = Annotated[str, Field(pattern=r"^([a-z]+-[A-Za-z0-9]+_)*[A-Za-z0-9]+$", max_length=64)]
Count = Annotated[int, Field(ge=0, le=10_000_000, multiple_of=ROUNDING)]


class Quantiles(Section):
    """Percentiles over patients; None where too few patients stand behind one."""

    p5: Number | None = None
    p25: Number | None = None
    p50: Number | None = None
    p75: Number | None = None
    p95: Number | None = None


class Group(Section):
    """One modality."""

    patients: Count
    grey_p5: Quantiles
    """Of each patient's 5th percentile in the head; likewise the others."""
    grey_p50: Quantiles
    grey_p95: Quantiles
    voxel_mm: tuple[Quantiles, Quantiles, Quantiles]  # right, front, top
    extent_mm: tuple[Quantiles, Quantiles, Quantiles]


class LabelGroup(Section):
    """One value of one mask."""

    patients: Count
    volume_ml: Quantiles
    share_of_voxels: Quantiles


class Released(Section):
    """Everything that the file holds."""

    format: Literal[1] = 1
    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    study: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Hash of the study that it is for, or empty."""
    threshold: int = Field(ge=LEAST, le=10_000)
    patients: Count
    modalities: dict[Name, Group] = Field(max_length=64)
    labels: dict[Name, dict[Annotated[str, Field(pattern=r"^[0-9]{1,3}$")], LabelGroup]] = Field(max_length=64)

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = [self.patients, *(g.patients for g in self.modalities.values())]
        counts += [g.patients for values in self.labels.values() for g in values.values()]
        if min(counts) < self.threshold // ROUNDING * ROUNDING:
            found = f"a group of {min(counts)} patients under the threshold {self.threshold}"
            raise contradiction("threshold", found, "leave the group out")
        return self


def rounded_count(patients: int) -> int:
    """A number of patients as it may be told: to the nearest 5.

    Example:
        >>> [rounded_count(n) for n in (5, 7, 8, 34)]
        [5, 5, 10, 35]
    """
    return (patients + ROUNDING // 2) // ROUNDING * ROUNDING


def quantiles(values: list[float], threshold: int) -> Quantiles:
    """Percentiles of one value per patient that may be told.

    Args:
        values: one per patient, finite.
        threshold: patients that a group must have.

    Example:
        >>> quantiles([float(n) for n in range(12)], 5)
        Quantiles(p5=None, p25=2.8, p50=5.5, p75=8.2, p95=None)
    """
    ordered = sorted(values)
    told: dict[str, float | None] = {}
    for name, multiple in _LEVELS.items():
        if len(ordered) >= multiple * threshold:
            at = (len(ordered) - 1) * int(name[1:]) / 100
            low = math.floor(at)
            high = min(low + 1, len(ordered) - 1)
            told[name] = _two_digits(ordered[low] + (at - low) * (ordered[high] - ordered[low]))
    return Quantiles(**told)


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
