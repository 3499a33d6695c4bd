# SPDX-License-Identifier: Apache-2.0
"""Outcomes of a cohort: the concordance of predicted and observed survival, and the error of a predicted number.

References: Harrell et al. 1982 (concordance index); Harrell et al. 1996 (ties).
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval, perfect_ends

__all__ = ["c_index", "c_index_interval", "mean_absolute_error", "pairs_apart", "root_mean_squared_error"]

_BLOCK: Final = 256  # patients whose pairs are held at a time
_MIN_DEFINED: Final = 0.5  # share of resamples in which the index must be defined

Floats = NDArray[np.floating]


def c_index(risk: Floats, time: Floats, event: NDArray[np.generic]) -> float | None:
    """Harrell's concordance index: of two patients, does the one with the higher risk have the event first?

    A pair counts where one patient is known to have had the event before the other: the earlier time is an event, or
    both times are equal and only one is an event (the other was free of it then). Equal risks count one half.

    Args:
        risk: ``(N,)``, higher is worse, any scale.
        time: ``(N,)``, until the event or the end of observation, any unit.
        event: ``(N,)``, true where the event was seen, false where observation ended without it.

    Returns:
        In [0, 1], 0.5 is guessing; None where no pair counts.
    """
    concordant, pairs = _weighted(risk, time, event, np.ones((1, len(time))))
    return float(concordant[0] / pairs[0]) if pairs[0] else None


def c_index_interval(
    risk: Floats, time: Floats, event: NDArray[np.generic], *, resamples: int, seed: int
) -> Interval | None:
    """:func:`c_index` and its 95 % percentile-bootstrap interval over patients.

    A patient who is drawn k times is k patients, who make no pair among themselves. All resamples are one matrix
    product: N² × ``resamples`` multiplications, with ``resamples`` × N numbers in memory.

    Returns:
        As :func:`.intervals.bootstrap`: None where the index is undefined for the cohort, or in half of the resamples.
    """
    value = c_index(risk, time, event)
    if value is None:
        return None
    n, rng = len(time), np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(0, n, size=n), minlength=n) for _ in range(resamples)])
    concordant, pairs = _weighted(risk, time, event, counts.astype(np.float64))
    defined = concordant[pairs > 0] / pairs[pairs > 0]
    if len(defined) <= _MIN_DEFINED * resamples:
        return None
    low, high = perfect_ends(value, pairs_apart(time, event)) or np.quantile(defined, [0.025, 0.975])
    return value, float(low), float(high)


def pairs_apart(time: Floats, event: NDArray[np.generic]) -> int:
    """How many pairs that count can be made of the patients, each in one pair at most.

    Example:
        >>> pairs_apart(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, True, False, False]))
        2
    """
    # From the last on: whoever had the event takes one of those who outlived it. Of equal times, those without the
    # event come last, and events at the same time make no pair.
    seen = np.asarray(event).astype(np.bool_)
    free = pairs = waiting = 0
    last: float | None = None
    for k in np.lexsort((~seen, time))[::-1]:
        if time[k] != last:
            free, waiting, last = free + waiting, 0, float(time[k])
        if not seen[k]:
            free += 1
        elif free:
            free, pairs = free - 1, pairs + 1
        else:
            waiting += 1
    return pairs


def _weighted(
    risk: Floats, time: Floats, event: NDArray[np.generic], counts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Concordant pairs and pairs, ``(R,)`` each, where patient i is there ``counts[r, i]`` times."""
    seen = np.asarray(event).astype(np.bool_)
    concordant, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    firsts = np.flatnonzero(seen)
    for start in range(0, len(firsts), _BLOCK):
        first = firsts[start : start + _BLOCK]
        later = (time > time[first, None]) | ((time == time[first, None]) & ~seen)  # (block, N)
        right = (risk < risk[first, None]) + 0.5 * (risk == risk[first, None])
        pairs += (counts[:, first] * (counts @ later.T.astype(np.float64))).sum(1)
        concordant += (counts[:, first] * (counts @ (later * right).T)).sum(1)
    return concordant, pairs


def mean_absolute_error(predicted: Floats, observed: Floats) -> float | None:
    """Mean of |predicted - observed| over patients, in the unit of the outcome; None for no patient.

    Args:
        predicted: ``(N,)``.
        observed: ``(N,)``.
    """
    return float(np.mean(np.abs(predicted - observed))) if len(observed) else None


def root_mean_squared_error(predicted: Floats, observed: Floats) -> float | None:
    """Root of the mean of (predicted - observed)² over patients, in the unit of the outcome; None for no patient.

    Args:
        predicted: ``(N,)``.
        observed: ``(N,)``.
    """
    return float(np.sqrt(np.mean((predicted - observed) ** 2))) if len(observed) else None
