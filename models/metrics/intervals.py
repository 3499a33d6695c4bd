# SPDX-License-Identifier: Apache-2.0
"""95 % percentile-bootstrap intervals of statistics of a cohort; the patient is the resampling unit (Efron 1979).

Means over patients have better ones: :mod:`.means`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap", "perfect_ends"]

Interval = tuple[float, float, float]
"""Value, lower and upper end of its 95 % interval."""

_MIN_DEFINED = 0.5  # share of resamples in which a statistic must be defined


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


def _percentiles(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return value, float(low), float(high)


def perfect_ends(value: float, apart: float, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of an AUROC or concordance index of exactly 1 (or 0); no resample knows that it could be less.

    Among the pairs there are ``apart`` that share no patient, so they are independent, and all are in order with
    probability index^apart at most. What would make that rarer than α = (1 - level) / 2 is excluded: from α^(1/apart)
    on. It holds for every distribution, and is as wide as that makes it.

    Args:
        value: the index.
        apart: pairs without a patient in common; of an AUROC the patients of the rarer class.
        level: of the interval.

    Returns:
        None where the value is not 0 or 1.

    Example:
        >>> [round(end, 3) for end in perfect_ends(1.0, 10) or ()]
        [0.692, 1.0]
    """
    if value not in (0.0, 1.0) or apart <= 0:
        return None
    bound = ((1 - level) / 2) ** (1 / apart)
    return (bound, 1.0) if value else (0.0, 1 - bound)
