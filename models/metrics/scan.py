# SPDX-License-Identifier: Apache-2.0
"""Every segmentation metric that a study asks for, of one scan; and what a scan scores on which inference failed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lesions import LesionRule, find_lesions, lesion_scores
from .overlap import dice, volume_difference
from .surfaces import diagonal, hausdorff95, surface_dice

__all__ = ["ScanRules", "failed_scores", "scan_scores"]

IN_MM = frozenset({"nsd", "hd95", "volume_difference", "lesion_hd95"})
WORST_IS_ZERO = frozenset({"dice", "nsd", "lesion_f1", "lesion_sensitivity", "lesion_dice"})
LESIONS = frozenset(
    {"lesion_f1", "lesion_sensitivity", "false_positives", "lesion_count_difference", "lesion_dice", "lesion_hd95"}
)

LabelMap = NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanRules:
    """What a study fixes of its metrics.

    Attributes:
        labels: names of the values 1, 2, …
        tolerance: of ``nsd``, in mm.
        lesions: what counts as a lesion, and as found.
        cuts: two volumes in ml that part small, medium and large lesions.
    """

    labels: tuple[str, ...]
    tolerance: float
    lesions: LesionRule
    cuts: tuple[float, ...]


def scan_scores(
    prediction: LabelMap, reference: LabelMap, spacing: Sequence[float] | None, names: Iterable[str], rules: ScanRules
) -> dict[str, float]:
    """The metrics ``names`` of one scan; those that are undefined are left out.

    Args:
        prediction: label per voxel of the whole volume, three axes; 0 is background.
        reference: the truth, same shape.
        spacing: voxel spacing in mm, one number per axis; None: unknown, and metrics in mm or ml are undefined.
        names: out of :data:`~fedneuro.models.metrics.METRICS`.
        rules: what the study fixes.

    Returns:
        By name, as the study gives it, and with several labels also ``<name>_<label>``.
    """
    labels, wanted = rules.labels, [name for name in names if spacing is not None or name not in IN_MM]
    found: dict[str, float] = {}
    for name in wanted:
        if name == "dice":
            found |= dice(prediction, reference, labels)
        elif spacing is None:
            continue
        elif name == "nsd":
            found |= surface_dice(prediction, reference, labels, spacing, rules.tolerance)
        elif name == "hd95":
            found |= hausdorff95(prediction, reference, labels, spacing)
        elif name == "volume_difference":
            found |= volume_difference(prediction, reference, labels, spacing)
    if lesions := [name for name in wanted if name in LESIONS]:
        found |= _lesion_scores(prediction, reference, spacing, lesions, rules)
    return found


def failed_scores(
    reference: LabelMap, spacing: Sequence[float] | None, names: Iterable[str], rules: ScanRules
) -> dict[str, float]:
    """What a scan scores on which inference failed: it is never left out of a mean.

    The worst value where there is one (0 of a score, the diagonal of the image for ``hd95``), else what a prediction
    without any voxel would have; ``false_positives`` has neither, and is left out.
    """
    names = [name for name in names if name != "false_positives"]
    found = scan_scores(np.zeros_like(reference), reference, spacing, names, rules)
    for name in found:
        metric = next((m for m in sorted(names, key=len, reverse=True) if name.startswith(m)), name)
        if metric in WORST_IS_ZERO:
            found[name] = 0.0
        elif metric == "hd95" and spacing is not None:
            found[name] = diagonal(reference.shape, spacing)
    return found


def _lesion_scores(
    prediction: LabelMap,
    reference: LabelMap,
    spacing: Sequence[float] | None,
    names: Sequence[str],
    rules: ScanRules,
) -> dict[str, float]:
    """Mean over the labels for which a metric is defined; with several labels also each."""
    by_label = [
        lesion_scores(
            find_lesions(
                prediction == value, reference == value, spacing, rules.lesions, distances="lesion_hd95" in names
            ),
            names,
            rules.cuts,
        )
        for value in range(1, len(rules.labels) + 1)
    ]
    found = {
        name: float(np.mean([scores[name] for scores in by_label if name in scores]))
        for name in dict.fromkeys(name for scores in by_label for name in scores)
    }
    if len(rules.labels) > 1:
        for label, scores in zip(rules.labels, by_label, strict=True):
            # The names by size are told over all labels only.
            found |= {f"{name}_{label}": value for name, value in scores.items() if ":" not in name}
    return found
