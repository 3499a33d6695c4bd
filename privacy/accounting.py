# SPDX-License-Identifier: Apache-2.0
"""What private training costs: ε of Gaussian releases, and the noise that an ε allows.

Unit: the patient. Neighbouring relation: zero-out of one patient, that is, two data sets that differ in whether
one patient's clipped gradient is used or replaced by zero. A release adds N(0, σ²C²) to the sum of the clipped
gradients of patients who were chosen by Poisson sampling at a public rate.

The truth is Google's accountant over privacy loss distributions (PLD) with pessimistic rounding: every value is
an upper bound, tight to the grid. Events are kept and composed, never values of ε: rounds do not add.
:func:`cross_check` gives the looser Rényi bound of Opacus, made by other people with other mathematics.

References: Koskela et al. 2020, https://arxiv.org/abs/1906.03049; Doroshenko et al. 2022 (connect-the-dots),
https://arxiv.org/abs/2207.04380; Mironov et al. 2019, https://arxiv.org/abs/1908.10530.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

from .errors import BadInput

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = [
    "COARSE_GRID",
    "FINE_GRID",
    "NEIGHBOURS",
    "GaussianEvent",
    "Merged",
    "calibrate",
    "cross_check",
    "epsilon",
    "merge",
]

Merged = tuple[tuple[float, float, int], ...]
"""(q, σ, count) of each kind of event, sorted, so that equal ledgers share one cache entry."""

NEIGHBOURS = "zero-out of one patient"
"""Neighbouring relation of every number in this module."""
FINE_GRID = 1e-4
"""Discretisation of the privacy loss for reports."""
COARSE_GRID = 1e-3
"""Discretisation for checks in passing: ten times faster, at most about 0.3 % higher."""
MIN_NOISE = 0.25
"""Smallest noise multiplier: below it ε is in the hundreds and the tables outgrow the memory."""


MAX_NOISE = 1e6
"""Largest noise multiplier that :func:`calibrate` tries."""
HUGE = 100.0
"""ε above which the coarse grid is enough."""
_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [2**k for k in range(6, 13)]  # Rényi
_CLOSE = 1e-4  # calibrate stops this close below the target, relative in ε


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianEvent:
    """``count`` releases of a Poisson-sampled Gaussian sum.

    Its meaning never changes: another mechanism would be another class with another ``mechanism``, the name
    under which the ledger keeps it.

    Attributes:
        sample_rate: probability q that a patient takes part in one release, in (0, 1].
        noise_multiplier: σ, the noise's standard deviation over the clipping bound; at least :data:`MIN_NOISE`.
        count: releases, at least 1.
    """

    mechanism: ClassVar[str] = "poisson-gaussian"

    sample_rate: float
    noise_multiplier: float
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise BadInput(f"sample_rate = {self.sample_rate}: give a probability above 0 and at most 1")
        if not MIN_NOISE <= self.noise_multiplier < math.inf:
            raise BadInput(
                f"noise_multiplier = {self.noise_multiplier}: give a finite number of at least {MIN_NOISE}; "
                "less noise is no promise"
            )
        if self.count < 1:
            raise BadInput(f"count = {self.count}: an event holds at least one release")


def epsilon(events: Iterable[GaussianEvent], delta: float, *, grid: float = FINE_GRID) -> float:
    """ε at ``delta`` of all ``events`` together; an upper bound, 0 for none.

    Args:
        events: releases on the same patients, in any order; equal (q, σ) are merged.
        delta: probability that the promise fails, in (0, 1).
        grid: discretisation of the privacy loss, :data:`FINE_GRID` or :data:`COARSE_GRID`.

    Raises:
        BadInput: delta is not a probability between 0 and 1.
    """
    if not 0 < delta < 1:
        raise BadInput(f"delta = {delta}: give a probability between 0 and 1")
    merged = merge(events)
    coarse = _epsilon(merged, delta, max(grid, COARSE_GRID))
    # Beyond HUGE a finer grid changes nothing that anyone would read, and costs minutes.
    return coarse if grid >= COARSE_GRID or coarse > HUGE else _epsilon(merged, delta, grid)


def calibrate(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier σ, to five digits, at which ``steps`` releases cost at most ``target_epsilon``.

    Returns:
        σ, rounded up; ``epsilon`` of it never exceeds the target. At least :data:`MIN_NOISE`.

    Raises:
        BadInput: a value is out of range, or no sensible noise reaches the target.
    """
    if not 0 < target_epsilon < math.inf:
        raise BadInput(f"epsilon = {target_epsilon}: give a positive number")
    if not 0 < delta < 1:
        raise BadInput(f"delta = {delta}: give a probability between 0 and 1")
    GaussianEvent(sample_rate=sample_rate, noise_multiplier=1.0, count=steps)
    return _calibrate(target_epsilon, delta, sample_rate, steps)


def cross_check(events: Iterable[GaussianEvent], delta: float) -> float:
    """ε by Opacus' Rényi accountant: a looser upper bound, by an independent implementation."""
    total: Any = 0.0
    for sample_rate, noise_multiplier, count in merge(events):
        total = total + count * _renyi(sample_rate, noise_multiplier)
    if isinstance(total, float):
        return 0.0
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest: the bound is valid, only looser
        found, _ = rdp.get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)
    return max(0.0, float(found))  # the conversion goes below zero where next to nothing is spent


@lru_cache(maxsize=256)
def _renyi(sample_rate: float, noise_multiplier: float) -> Any:
    """Rényi divergences of one release at ``_ORDERS``. Releases add."""
    from opacus.accountants.analysis import rdp

    return rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS)


@lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, sample_rate: float, steps: int) -> float:
    from scipy.optimize import brentq

    def excess(log_sigma: float, grid: float = COARSE_GRID) -> float:
        """ln(ε / target) at σ; falls as σ grows, nearly straight in ln σ."""
        sigma = max(math.exp(log_sigma), MIN_NOISE)
        event = GaussianEvent(sample_rate=sample_rate, noise_multiplier=sigma, count=steps)
        return math.log(max(epsilon([event], delta, grid=grid), 1e-300) / target)

    # 1. A bracket, from the textbook guess.
    lowest, highest = math.log(MIN_NOISE), math.log(MAX_NOISE)
    guess = sample_rate * math.sqrt(2 * steps * math.log(1.25 / delta)) / target
    left = right = min(max(math.log(guess), math.log(0.5)), highest)
    while excess(right) > 0:
        if right == highest:
            raise BadInput(
                f"epsilon = {target} over {steps} steps at sample_rate = {sample_rate} needs noise beyond "
                f"{MAX_NOISE:g}; raise epsilon or delta, or take fewer steps"
            )
        left, right = right, min(right + math.log(2), highest)
    while excess(left) <= 0:
        if left == lowest:
            return MIN_NOISE
        left, right = max(left - math.log(1.5), lowest), left
    slope = (excess(right) - excess(left)) / (right - left)
    # 2. The root on the coarse grid. If doubling the grid changes nothing there, a finer one will not either.
    root = cast("float", brentq(excess, left, right, xtol=1e-5))
    grid = COARSE_GRID if excess(root, 2 * COARSE_GRID) < _CLOSE else FINE_GRID
    # 3. Newton steps on that grid, rounded up, until the target is met and met closely.
    sigma = _rounded_up(math.exp(root))
    for _ in range(8):
        found = excess(math.log(sigma), grid)
        if -_CLOSE < found <= 0:
            return sigma
        sigma = _rounded_up(math.exp(math.log(sigma) - found / slope))
    # The numbers jitter at the last digits: step up until the target is met.
    while excess(math.log(sigma), grid) > 0:
        sigma = _rounded_up(sigma * (1 + _CLOSE))
    return sigma


def _rounded_up(sigma: float) -> float:
    """The next number of five digits."""
    digits = 4 - math.floor(math.log10(sigma))
    return float(round(math.ceil(round(sigma * 10**digits, 6)) / 10**digits, max(digits, 0)))


def merge(events: Iterable[GaussianEvent]) -> Merged:
    """``events`` by kind: what the order and the rounds were does not matter."""
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.sample_rate, event.noise_multiplier)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(sorted((q, sigma, count) for (q, sigma), count in counts.items()))


@lru_cache(maxsize=4096)
def _epsilon(merged: Merged, delta: float, grid: float) -> float:
    if not merged:
        return 0.0
    parts: list[PrivacyLossDistribution] = [_composed(q, sigma, count, grid) for q, sigma, count in merged]
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def _composed(q: float, sigma: float, count: int, grid: float) -> "PrivacyLossDistribution":
    if q == 1.0:
        # Full batches compose in closed form: one release with σ / sqrt(count).
        return _release(1.0, sigma / math.sqrt(count), grid)
    return _release(q, sigma, grid).self_compose(count)


@lru_cache(maxsize=16)
def _release(q: float, sigma: float, grid: float) -> "PrivacyLossDistribution":
    """Privacy loss distribution of one release. Cached: a ledger meets the same (q, σ) in every round."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=q,
        value_discretization_interval=grid,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,  # dp_accounting's name of zero-out
    )
