# SPDX-License-Identifier: Apache-2.0
"""Seconds of each metric of one volume, beside MONAI and torchmetrics for the same metric, in one process, in turn.

The volume has the size of a BraTS scan, 240 x 240 x 155 voxels of 1 mm, with a tumour-like lesion and some small ones,
and a prediction that overlaps most of it. Every arm starts from the two label maps as inference leaves them (int64) and
ends with a number; each does what its documentation says to do for one label. Cohort metrics are of 2,000 patients.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...models import metrics as m

__all__ = ["bench_metrics"]

SHAPE = (240, 240, 155)
SPACING = (1.0, 1.0, 1.0)
TOLERANCE = 2.0
LABELS = ("lesion",)

Arms = Mapping[str, Callable[[], float]]


def bench_metrics(
    json_path: Path | None = None, *, shape: tuple[int, int, int] = SHAPE, repeats: int = 5, patients: int = 2000
) -> dict[str, Any]:
    """Time every arm ``repeats`` times, alternating, and return (and save) medians, ratios and the values found.

    Args:
        json_path: where to save the figures.
        shape: of the volume, in voxels.
        repeats: timed calls of each arm, after one that warms up.
        patients: of the cohort.
    """
    warnings.filterwarnings("ignore", module="monai")
    warnings.filterwarnings("ignore", module="torchmetrics")
    prediction, reference = _volumes(shape)
    rows = {name: _row(arms, repeats) for name, arms in _of_a_volume(prediction, reference).items()}
    rows |= {name: _row(arms, repeats) for name, arms in _of_a_cohort(patients).items()}
    ratios = [row["over_fastest_other"] for row in rows.values() if row["over_fastest_other"] is not None]
    found = {
        "voxels": list(shape),
        "patients": patients,
        "repeats": repeats,
        "metrics": rows,
        "largest_ratio": max(ratios),
    }
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _row(arms: Arms, repeats: int) -> dict[str, Any]:
    values = {name: arm() for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    middle = {name: median(times) for name, times in seconds.items()}
    others = [middle[name] for name in arms if name != "fedneuro"]
    return {
        "seconds": {name: round(value, 5) for name, value in middle.items()},
        "values": {name: round(value, 6) for name, value in values.items()},
        "over_fastest_other": round(middle["fedneuro"] / min(others), 3) if others else None,
    }


def _volumes(shape: tuple[int, int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A large lesion seen a little off, small ones of which some are missed, and one that is not there."""
    rng = np.random.default_rng(0)
    reference, prediction = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    _ball(reference, [0.4, 0.45, 0.5], 0.13)
    _ball(prediction, [0.42, 0.46, 0.51], 0.125)
    for number in range(8):
        centre = rng.uniform(0.15, 0.85, 3)
        if number < 7:
            _ball(reference, centre, 0.02)
        if number > 1:
            _ball(prediction, centre + 0.005, 0.02)
    return prediction, reference


def _ball(image: NDArray[np.int64], centre: Any, radius: float) -> None:
    sides = np.array(image.shape)
    low = np.maximum(0, ((np.asarray(centre) - radius) * sides).astype(int))
    high = np.minimum(sides, ((np.asarray(centre) + radius) * sides).astype(int) + 1)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    places = np.meshgrid(*(np.arange(a, b) / s for a, b, s in zip(low, high, sides, strict=True)), indexing="ij")
    inside = sum(((place - c) / radius) ** 2 for place, c in zip(places, centre, strict=True)) < 1
    image[box][inside] = 1


def _of_a_volume(prediction: NDArray[np.int64], reference: NDArray[np.int64]) -> dict[str, Arms]:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import DiceMetric
    from monai.metrics.surface_dice import compute_surface_dice
    from torchmetrics.functional.segmentation import dice_score

    theirs = torch.from_numpy(prediction), torch.from_numpy(reference)

    def masks() -> tuple[torch.Tensor, torch.Tensor]:
        return (theirs[0] == 1)[None, None], (theirs[1] == 1)[None, None]

    def monai_dice() -> float:
        scores = DiceMetric(include_background=False, num_classes=2)(theirs[0][None, None], theirs[1][None, None])
        return float(torch.as_tensor(scores).item())

    def torchmetrics_dice() -> float:
        pair = theirs[0][None], theirs[1][None]
        return float(dice_score(*pair, num_classes=2, include_background=False, input_format="index").item())

    def monai_hd95() -> float:
        found = compute_hausdorff_distance(*masks(), include_background=True, percentile=95, spacing=list(SPACING))
        return float(found.item())

    def monai_nsd() -> float:
        found = compute_surface_dice(*masks(), [TOLERANCE], include_background=True, spacing=list(SPACING))
        return float(found.item())

    def lesions(rule: str, name: str) -> Callable[[], float]:
        rules = m.ScanRules(labels=LABELS, tolerance=TOLERANCE, lesions=m.LESION_RULES[rule], cuts=(0.1, 1.0))
        return lambda: m.scan_scores(prediction, reference, SPACING, (name,), rules)[name]

    return {
        "dice": {
            "fedneuro": lambda: m.dice(prediction, reference, LABELS)["dice"],
            "monai": monai_dice,
            "torchmetrics": torchmetrics_dice,
        },
        "hd95": {
            "fedneuro": lambda: m.hausdorff95(prediction, reference, LABELS, SPACING)["hd95"],
            "monai": monai_hd95,
        },
        "nsd": {
            "fedneuro": lambda: m.surface_dice(prediction, reference, LABELS, SPACING, TOLERANCE)["nsd"],
            "monai": monai_nsd,
        },
        "volume_difference": {
            "fedneuro": lambda: m.volume_difference(prediction, reference, LABELS, SPACING)["volume_difference"]
        },
        "lesion_f1, isles-2022": {"fedneuro": lesions("isles-2022", "lesion_f1")},
        "lesion_dice, brats-2023-gli": {"fedneuro": lesions("brats-2023-gli", "lesion_dice")},
        "lesion_hd95, brats-2023-gli": {"fedneuro": lesions("brats-2023-gli", "lesion_hd95")},
    }


def _of_a_cohort(patients: int) -> dict[str, Arms]:
    from monai.metrics.average_precision import compute_average_precision
    from monai.metrics.rocauc import compute_roc_auc
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_calibration_error

    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, patients)
    score = np.clip(rng.normal(0.4 + 0.2 * targets, 0.2), 0, 1)
    rows = np.stack([1 - score, score], axis=1)
    theirs, classes = torch.from_numpy(score), torch.from_numpy(targets)
    return {
        "auroc": {
            "fedneuro": lambda: m.auroc(rows, targets) or 0.0,
            "monai": lambda: float(np.asarray(compute_roc_auc(theirs, classes))),
            "torchmetrics": lambda: binary_auroc(theirs, classes).item(),
        },
        "auprc": {
            "fedneuro": lambda: m.auprc(rows, targets) or 0.0,
            "monai": lambda: float(np.asarray(compute_average_precision(theirs, classes))),
            "torchmetrics": lambda: binary_average_precision(theirs, classes).item(),
        },
        "ece": {
            "fedneuro": lambda: m.ece(rows, targets, 10) or 0.0,
            "torchmetrics": lambda: binary_calibration_error(theirs, classes, n_bins=10, norm="l1").item(),
        },
    }
