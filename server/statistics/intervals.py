# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals of a mean over patients, stratified by site.

The estimand is the mean over all patients of the strata given, each site keeping its number of patients: what
varies is which patients a site happened to see. Strata are resampled apart (Davison and Hinkley 1997, section 3.2).

Plain bootstrap intervals of a mean are too short for few patients: the resampled variance is (n - 1)/n of the
unbiased one, and a normal quantile stands where Student's belongs. Both are mended by asking for a larger level:

    level' = 2 Φ( t(1 - α/2; N - S) · √(N / (N - S)) ) - 1       for N patients at S sites

This is the expanded percentile interval of Hesterberg (2015), "What teachers should know about the bootstrap", The
American Statistician 69(4), section 5.3, extended to strata. BCa: Efron (1987), JASA 82(397). What it reaches is
measured by ``fedneuro-sim bench coverage``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = [
    "FEWEST",
    "LEVEL",
    "Interval",
    "Method",
    "estimate_json",
    "expanded_level",
    "finite",
    "mean_interval",
    "stratified_mean",
]

LEVEL: Final = 0.95
FEWEST: Final = 5
"""With fewer patients there is no interval: resamples of two or three values stay within their range, and look sure."""
Method = Literal["bca", "percentile"]
Values = NDArray[np.float64]

_MOST_ELEMENTS = 1 << 22  # resampled values held at a time: 32 MiB
_HIGHEST_LEVEL = 1 - 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over patients with its interval.

    ``low`` and ``high`` are None where no interval exists: fewer than :data:`FEWEST` patients, or one at every site.
    ``failed`` counts patients whose value is not a finite number; they have no part in the mean. ``method`` is what was
    computed: ``percentile`` where ``bca`` was asked for and does not exist, ``constant`` where all values are equal.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    failed: int = 0
    method: str = ""


def estimate_json(interval: Interval) -> dict[str, Any]:
    """An interval as it stands in results: ``ci95`` is null where there is none."""
    ends = None if interval.low is None or interval.high is None else [interval.low, interval.high]
    return {
        "mean": interval.mean, "ci95": ends, "n": interval.n, "failed": interval.failed, "method": interval.method,
    }  # fmt: skip


def finite(values: Sequence[float | None] | Values) -> tuple[Values, int]:
    """The finite ones of ``values``, and how many were not (None, NaN or infinite)."""
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    good = array[np.isfinite(array)]
    return good, len(array) - len(good)


def expanded_level(patients: int, sites: int, level: float = LEVEL) -> float:
    """The level to ask a bootstrap of a mean for, so that it holds ``level``; see the module's text.

    Example:
        >>> round(expanded_level(30, 1), 4), round(expanded_level(3000, 1), 4)
        (0.9625, 0.9501)
    """
    degrees = patients - sites
    quantile = stats.t.ppf(0.5 + level / 2, degrees) * math.sqrt(patients / degrees)
    return min(float(2 * stats.norm.cdf(quantile) - 1), _HIGHEST_LEVEL)


def stratified_mean(*strata: Values, axis: int = -1) -> Values:
    """Mean over all patients of the strata along ``axis``; their other axes agree."""
    total: Values = np.sum([np.sum(values, axis=axis) for values in strata], axis=0)
    mean: Values = total / sum(values.shape[axis] for values in strata)
    return mean


def mean_interval(
    strata: Sequence[Sequence[float | None] | Values],
    *,
    seed: int,
    resamples: int = 2000,
    method: Method = "bca",
    level: float = LEVEL,
) -> Interval:
    """Mean over patients and its stratified bootstrap interval.

    Args:
        strata: one sequence of values per site; None and NaN are counted as failed.
        seed: of the resampling, nothing else.
        resamples: at least 100.
        method: ``bca``, or ``percentile``; both at the expanded level.
        level: wanted coverage, in (0, 1).

    Raises:
        ValueError: no finite value at all.

    Example:
        >>> found = mean_interval([[0.7, 0.8, 0.9, None], [0.5, 0.6]], seed=0)
        >>> found.n, found.failed, round(found.mean, 3)
        (5, 1, 0.7)
    """
    cleaned = [finite(values) for values in strata]
    samples = [values for values, _ in cleaned if len(values)]
    failed = sum(count for _, count in cleaned)
    n = sum(len(values) for values in samples)
    if not n:
        raise ValueError("an interval needs at least one patient with a finite value")
    mean = float(stratified_mean(*samples))
    drawn = [values for values in samples if len(values) > 1]
    if not drawn:
        return Interval(mean=mean, low=None, high=None, n=n, failed=failed, method="none")
    if all(np.ptp(values) == 0 for values in drawn):
        return Interval(mean=mean, low=mean, high=mean, n=n, failed=failed, method="constant")
    if n < FEWEST:
        return Interval(mean=mean, low=None, high=None, n=n, failed=failed, method="none")
    wanted = expanded_level(n, len(samples), level)
    low, high, used = bootstrap_means(samples, level=wanted, resamples=resamples, method=method, seed=seed)
    return Interval(mean=mean, low=float(low), high=float(high), n=n, failed=failed, method=used)


def bootstrap_means(
    samples: Sequence[Values], *, level: float, resamples: int, method: Method, seed: int
) -> tuple[Any, Any, str]:
    """Ends of the interval of the stratified mean, along the last axis, and the method that was used.

    Args:
        samples: finite values ``(…, patients)`` per site; leading axes are separate problems.
        level: as SciPy takes it.
        resamples: number of resamples.
        method: ``bca`` falls back to ``percentile`` where SciPy finds no BCa interval.
        seed: of the resampling.
    """
    # A single patient of a site is drawn each time; SciPy wants two of a sample, so it is added afterwards.
    alone = [values for values in samples if values.shape[-1] == 1]
    several = [values for values in samples if values.shape[-1] > 1]
    fixed: Any = np.sum([values[..., 0] for values in alone], axis=0) if alone else 0.0
    count = sum(values.shape[-1] for values in samples)

    def statistic(*drawn: Values, axis: int = -1) -> Values:
        # Divided by what was drawn: SciPy's jackknife leaves one patient out.
        size = sum(values.shape[axis] for values in drawn) + len(alone)
        total: Values = np.sum([np.sum(values, axis=axis) for values in drawn], axis=0)
        beside = fixed[..., None] if np.ndim(fixed) and total.ndim > np.ndim(fixed) else fixed
        mean: Values = (total + beside) / size
        return mean

    def run(name: str) -> tuple[Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of degenerate distributions, which are looked at below
            found = stats.bootstrap(
                several, statistic, n_resamples=resamples, vectorized=True, axis=-1, confidence_level=level,
                method=name, rng=np.random.default_rng(seed),
                batch=max(1, _MOST_ELEMENTS // max(count * int(np.prod(samples[0].shape[:-1])), 1)),
            ).confidence_interval  # fmt: skip
        return found.low, found.high

    if method == "percentile":
        return (*run("percentile"), "percentile")
    low, high = run("BCa")
    if np.all(np.isfinite(low)) and np.all(np.isfinite(high)):
        return low, high, "bca"
    plain_low, plain_high = run("percentile")
    good = np.isfinite(low) & np.isfinite(high)
    return np.where(good, low, plain_low), np.where(good, high, plain_high), "bca" if np.any(good) else "percentile"
