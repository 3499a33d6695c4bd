# SPDX-License-Identifier: Apache-2.0
"""Metrics, always over patients.

Segmentation: a patient's whole volume, never a slice (:mod:`.overlap`, :mod:`.surfaces`, :mod:`.lesions`; all of them
for one scan in :mod:`.scan`). Classification: a cohort, one probability row per patient (:mod:`.ranking`,
:mod:`.calibration`). Outcomes: :mod:`.outcome`. Intervals resample patients: :mod:`.means` of a mean,
:mod:`.intervals` of any other statistic.

Empty masks have an explicit rule, because they occur (a treated lesion, a network that finds nothing):

===========================  ==========  ====================  =====================  =====================
metric                       unit        both empty            reference alone empty  prediction alone empty
===========================  ==========  ====================  =====================  =====================
``dice``, ``nsd``            0 to 1      1                     0                      0
``hd95``                     mm          0                     diagonal of the image  diagonal of the image
``volume_difference``        ml          0                     predicted volume       true volume
``lesion_f1``                0 to 1      1                     0                      0
``lesion_dice``              0 to 1      1                     0                      0
``lesion_hd95``              mm          0                     374                    374
``lesion_sensitivity``       0 to 1      undefined             undefined              0
``false_positives``          lesions     0                     predicted lesions      0
``lesion_count_difference``  lesions     0                     predicted lesions      true lesions
===========================  ==========  ====================  =====================  =====================

A metric in mm, ml or mm³ of an image whose voxel size is unknown is undefined. An undefined value is left out of the
mean over patients, and a metric that is undefined for all patients is absent.

References: Maier-Hein et al. 2024, Metrics reloaded, https://doi.org/10.1038/s41592-023-02151-z.
"""

from collections.abc import Mapping

from .calibration import Bin, brier, ece, reliability
from .intervals import Interval, bootstrap, perfect_ends
from .lesions import LESION_RULES, LesionRule, find_lesions, lesion_scores
from .means import mean_interval
from .outcome import c_index, c_index_interval, mean_absolute_error, root_mean_squared_error
from .overlap import dice, volume_difference
from .ranking import accuracy, auprc, auroc, sensitivity, specificity, youden_threshold
from .scan import WORST_IS_ZERO, ScanRules, failed_scores, scan_scores
from .surfaces import hausdorff95, surface_dice

__all__ = [
    "LESION_RULES",
    "METRICS",
    "Bin",
    "Interval",
    "LesionRule",
    "ScanRules",
    "accuracy",
    "auprc",
    "auroc",
    "bootstrap",
    "bounds_of",
    "brier",
    "c_index",
    "c_index_interval",
    "dice",
    "ece",
    "failed_scores",
    "find_lesions",
    "hausdorff95",
    "higher_is_better",
    "lesion_scores",
    "mean_absolute_error",
    "mean_interval",
    "metric_of",
    "perfect_ends",
    "reliability",
    "root_mean_squared_error",
    "scan_scores",
    "sensitivity",
    "specificity",
    "surface_dice",
    "volume_difference",
    "youden_threshold",
]

higher_is_better: Mapping[str, bool] = {
    "dice": True, "nsd": True, "hd95": False, "volume_difference": False,
    "lesion_f1": True, "lesion_sensitivity": True, "false_positives": False, "lesion_count_difference": False,
    "lesion_dice": True, "lesion_hd95": False,
    "accuracy": True, "auroc": True, "auprc": True, "sensitivity": True, "specificity": True,
    "brier": False, "ece": False, "mae": False, "rmse": False, "c_index": True,
}  # fmt: skip
"""Direction of each metric, by the name that a study gives. ``reliability`` is a curve and has none."""

METRICS: tuple[str, ...] = (*higher_is_better, "reliability")
"""Names of the metrics."""


def metric_of(name: str) -> str:
    """The metric that a value's name belongs to: ``dice_core`` and ``dice`` to ``dice``; unknown names to nothing."""
    base, _, _ = name.partition(":")
    return max((m for m in METRICS if base == m or base.startswith(f"{m}_")), key=len, default="")


def bounds_of(name: str) -> tuple[float, float] | None:
    """Least and greatest value of a patient, where the metric is a mean over patients and has both.

    Example:
        >>> bounds_of("dice_core"), bounds_of("accuracy"), bounds_of("hd95")
        ((0.0, 1.0), (0.0, 1.0), None)
    """
    return (0.0, 1.0) if metric_of(name) in WORST_IS_ZERO | {"accuracy"} else None
