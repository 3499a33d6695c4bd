# SPDX-License-Identifier: Apache-2.0
"""How well a cohort's classes are told apart, from one probability row per patient.

With two classes the second is the positive one. With more, a metric of one class is taken of each class against the
rest, and the mean is over the classes that are present.

References: Hanley & McNeil 1982 (AUROC); Davis & Goadrich 2006 (AUPRC); Youden 1950.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRID", "accuracy", "auprc", "auroc", "sensitivity", "specificity", "youden_threshold"]

GRID: Final = tuple(round(0.01 * step, 2) for step in range(1, 100))
"""Thresholds that can be chosen: a coarse grid, so that a threshold is not one patient's probability."""

Probabilities = NDArray[np.floating]
Targets = NDArray[np.integer]


def accuracy(probabilities: Probabilities, targets: Targets) -> float | None:
    """Share of patients whose most probable class is the true one; None for no patient.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.
    """
    if len(targets) == 0:
        return None
    return float(np.mean(probabilities.argmax(axis=1) == targets))


def auroc(probabilities: Probabilities, targets: Targets) -> float | None:
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


def auprc(probabilities: Probabilities, targets: Targets) -> float | None:
    """Area under the precision-recall curve as average precision, Σ (R_n - R_{n-1}) P_n, without interpolation.

    A model that knows nothing has the share of positives, not one half. None where fewer than two classes are present.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.
    """
    return _over_classes(
        probabilities, targets, lambda label: _average_precision(probabilities[:, label], targets == label)
    )


def sensitivity(probabilities: Probabilities, targets: Targets, threshold: float = 0.5) -> float | None:
    """Share of the patients of a class who are recognised.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.
        threshold: two classes: probability of the second from which on a patient is called positive; to be fixed on
            other patients than these (:func:`youden_threshold`). More classes: unused; the most probable one is called.

    Returns:
        In [0, 1]; with more than two classes the mean over classes (balanced accuracy). None where fewer than two
        classes are present.
    """
    called = _called(probabilities, threshold)
    return _over_classes(probabilities, targets, lambda label: float(np.mean(called[targets == label] == label)))


def specificity(probabilities: Probabilities, targets: Targets, threshold: float = 0.5) -> float | None:
    """Share of the patients who are not of a class, and are not called so; as :func:`sensitivity` otherwise."""
    called = _called(probabilities, threshold)
    return _over_classes(probabilities, targets, lambda label: float(np.mean(called[targets != label] != label)))


def youden_threshold(probabilities: Probabilities, targets: Targets) -> float | None:
    """The threshold of :data:`GRID` with the largest sensitivity + specificity; the middle one of several.

    Args:
        probabilities: ``(N, 2)``, one row per patient.
        targets: ``(N,)``, 0 or 1.

    Returns:
        None for another number of classes, or where only one is present.
    """
    if probabilities.shape[1] != 2 or len(np.unique(targets)) < 2:
        return None
    score, positive = probabilities[:, 1], targets == 1
    grid = np.array(GRID)[:, None]
    gain = (score[positive] >= grid).mean(axis=1) + (score[~positive] < grid).mean(axis=1)
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    return GRID[int(best[len(best) // 2])]


def _called(probabilities: Probabilities, threshold: float) -> NDArray[np.intp]:
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.intp)
    called: NDArray[np.intp] = probabilities.argmax(axis=1)
    return called


def _over_classes(probabilities: Probabilities, targets: Targets, of_class: Callable[[int], float]) -> float | None:
    """A metric of the positive class of two, or its mean over the classes that are present of more."""
    present = np.unique(targets)
    if len(present) < 2:
        return None
    if probabilities.shape[1] == 2:
        return of_class(1)
    return float(np.mean([of_class(int(label)) for label in present]))


def _average_precision(score: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.diff(score[order]) != 0, True)  # equal scores are called together
    hits, called = hits[last], np.flatnonzero(last) + 1
    gained = np.diff(hits, prepend=0)
    return float(np.sum(gained * hits / called) / hits[-1])


def _ranks(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1; equal scores share their mean rank."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: NDArray[np.float64] = last - (counts - 1) / 2
    return mean_rank[inverse]
