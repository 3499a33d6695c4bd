# SPDX-License-Identifier: Apache-2.0
"""95 % percentile-bootstrap intervals of statistics of a cohort; the patient is the resampling unit (Efron 1979).

Means over patients have better ones: :mod:`.means`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap"]

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
