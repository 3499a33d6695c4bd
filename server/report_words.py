# SPDX-License-Identifier: Apache-2.0
"""How the report writes names and numbers, and which metrics it speaks of."""

import math
from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "EXPLAINED",
    "PROTECTS_AGAINST",
    "Json",
    "curve_metric",
    "duration_text",
    "epsilon_text",
    "interval_text",
    "is_mm",
    "main_metric",
    "metric_keys",
    "metric_name",
    "number",
    "with_interval",
]

Json = Mapping[str, Any]
"""A part of ``results.json``."""

METRIC_NAMES: Final = {"dice": "Dice", "hd95": "HD95", "accuracy": "Accuracy", "auroc": "AUROC"}
EXPLAINED: Final = {
    "dice": "Dice: overlap of prediction and truth over a patient's whole volume, 0 to 1, higher is better",
    "hd95": "HD95: 95th percentile of the distance between the two outlines, in mm, lower is better",
    "accuracy": "Accuracy: share of patients whose class is right",
    "auroc": "AUROC: chance that a patient of a class is ranked above one of another class; 0.5 is guessing",
}


PROTECTS_AGAINST: Final = {
    "local": "everyone who sees the update or the model, the coordinator included",
    "distributed": "everyone who sees the model, and a coordinator that sees only the sum over the hospitals, alone or "
    "with up to privacy.tolerate of them; not a coordinator with more",
}
"""Against whom each private mode protects a patient."""


def metric_name(key: str) -> str:
    """``dice_anterior`` → "Dice, anterior"."""
    base, _, label = key.partition("_")
    return METRIC_NAMES.get(base, base) + (f", {label}" if label else "")


def is_mm(key: str) -> bool:
    """Whether a metric is a distance in mm, for which less is better."""
    return key.startswith("hd95")


def number(key: str, value: float) -> str:
    """``0.61``, or ``4.2 mm`` for a distance."""
    return f"{value:.1f} mm" if is_mm(key) else f"{value:.2f}"


def with_interval(key: str, estimate: Json | None) -> str:
    """``0.61 (0.55–0.67)``, or a dash where there is none."""
    if not estimate:
        return "–"
    return f"{number(key, estimate['mean'])} ({interval_text(key, estimate)})"


def interval_text(key: str, estimate: Json) -> str:
    """``0.55–0.67``: the 95 % interval of an estimate."""
    low, high = estimate["ci95"]
    return f"{low:.1f}–{high:.1f}" if is_mm(key) else f"{low:.2f}–{high:.2f}"


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
    classification = study.get("task", {}).get("kind") == "classification"
    wanted = study.get("evaluation", {}).get("metrics") or (
        ["accuracy", "auroc"] if classification else ["dice", "hd95"]
    )
    found = {key for site in results["sites"].values() for key in site["metrics"]}
    return [*wanted, *sorted(found - set(wanted))]


def main_metric(results: Json) -> str:
    """The metric of the headline: the selecting one, or the study's first."""
    selecting, keys = results["select"]["metric"], metric_keys(results)
    return selecting if selecting in keys else keys[0]


def curve_metric(results: Json, main: str) -> str:
    """The headline metric if rounds hold it; costly ones are computed at the end only."""
    seen = [key for record in results["rounds"] for site in record["metrics"].values() for key in site]
    return main if main in seen or not seen else seen[0]
