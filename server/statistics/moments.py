# SPDX-License-Identifier: Apache-2.0
"""The federated form: what a hospital may send where the values of single patients stay with it.

Three numbers per site and metric suffice for the mean over all patients and its interval: how many patients, their
mean, their variance. A site with fewer patients than its minimum sends nothing. The same three numbers of paired
*differences* suffice for a comparison and for :func:`.equivalence.equivalence`.

    mean = Σ n_s m_s / N,   SE² = Σ (n_s / N)² v_s / n_s,   df by Satterthwaite (1946)

The interval is Student's. Computed from values or from moments it is the same number (tests: to 1e-9); against the
bootstrap interval of the same values it is an approximation, which ``fedneuro-sim bench coverage`` measures.

Where a hospital tells no variance, but a mean with its interval (a deployment), the distances from the mean to the ends
stand for the standard errors, each side for itself: the method of variance estimates recovery, MOVER (Zou and Donner
2008, Statistics in Medicine 27(10)). For symmetric intervals it is the formula above with normal quantiles.

    low = mean - √( Σ (n_s / N)² (m_s - l_s)² ),   of a difference a - b:  low = a - b - √( (a - l_a)² + (u_b - b)² )

Moments are exact statistics and have no differential privacy: with the set of patients known but for one, they
reveal that one, as a mean does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ...models.metrics.means import LEVEL, Interval, finite

__all__ = [
    "Ends",
    "Moments",
    "Pooled",
    "moments_interval",
    "pool_ends",
    "pool_moments",
    "site_moments",
    "subtract_ends",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Patients, their mean, and the unbiased variance (0 for one patient)."""

    n: int
    mean: float
    variance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """Mean over all patients, its standard error (None: unknown) and degrees of freedom."""

    n: int
    mean: float
    error: float | None
    degrees: float


def site_moments(values: Sequence[float | None], *, minimum: int = 1) -> Moments | None:
    """What a site sends; None where it has fewer than ``minimum`` patients with a finite value."""
    good, _ = finite(values)
    if len(good) < max(minimum, 1):
        return None
    return Moments(n=len(good), mean=float(good.mean()), variance=float(good.var(ddof=1)) if len(good) > 1 else 0.0)


def pool_moments(sites: Sequence[Moments]) -> Pooled:
    """Moments of sites as one stratified estimate.

    A site of one patient has no variance of its own; it lends the pooled variance of the others.

    Raises:
        ValueError: no site.
    """
    if not sites:
        raise ValueError("no site gave moments")
    n = sum(site.n for site in sites)
    mean = sum(site.n * site.mean for site in sites) / n
    inner = sum(site.n - 1 for site in sites)
    if not inner:
        return Pooled(n=n, mean=mean, error=None, degrees=0.0)
    common = sum((site.n - 1) * site.variance for site in sites) / inner
    parts = [(site.n * (site.variance if site.n > 1 else common) / n**2, site.n - 1) for site in sites]
    squared = sum(part for part, _ in parts)
    below = sum(part**2 / degrees for part, degrees in parts if degrees)
    degrees = min(squared**2 / below, float(inner)) if below else float(inner)
    return Pooled(n=n, mean=mean, error=math.sqrt(squared), degrees=degrees)


def moments_interval(sites: Sequence[Moments], *, level: float = LEVEL) -> Interval:
    """Student's interval of the mean over all patients, from the sites' moments alone."""
    pooled = pool_moments(sites)
    if pooled.error is None:
        return Interval(mean=pooled.mean, low=None, high=None, n=pooled.n, method="none")
    half = float(stats.t.ppf(0.5 + level / 2, pooled.degrees)) * pooled.error
    if not np.isfinite(half):
        return Interval(mean=pooled.mean, low=None, high=None, n=pooled.n, method="none")
    return Interval(mean=pooled.mean, low=pooled.mean - half, high=pooled.mean + half, n=pooled.n, method="student")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """A mean with the ends of its interval, and patients, by whatever method a hospital made it."""

    n: int
    mean: float
    low: float
    high: float


def pool_ends(sites: Sequence[Ends]) -> Ends:
    """The mean over all patients of hospitals, its interval by MOVER.

    Raises:
        ValueError: no site.

    Example:
        >>> one = Ends(n=10, mean=0.8, low=0.7, high=0.85)
        >>> found = pool_ends([one, one])
        >>> found.n, round(found.mean, 3), round(found.low, 3), round(found.high, 3)
        (20, 0.8, 0.729, 0.835)
    """
    if not sites:
        raise ValueError("no site gave an estimate")
    n = sum(site.n for site in sites)
    mean = sum(site.n * site.mean for site in sites) / n
    below = math.hypot(*(site.n / n * (site.mean - site.low) for site in sites))
    above = math.hypot(*(site.n / n * (site.high - site.mean) for site in sites))
    return Ends(n=n, mean=mean, low=mean - below, high=mean + above)


def subtract_ends(first: Ends, second: Ends) -> Ends:
    """The difference of two means over different patients, its interval by MOVER."""
    mean = first.mean - second.mean
    low = mean - math.hypot(first.mean - first.low, second.high - second.mean)
    high = mean + math.hypot(first.high - first.mean, second.mean - second.low)
    return Ends(n=first.n + second.n, mean=mean, low=low, high=high)
