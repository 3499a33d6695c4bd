# SPDX-License-Identifier: Apache-2.0
"""Whether a probability means what it says: of the patients who are told 70 %, about 70 % should be positive.

With two classes the probability of the second is judged; with more, the probability of the most probable class
(top-label calibration). Bins are of equal width, [0, 1/b), [1/b, 2/b), …, the last one closed.

References: Brier 1950; Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599; Wilson 1927 (interval of a share).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bin", "brier", "ece", "reliability"]

Z95: Final = 1.959963984540054

Probabilities = NDArray[np.floating]
Targets = NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The patients whose probability lies in one bin.

    Attributes:
        number: of the bin, from 1.
        predicted: mean probability.
        observed: share of them who are positive, or whose class is right.
        low: lower end of the 95 % interval of ``observed`` (Wilson).
        high: its upper end.
        n: patients, at least 1.
    """

    number: int
    predicted: float
    observed: float
    low: float
    high: float
    n: int


def brier(probabilities: Probabilities, targets: Targets) -> float | None:
    """Mean squared error of the probabilities; None for no patient.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.

    Returns:
        Two classes: mean of (p - y)² of the second, in [0, 1]. More: mean of Σ_k (p_k - y_k)², in [0, 2].
    """
    if len(targets) == 0:
        return None
    if probabilities.shape[1] == 2:
        return float(np.mean((probabilities[:, 1] - (targets == 1)) ** 2))
    truth = np.eye(probabilities.shape[1])[targets]
    return float(np.mean(((probabilities - truth) ** 2).sum(axis=1)))


def ece(probabilities: Probabilities, targets: Targets, bins: int) -> float | None:
    """Expected calibration error: mean over patients of |predicted - observed| of their bin. None for no patient.

    It falls with fewer bins and rises with fewer patients, so the number of bins belongs to the value.

    Args:
        probabilities: ``(N, K)``, one row per patient.
        targets: ``(N,)``, true classes in 0 … K-1.
        bins: of equal width, at least 1.
    """
    if len(targets) == 0:
        return None
    judged, right, place = _judged(probabilities, targets, bins)
    gaps = np.bincount(place, judged, bins) - np.bincount(place, right, bins)
    return float(np.abs(gaps).sum() / len(targets))


def reliability(probabilities: Probabilities, targets: Targets, bins: int) -> list[Bin]:
    """The reliability curve: one :class:`Bin` for each bin that holds a patient. Arguments as for :func:`ece`."""
    judged, right, place = _judged(probabilities, targets, bins)
    curve = []
    for number in np.unique(place):
        inside = place == number
        n, hits = int(inside.sum()), float(right[inside].sum())
        low, high = _wilson(hits, n)
        curve.append(
            Bin(
                number=int(number) + 1,
                predicted=float(judged[inside].mean()),
                observed=hits / n,
                low=low,
                high=high,
                n=n,
            )
        )
    return curve


def _judged(
    probabilities: Probabilities, targets: Targets, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """The probability that is judged, 1 or 0 for what came true, and the bin, for each patient."""
    if probabilities.shape[1] == 2:
        judged, right = probabilities[:, 1], targets == 1
    else:
        judged, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, judged, side="right") - 1, 0, bins - 1)
    return judged.astype(np.float64), right.astype(np.float64), place


def _wilson(hits: float, n: int) -> tuple[float, float]:
    share, z = hits / n, Z95
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
