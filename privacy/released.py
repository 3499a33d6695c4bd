# SPDX-License-Identifier: Apache-2.0
"""The names under which a hospital's metrics may leave: a list that follows from the study alone.

=====================================  ======================================================================
name                                   what it is
=====================================  ======================================================================
``<metric>``, ``<metric>_<label>``     a metric of the study, and, with several labels, of each
``failures``                           share of patients on whom inference failed; absent: none
``threshold``                          the threshold of ``sensitivity`` and ``specificity``: in a round a training
                                       site's own best, in the final evaluation the one that was used
``lesion_sensitivity:<size>``          over patients with lesions of that size
``reliability:<what>:<bin>``           a point of the reliability curve: ``predicted`` and ``observed``
``<first metric>:<stratum>:<cell>``    the first metric of the patients of a cell
=====================================  ======================================================================

A name with a colon is a *cell*: it covers some of the patients only. No cell of fewer than :data:`MIN_CELL` patients
leaves, whatever the study and the hospital allow, and the number that goes with it is rounded.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

from .study import Study
from .study_evaluation import SIZES, strata_cells

__all__ = [
    "FAILURES",
    "MIN_CELL",
    "THRESHOLD",
    "bin_name",
    "is_cell",
    "released_names",
    "split_cells",
    "uses_threshold",
]

MIN_CELL: Final = 5
"""Fewest patients of a cell that leaves."""
FAILURES: Final = "failures"
THRESHOLD: Final = "threshold"

_T = TypeVar("_T")


def released_names(study: Study) -> frozenset[str]:
    """Every name that a site's metrics may have in this study."""
    evaluation, names = study.evaluation, set(study.metric_names) - {"reliability"}
    segmentation = study.task.kind == "segmentation"
    labels = study.task.labels if segmentation else ()
    allowed = names | {f"{name}_{label}" for name in names for label in labels}
    if study.privacy.metrics == "noise":
        return frozenset(allowed)
    allowed.add(FAILURES)
    if uses_threshold(study):
        allowed.add(THRESHOLD)
    if "lesion_sensitivity" in names:
        allowed |= {f"lesion_sensitivity:{size}" for size in SIZES}
    if "reliability" in study.metric_names:
        allowed |= {bin_name(what, b) for what in ("predicted", "observed") for b in range(1, evaluation.bins + 1)}
    for stratum, cells in strata_cells(evaluation).items():
        allowed |= {f"{study.metric_names[0]}:{stratum}:{cell}" for cell in cells}
    return frozenset(allowed)


def uses_threshold(study: Study) -> bool:
    """Whether a threshold decides about metrics of the study: two classes, and sensitivity or specificity."""
    two = study.task.kind == "classification" and len(study.task.labels) == 2
    return two and bool({"sensitivity", "specificity"} & set(study.metric_names))


def bin_name(what: str, number: int) -> str:
    """The name of a point of the reliability curve.

    Example:
        >>> bin_name("observed", 3)
        'reliability:observed:03'
    """
    return f"reliability:{what}:{number:02d}"


def is_cell(name: str) -> bool:
    """Whether a name covers some of the patients only."""
    return ":" in name


def split_cells(metrics: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """Metrics of all patients, and cells.

    Example:
        >>> split_cells({"dice": 1, "dice:sex:F": 2})
        ({'dice': 1}, {'dice:sex:F': 2})
    """
    return (
        {name: value for name, value in metrics.items() if not is_cell(name)},
        {name: value for name, value in metrics.items() if is_cell(name)},
    )
