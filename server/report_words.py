# SPDX-License-Identifier: Apache-2.0
"""How the report writes names and numbers, and which metrics it speaks of."""

import math
from collections.abc import Mapping
from typing import Any, Final

from ..privacy.study_evaluation import DEFAULT_METRICS

__all__ = [
    "EXPLAINED",
    "PROTECTS_AGAINST",
    "Json",
    "curve_metric",
    "digits_of",
    "duration_text",
    "epsilon_text",
    "interval_text",
    "is_unbounded",
    "less_is_better",
    "main_metric",
    "metric_base",
    "metric_keys",
    "metric_name",
    "number",
    "unit_of",
    "with_interval",
]

Json = Mapping[str, Any]
"""A part of ``results.json``."""

METRIC_NAMES: Final = {
    "dice": "Dice", "nsd": "NSD", "hd95": "HD95", "volume_difference": "Volume difference", "lesion_f1": "Lesion F1",
    "lesion_sensitivity": "Lesion sensitivity", "false_positives": "False-positive lesions",
    "lesion_count_difference": "Lesion count difference", "lesion_dice": "Lesion-wise Dice",
    "lesion_hd95": "Lesion-wise HD95", "accuracy": "Accuracy", "auroc": "AUROC", "auprc": "AUPRC",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "brier": "Brier score", "ece": "ECE",
    "mae": "MAE", "rmse": "RMSE", "c_index": "C-index",
}  # fmt: skip
EXPLAINED: Final = {
    "dice": "Dice: overlap of prediction and truth over a patient's whole volume, 0 to 1, higher is better",
    "nsd": "NSD: share of the two outlines that lie within the tolerance of each other, 0 to 1, higher is better",
    "hd95": "HD95: 95th percentile of the distance between the two outlines, in mm, lower is better",
    "volume_difference": "Volume difference: between predicted and true volume, in ml, lower is better",
    "lesion_f1": "Lesion F1: agreement on which lesions there are, 0 to 1, higher is better",
    "lesion_sensitivity": "Lesion sensitivity: share of true lesions that are found, higher is better",
    "false_positives": "False-positive lesions: predicted ones that meet no true one, per patient, lower is better",
    "accuracy": "Accuracy: share of patients whose class is right",
    "auroc": "AUROC: chance that a patient of a class is ranked above one of another class; 0.5 is guessing",
    "auprc": "AUPRC: precision averaged over recall; guessing gives the share of positives",
    "brier": "Brier score: mean squared error of probabilities, lower is better",
    "ece": "ECE: mean difference between confidence and accuracy over bins, lower is better",
    "mae": "MAE: mean distance between predicted and true number, in the unit of the target, lower is better",
    "rmse": "RMSE: root of the mean squared distance, in the unit of the target, lower is better",
    "c_index": "C-index: chance that of two patients the one with the event first was predicted so; 0.5 is guessing "
    "(Harrell)",
}
UNITS: Final = {"hd95": "mm", "lesion_hd95": "mm", "volume_difference": "ml"}
COUNTS: Final = frozenset({"false_positives", "lesion_count_difference"})
ERRORS: Final = frozenset({"mae", "rmse"})
LESS_IS_BETTER: Final = frozenset({*UNITS, *COUNTS, *ERRORS, "brier", "ece"})


PROTECTS_AGAINST: Final = {
    "local": "everyone who sees the update or the model, the coordinator included",
    "distributed": "everyone who sees the model, and a coordinator that sees only the sum over the hospitals, alone or "
    "with up to privacy.tolerate of them; not a coordinator with more",
}
"""Against whom each private mode protects a patient."""


def metric_base(key: str) -> str:
    """``lesion_f1_core`` → ``lesion_f1``: the metric without the name of a label."""
    known = [name for name in METRIC_NAMES if key == name or key.startswith(f"{name}_")]
    return max(known, key=len, default=key.partition("_")[0])


def metric_name(key: str) -> str:
    """``dice_anterior`` → "Dice, anterior"."""
    base = metric_base(key)
    label = key.removeprefix(base).removeprefix("_")
    return METRIC_NAMES.get(base, base) + (f", {label}" if label else "")


def less_is_better(key: str) -> bool:
    """Whether a smaller value of a metric is better."""
    return metric_base(key) in LESS_IS_BETTER


def is_unbounded(key: str) -> bool:
    """Whether a metric is a distance, a volume, a count or an error, and not a number from 0 to 1."""
    return metric_base(key) in {*UNITS, *COUNTS, *ERRORS}


def unit_of(key: str) -> str:
    """``mm``, ``ml`` or an empty text."""
    return UNITS.get(metric_base(key), "")


def number(key: str, value: float) -> str:
    """``0.61``, or ``4.2 mm`` for a distance."""
    return f"{value:.{digits_of(key)}f} {unit_of(key)}".rstrip()


def digits_of(key: str) -> int:
    """Decimals of a value of a metric, as tables show it."""
    return 1 if is_unbounded(key) and metric_base(key) not in ERRORS else 2


def with_interval(key: str, estimate: Json | None) -> str:
    """``0.61 (0.55–0.67)``, or a dash where there is none."""
    if not estimate:
        return "–"
    return f"{number(key, estimate['mean'])} ({interval_text(key, estimate)})"


def interval_text(key: str, estimate: Json) -> str:
    """``0.55–0.67``: the 95 % interval of an estimate."""
    low, high = estimate["ci95"]
    return f"{low:.{digits_of(key)}f}–{high:.{digits_of(key)}f}"


def epsilon_text(value: float) -> str:
    """Rounded up: a report never says less than was spent."""
    return f"{math.ceil(value * 100 - 1e-6) / 100:.2f}"


def duration_text(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def metric_keys(results: Json) -> list[str]:
    """Metrics that the study asks for, then others that sites returned (per label)."""
    study = results["effective_study"]
    kind = study.get("task", {}).get("kind", "segmentation")
    wanted = study.get("evaluation", {}).get("metrics") or DEFAULT_METRICS[kind]
    found = {key for site in results["sites"].values() for key in site["metrics"]}
    wanted = [key for key in wanted if key != "reliability"]  # a curve
    return [*wanted, *sorted(found - set(wanted))]


def main_metric(results: Json) -> str:
    """The metric of the headline: the selecting one, or the study's first."""
    selecting, keys = results["select"]["metric"], metric_keys(results)
    return selecting if selecting in keys else keys[0]


def curve_metric(results: Json, main: str) -> str:
    """The headline metric if rounds hold it; costly ones are computed at the end only."""
    seen = [key for record in results["rounds"] for site in record["metrics"].values() for key in site]
    return main if main in seen or not seen else seen[0]
