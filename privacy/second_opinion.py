# SPDX-License-Identifier: Apache-2.0
"""Two other accountants look at every ε before it is spent; a disagreement in the unsafe direction stops the run.

ε comes from privacy loss distributions (:mod:`.accounting`). It must lie between two values that other people
computed with other mathematics for the same zero-out of one patient:

    lower   Opacus' PRV accountant (Gopi et al. 2021, https://arxiv.org/abs/2106.02848): a proven *lower* bound on
            the true ε. An ε below it promises too much.
    upper   Opacus' Rényi accountant (Mironov et al. 2019, https://arxiv.org/abs/1908.10530): an *upper* bound, looser
            than ours. An ε above it means that ours is not the bound that it is said to be.

PRV needs memory that grows with the number of releases, so it is left out where its grid would be too long
(about 100,000 releases); the Rényi bound is always there.
"""

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from .accounting import COARSE_GRID, GaussianEvent, Merged, cross_check, merge
from .errors import Reason, Refused

__all__ = ["agree", "prv_lower_bound"]

PRV_ERROR = 0.01
"""Half width of PRV's bracket in ε."""
LONGEST_GRID = 1 << 20
"""Points beyond which PRV is left out: below it takes a fraction of a second."""
MOST_KINDS = 8
"""Different (q, σ) beyond which PRV is left out."""
_RELATIVE, _ABSOLUTE = 0.005, 2 * COARSE_GRID  # what rounding to a grid may do


def agree(events: Iterable[GaussianEvent], delta: float, found: float, *, thorough: bool = True) -> None:
    """Refuse ``found``, the ε of ``events`` at ``delta``, where it contradicts another accountant.

    Args:
        events: what was composed.
        delta: in (0, 1).
        found: the ε that would be believed.
        thorough: ask PRV too, for a fraction of a second; the Rényi bound costs nothing.

    Raises:
        Refused: naming both values, reason ``accounting-disagrees``; nothing may be trained then.
    """
    merged = merge(events)
    upper = cross_check(_events(merged), delta)
    lower = prv_lower_bound(merged, delta) if thorough else None
    if found > upper * (1 + _RELATIVE) + _ABSOLUTE:
        raise _disagreement(found, delta, f"above {upper:.4f}, the Rényi bound of Opacus, which is looser")
    if lower is not None and found < lower * (1 - _RELATIVE) - _ABSOLUTE:
        raise _disagreement(found, delta, f"below {lower:.4f}, which Opacus' PRV accountant proves to be spent")


@lru_cache(maxsize=1024)
def prv_lower_bound(merged: Merged, delta: float) -> float | None:
    """A proven lower bound on the true ε, or None where PRV would take too long.

    Args:
        merged: (q, σ, count) of each kind of event, as :func:`.accounting.merge` gives them.
        delta: in (0, 1).
    """
    if not merged or len(merged) > MOST_KINDS:
        return None
    from opacus.accountants.analysis import prv

    variables = [prv.PoissonSubsampledGaussianPRV(q, sigma) for q, sigma, _ in merged]
    counts = [count for _, _, count in merged]
    error = delta / 1000
    # Opacus takes logarithms of the zeros at the edge of the support, and throws the results away.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        size = prv.compute_safe_domain_size(
            prvs=variables, max_self_compositions=counts, eps_error=PRV_ERROR, delta_error=error
        )
        mesh = PRV_ERROR / math.sqrt(sum(counts) * math.log(12 / error) / 2)
        if not size / mesh < LONGEST_GRID:
            return None
        domain: Any = prv.Domain.create_aligned(-size, size, mesh)
        parts = [
            prv.discretize(prv.TruncatedPrivacyRandomVariable(one, domain.t_min, domain.t_max), domain)
            for one in variables
        ]
        lower, _, _ = prv.compose_heterogeneous(parts, counts).compute_epsilon(delta, error, PRV_ERROR)
    return max(0.0, float(lower)) if math.isfinite(lower) else None


def _events(merged: Merged) -> list[GaussianEvent]:
    return [GaussianEvent(sample_rate=q, noise_multiplier=sigma, count=count) for q, sigma, count in merged]


def _disagreement(found: float, delta: float, how: str) -> Refused:
    return Refused(
        f"accounting: ε = {found:.4f} at δ = {delta:g} is {how}; nothing is trained on a number that two accountants "
        "disagree about: check the versions of dp-accounting and opacus, and report it",
        reason=Reason.ACCOUNTING_DISAGREES,
    )
