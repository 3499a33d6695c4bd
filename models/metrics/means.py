# SPDX-License-Identifier: Apache-2.0
"""95 % intervals of a mean over patients, stratified by site.

The estimand is the mean over all patients of the strata given, each site keeping its number of patients: what
varies is which patients a site happened to see. Strata are resampled apart (Davison and Hinkley 1997, section 3.2).

**Values with known ends** (Dice, a right or wrong class: 0 to 1) have the interval ``bounded``. A bootstrap knows only
the values that it has seen: where 8 % of patients fail, one cohort of 30 in twelve holds no failure, and its interval
lies above the truth. So half a patient who was not seen is added at either end of the scale, as Jeffreys' interval of
a proportion does:

    mean* = π₀·worst + π₁·best + (1 - π₀ - π₁) · Σ_s (n_s / N) m*_s,    (π₀, π₁, ·) ~ Dirichlet(½, ½, N)

m*_s is the Bayesian bootstrap of site s (Rubin 1981: weights ~ Dirichlet(1, …, 1)), its spread widened by
√((n_s + 1) / (n_s - 1)) to that of the unbiased variance. The interval holds the middle 95 % of mean*, and never less
than the middle 90 % without the unseen. For one site of values 0 and 1 it is Jeffreys' interval (Brown, Cai and
DasGupta 2001); a whole patient at the worse end would be Gaffke's bound (2005; Learned-Miller and Thomas 2019), which
holds for all distributions and is wider.

**Others** (distances, volumes, differences) have the interval ``bca``, or ``percentile``. Plain bootstrap intervals of
a mean are too short for few patients: the resampled variance is (n - 1)/n of the unbiased one, and a normal quantile
stands where Student's belongs. Both are mended by asking for a larger level:

    level' = 2 Φ( t(1 - α/2; N - S) · √(N / (N - S)) ) - 1       for N patients at S sites

This is the expanded percentile interval of Hesterberg (2015), "What teachers should know about the bootstrap", The
American Statistician 69(4), section 5.3, extended to strata. BCa: Efron (1987), JASA 82(397). What all of them reach is
measured by ``fedneuro-sim bench coverage``.

References: Rubin (1981), Annals of Statistics 9(1); Brown, Cai and DasGupta (2001), Statistical Science 16(2); Gaffke
(2005), Mathematical Methods of Statistics 14(4); Learned-Miller and Thomas (2019), https://arxiv.org/abs/1905.06208.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEWEST",
    "LEVEL",
    "Interval",
    "Method",
    "bootstrap_means",
    "bounded_ends",
    "expanded_level",
    "finite",
    "mean_interval",
    "stratified_mean",
]

LEVEL: Final = 0.95
FEWEST: Final = 5
"""With fewer patients there is no interval: resamples of two or three values stay within their range, and look sure."""
Method = Literal["bounded", "bca", "percentile"]
Values = NDArray[np.float64]
UNSEEN: Final = 0.5
"""Patients at either end of the scale who are taken to have not been seen."""

_MOST_ELEMENTS = 1 << 22  # resampled values held at a time: 32 MiB
_HIGHEST_LEVEL = 1 - 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over patients with its interval.

    ``low`` and ``high`` are None where no interval exists: too few patients, or one at every site. ``failed`` counts
    patients whose value is not a finite number; they have no part in the mean. ``method`` is what was computed:
    ``percentile`` where ``bca`` was asked for and does not exist, ``constant`` where the values of each site are equal
    and their ends are not known. ``same``: the values of each site are equal.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    failed: int = 0
    method: str = ""
    same: bool = False


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
    from scipy.special import ndtr, stdtrit  # loaded where it is used: a site that trains needs neither

    degrees = patients - sites
    quantile = float(stdtrit(degrees, 0.5 + level / 2)) * math.sqrt(patients / degrees)
    return min(float(2 * ndtr(quantile) - 1), _HIGHEST_LEVEL)


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
    method: Method | None = None,
    bounds: tuple[float, float] | None = None,
    level: float = LEVEL,
    fewest: int = FEWEST,
) -> Interval:
    """Mean over patients and its interval.

    Args:
        strata: one sequence of values per site; None and NaN are counted as failed.
        seed: of the resampling, nothing else.
        resamples: at least 100.
        method: None: ``bounded`` where ``bounds`` are known, else ``bca``.
        bounds: least and greatest value that a patient can have.
        level: wanted coverage, in (0, 1).
        fewest: patients from which there is an interval.

    Raises:
        ValueError: no finite value at all, or ``bounded`` without bounds.

    Example:
        >>> found = mean_interval([[0.7, 0.8, 0.9, None], [0.5, 0.6]], seed=0)
        >>> found.n, found.failed, round(found.mean, 3)
        (5, 1, 0.7)
        >>> found = mean_interval([[1.0] * 30], seed=0, bounds=(0.0, 1.0))  # Jeffreys: 0.920
        >>> round(found.low, 2), round(found.high, 2)
        (0.92, 1.0)
    """
    method = method or ("bounded" if bounds else "bca")
    cleaned = [finite(values) for values in strata]
    samples = [values for values, _ in cleaned if len(values)]
    failed = sum(count for _, count in cleaned)
    n = sum(len(values) for values in samples)
    if not n:
        raise ValueError("an interval needs at least one patient with a finite value")
    mean = float(stratified_mean(*samples))
    drawn = [values for values in samples if len(values) > 1]
    same = all(np.ptp(values) == 0 for values in drawn)

    def found(low: float | None, high: float | None, used: str) -> Interval:
        return Interval(mean=mean, low=low, high=high, n=n, failed=failed, method=used, same=same)

    if method == "bounded":
        if bounds is None:
            raise ValueError('method = "bounded" needs bounds')
        if n < fewest:
            return found(None, None, "none")
        return found(*bounded_ends(samples, bounds=bounds, level=level, resamples=resamples, seed=seed), method)
    if not drawn:
        return found(None, None, "none")
    if same:
        return found(mean, mean, "constant")
    if n < fewest:
        return found(None, None, "none")
    wanted = expanded_level(n, len(samples), level)
    low, high, used = bootstrap_means(samples, level=wanted, resamples=resamples, method=method, seed=seed)
    return found(float(low), float(high), used)


def bounded_ends(
    samples: Sequence[Values], *, bounds: tuple[float, float], level: float, resamples: int, seed: int
) -> tuple[Any, Any]:
    """Ends of the interval ``bounded`` of the stratified mean, along the last axis.

    Args:
        samples: finite values within ``bounds``, ``(…, patients)`` per site; leading axes are separate problems.
        bounds: least and greatest possible value.
        level: wanted coverage.
        resamples: draws; all problems share them.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    n = sum(values.shape[-1] for values in samples)
    parts = []
    step = max(1, _MOST_ELEMENTS // max(values.shape[-1] for values in samples))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        seen: Any = 0.0
        for values in samples:
            size = values.shape[-1]
            centre = values.mean(axis=-1, keepdims=True)
            weights = random.standard_exponential((size, count))
            # Not @: what BLAS adds up in which order depends on its threads, and so would the last bits.
            drawn = np.einsum("...n,nb->...b", values, weights / weights.sum(axis=0))
            wider = math.sqrt((size + 1) / (size - 1)) if size > 1 else 1.0
            seen = seen + size / n * (centre + wider * (drawn - centre))
        parts.append(np.clip(seen, *bounds))
    seen = np.concatenate(parts, axis=-1)
    worst, best, rest = random.dirichlet([UNSEEN, UNSEEN, n], size=resamples).T
    tail = (1 - level) / 2
    low, high = np.quantile(seen * rest + bounds[0] * worst + bounds[1] * best, [tail, 1 - tail], axis=-1)
    inner_low, inner_high = np.quantile(seen, [2 * tail, 1 - 2 * tail], axis=-1)
    ends = np.minimum(low, inner_low), np.maximum(high, inner_high)
    return (float(ends[0]), float(ends[1])) if np.ndim(low) == 0 else ends


def bootstrap_means(
    samples: Sequence[Values], *, level: float, resamples: int, method: Method, seed: int
) -> tuple[Any, Any, str]:
    """Ends of the interval of the stratified mean, along the last axis, and the method that was used.

    Args:
        samples: finite values ``(…, patients)`` per site; leading axes are separate problems.
        level: as SciPy takes it.
        resamples: number of resamples.
        method: not ``bounded``; ``bca`` falls back to ``percentile`` where SciPy finds no BCa interval.
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
        from scipy import stats

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
