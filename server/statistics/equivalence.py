# SPDX-License-Identifier: Apache-2.0
"""Not worse, or equivalent: two one-sided tests (TOST) of a mean paired difference against a margin.

A large p-value of a difference shows nothing; these tests turn the question round. The margin is the largest
difference that would not matter, and has to be chosen before the results are seen.

Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15(6).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from .moments import Moments, pool_moments

__all__ = ["Equivalence", "equivalence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """p-values against "worse by the margin or more" and against "apart by the margin or more".

    ``None`` where they cannot be computed: fewer than two patients at every site.
    """

    margin: float
    p_not_worse: float | None
    p_equivalent: float | None


def equivalence(differences: Sequence[Moments], *, margin: float) -> Equivalence:
    """Student's TOST on the mean over patients of (ours - theirs), larger being better.

    Args:
        differences: moments of the paired differences, one per site, so it works where values stay at the sites.
        margin: above 0, in the metric's unit.

    Example:
        >>> found = equivalence([Moments(n=50, mean=-0.002, variance=0.0004)], margin=0.02)
        >>> found.p_equivalent < 0.001
        True
    """
    if margin <= 0:
        raise ValueError(f"margin = {margin}: expected a number above 0")
    pooled = pool_moments(differences)
    if pooled.error is None:
        return Equivalence(margin=margin, p_not_worse=None, p_equivalent=None)
    if pooled.error == 0:
        below, above = float(pooled.mean <= -margin), float(pooled.mean >= margin)
    else:
        below = float(stats.t.sf((pooled.mean + margin) / pooled.error, pooled.degrees))
        above = float(stats.t.cdf((pooled.mean - margin) / pooled.error, pooled.degrees))
    return Equivalence(margin=margin, p_not_worse=below, p_equivalent=max(below, above))
