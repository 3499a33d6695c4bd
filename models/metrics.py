# SPDX-License-Identifier: Apache-2.0
"""Metrics, always over patients.

Segmentation: Dice and the 95th-percentile Hausdorff distance of one patient's whole volume, never of a slice.
Classification: accuracy and AUROC of a cohort, one probability row per patient. Intervals are percentile
bootstraps whose resampling unit is the patient.

Empty masks have an explicit rule, because they occur (a treated lesion, a network that finds nothing):

============================  =====  ===========================
prediction, reference         Dice   HD95
============================  =====  ===========================
both empty                    1      0 mm
exactly one empty             0      the diagonal of the image
============================  =====  ===========================

References: Maier-Hein et al. 2024, Metrics reloaded, https://doi.org/10.1038/s41592-023-02151-z; Efron 1979.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "METRICS",
    "Interval",
    "accuracy",
    "auroc",
    "bootstrap",
    "bootstrap_interval",
    "dice",
    "hausdorff95",
    "higher_is_better",
]

higher_is_better: Mapping[str, bool] = {"dice": True, "hd95": False, "accuracy": True, "auroc": True}
"""Direction of each metric, by the name that a study gives."""

METRICS: tuple[str, ...] = tuple(higher_is_better)
"""Names of the metrics."""

Interval = tuple[float, float, float]
"""Value, lower and upper end of its 95 % interval."""

_CHUNK = 1 << 20  # resampled indices held at a time: 8 MiB
_MIN_DEFINED = 0.5  # share of resamples in which a statistic must be defined


def dice(prediction: NDArray[np.generic], reference: NDArray[np.generic], labels: Sequence[str]) -> dict[str, float]:
    """Dice coefficient of one patient: 2|P ∩ R| / (|P| + |R|).

    Args:
        prediction: label per voxel of the whole volume, any shape; 0 is background.
        reference: the truth, same shape.
        labels: names of the values 1, 2, …

    Returns:
        ``dice``, the mean over labels, in [0, 1]; with several labels also ``dice_<label>``.
    """
    _same_shape(prediction, reference)
    scores = []
    for value in range(1, len(labels) + 1):
        mine, truth = prediction == value, reference == value
        total = int(np.count_nonzero(mine)) + int(np.count_nonzero(truth))
        scores.append(2.0 * int(np.count_nonzero(mine & truth)) / total if total else 1.0)
    return _named("dice", scores, labels)


def hausdorff95(
    prediction: NDArray[np.generic],
    reference: NDArray[np.generic],
    labels: Sequence[str],
    spacing: Sequence[float],
) -> dict[str, float]:
    """95th-percentile symmetric Hausdorff distance between the surfaces of one patient's masks.

    Args:
        prediction: label per voxel of the whole volume ``(*spatial)``; 0 is background.
        reference: the truth, same shape.
        labels: names of the values 1, 2, …
        spacing: voxel spacing in mm, one number per axis.

    Returns:
        ``hd95`` in mm, the mean over labels; with several labels also ``hd95_<label>``.
    """
    _same_shape(prediction, reference)
    if len(spacing) != prediction.ndim:
        raise ValueError(f"spacing has {len(spacing)} numbers for an image of {prediction.ndim} axes")
    distances = [_hausdorff95(prediction == value, reference == value, spacing) for value in range(1, len(labels) + 1)]
    return _named("hd95", distances, labels)


def accuracy(probabilities: NDArray[np.floating], targets: NDArray[np.integer]) -> float | None:
    """Share of patients whose most probable class is the true one; None for no patient.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.
    """
    if len(targets) == 0:
        return None
    return float(np.mean(probabilities.argmax(axis=1) == targets))


def auroc(probabilities: NDArray[np.floating], targets: NDArray[np.integer]) -> float | None:
    """Area under the ROC curve, one class against the rest, mean over the classes that are present.

    Ties count one half (Mann-Whitney). None where fewer than two classes are present.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.
    """
    present = np.unique(targets)
    if len(present) < 2:
        return None
    areas = []
    for label in present:
        positive = targets == label
        n_positive = int(positive.sum())
        n_negative = len(targets) - n_positive
        rank_sum = _ranks(probabilities[:, label])[positive].sum()
        areas.append((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
    return float(np.mean(areas))


def bootstrap_interval(values: NDArray[np.floating], *, resamples: int, seed: int) -> Interval:
    """Mean over patients and its 95 % percentile-bootstrap interval.

    Args:
        values: ``(N,)``, one finite number per patient, N at least 1.
        resamples: bootstrap resamples, at least 1.
        seed: seed of the resampling; the same seed gives the same interval.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a bootstrap interval needs at least one patient")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = values[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    return _percentiles(float(values.mean()), means)


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float | None], n: int, *, resamples: int, seed: int
) -> Interval | None:
    """A cohort statistic and its 95 % percentile-bootstrap interval over patients.

    Args:
        statistic: from the row numbers of the chosen patients ``(n,)`` to the statistic, or None where undefined.
        n: patients, at least 1.
        resamples: bootstrap resamples, at least 1.
        seed: seed of the resampling.

    Returns:
        The interval, over the resamples in which the statistic is defined; None where it is undefined for the
        cohort itself or in half of the resamples or more.
    """
    value = statistic(np.arange(n)) if n else None
    if value is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, n, size=n)) for _ in range(resamples)]
    defined = np.array([x for x in drawn if x is not None])
    if len(defined) <= _MIN_DEFINED * resamples:
        return None
    return _percentiles(value, defined)


def _hausdorff95(mine: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    some, other = bool(mine.any()), bool(truth.any())
    if some != other:
        return math.sqrt(sum((side * mm) ** 2 for side, mm in zip(mine.shape, spacing, strict=True)))
    if not some:
        return 0.0
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    box = _bounding_box(mine | truth)
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 pass an argument to themselves that they have deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        found = compute_hausdorff_distance(
            np.ascontiguousarray(mine[box])[None, None],
            np.ascontiguousarray(truth[box])[None, None],
            include_background=True,
            percentile=95,
            spacing=[float(mm) for mm in spacing],
        )
    return float(found.item())


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box around ``mask``, one voxel wider where the image allows.

    The margin keeps the surfaces, and so the distances, exactly those of the whole image.
    """
    box = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(int(inside[0]) - 1, 0), int(inside[-1]) + 2))
    return tuple(box)


def _ranks(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1; equal scores share their mean rank."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: NDArray[np.float64] = last - (counts - 1) / 2
    return mean_rank[inverse]


def _percentiles(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return value, float(low), float(high)


def _named(metric: str, values: Sequence[float], labels: Sequence[str]) -> dict[str, float]:
    named = {metric: float(np.mean(values))}
    if len(labels) > 1:
        named |= {f"{metric}_{label}": float(value) for label, value in zip(labels, values, strict=True)}
    return named


def _same_shape(prediction: NDArray[np.generic], reference: NDArray[np.generic]) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
