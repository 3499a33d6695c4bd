# SPDX-License-Identifier: Apache-2.0
"""Accounting: published numbers, closed forms, an independent accountant, and calibration that never exceeds."""

import math
import time
from collections.abc import Iterable
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedneuro.privacy.accounting import COARSE_GRID, MIN_NOISE, GaussianEvent, calibrate, cross_check, epsilon, merge
from fedneuro.privacy.budget import Budget, site_delta
from fedneuro.privacy.errors import BadInput, Reason, Refused
from fedneuro.privacy.second_opinion import agree, prv_lower_bound

# q, steps, σ, δ, ε (PLD at 1e-4) as measured in the design notes on privacy, §3.
PUBLISHED = [
    (0.25, 400, 6.0, 1e-3, 2.545),
    (0.1, 1000, 2.0, 1e-3, 6.124),
    (0.016, 6200, 1.0, 1e-5, 8.172),
    (0.064, 500, 8.0, 1e-4, 0.537),
    (0.01, 100_000, 2.0, 1e-5, 8.133),
    (1.0, 100, 20.0, 1e-5, 1.993),
    (0.01, 10, 10.0, 1e-5, 0.0078),
]
"""The last ε is given there as 0.008; dp-accounting itself has 0.0078."""


def event(q: float, sigma: float, count: int = 1) -> GaussianEvent:
    return GaussianEvent(sample_rate=q, noise_multiplier=sigma, count=count)


@pytest.mark.parametrize(("q", "steps", "sigma", "delta", "expected"), PUBLISHED)
def test_published_values(q: float, steps: int, sigma: float, delta: float, expected: float) -> None:
    assert epsilon([event(q, sigma, steps)], delta) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("q", "steps", "sigma", "delta", "expected"), PUBLISHED[:6])
def test_renyi_accounting_of_opacus_is_above_but_not_far(
    q: float, steps: int, sigma: float, delta: float, expected: float
) -> None:
    renyi = cross_check([event(q, sigma, steps)], delta)
    assert expected < renyi < 1.2 * expected


def exact_gaussian_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact curve of one Gaussian release."""

    def excess(eps: float) -> float:
        shift = eps * sigma
        return float(norm.cdf(0.5 / sigma - shift) - math.exp(eps) * norm.cdf(-0.5 / sigma - shift)) - delta

    return cast("float", brentq(excess, 0, 100, xtol=1e-12))


@pytest.mark.parametrize(("sigma", "count"), [(1.0, 1), (2.0, 3), (20.0, 100), (50.0, 1000)])
def test_full_batches_meet_the_exact_value_from_above(sigma: float, count: int) -> None:
    exact = exact_gaussian_epsilon(sigma / math.sqrt(count), 1e-5)
    found = epsilon([event(1.0, sigma, count)], 1e-5)
    assert exact * (1 - 1e-6) <= found <= exact * 1.001


def test_events_compose_and_merge() -> None:
    """Rounds are not added up: 100 rounds of 10 steps are 1000 steps, and order does not matter."""
    rounds = [event(0.1, 2.0, 10)] * 100
    assert epsilon(rounds, 1e-3) == epsilon([event(0.1, 2.0, 1000)], 1e-3)
    assert epsilon(rounds, 1e-3) < 0.2 * sum([epsilon([event(0.1, 2.0, 10)], 1e-3)] * 100)
    mixed = [event(0.1, 2.0, 50), event(0.2, 4.0, 50)]
    assert epsilon(mixed, 1e-3) == epsilon(mixed[::-1], 1e-3)
    assert max(epsilon([e], 1e-3) for e in mixed) < epsilon(mixed, 1e-3) < sum(epsilon([e], 1e-3) for e in mixed)
    assert cross_check(mixed, 1e-3) > epsilon(mixed, 1e-3)


def test_mixed_events_compose_as_dp_accounting_composes_them() -> None:
    """Its own accountant, fed with its own events; unmerged and in another order too."""
    from dp_accounting import (
        ComposedDpEvent,
        DpEvent,
        GaussianDpEvent,
        NeighboringRelation,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )  # fmt: skip
    from dp_accounting.pld import PLDAccountant

    events = [event(0.1, 2.0, 50), event(1.0, 30.0, 4), event(0.25, 6.0, 40), event(0.1, 2.0, 10)]

    def theirs(kinds: Iterable[tuple[float, float, int]], grid: float) -> float:
        own: list[DpEvent] = [
            SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(s)) if q < 1 else GaussianDpEvent(s), n)
            for q, s, n in kinds
        ]
        accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, grid)
        accountant.compose(ComposedDpEvent(own))
        return float(accountant.get_epsilon(1e-4))

    for grid in (COARSE_GRID, 1e-4):
        ours = epsilon(events, 1e-4, grid=grid)
        assert ours == pytest.approx(theirs(merge(events), grid), rel=1e-9)
        as_they_came = [(e.sample_rate, e.noise_multiplier, e.count) for e in reversed(events)]
        assert ours == pytest.approx(theirs(as_they_came, grid), rel=1e-9)


@pytest.mark.parametrize(("q", "steps", "sigma", "delta", "expected"), PUBLISHED)
def test_the_second_opinions_stand_on_both_sides(
    q: float, steps: int, sigma: float, delta: float, expected: float
) -> None:
    lower = prv_lower_bound(merge([event(q, sigma, steps)]), delta)
    if steps < 100_000:
        assert lower is not None
        assert expected - 0.015 < lower <= expected, "PRV's bracket is ± 0.01"
    else:
        assert lower is None, "too long a grid"
    agree([event(q, sigma, steps)], delta, expected)
    with pytest.raises(Refused, match="Rényi") as caught:
        agree([event(q, sigma, steps)], delta, 1.3 * cross_check([event(q, sigma, steps)], delta) + 0.01)
    assert caught.value.reason is Reason.ACCOUNTING_DISAGREES
    if lower:
        with pytest.raises(Refused, match="proves to be spent"):
            agree([event(q, sigma, steps)], delta, 0.97 * expected - 0.01)


rates = st.sampled_from([0.05, 0.25, 1.0])
sigmas = st.sampled_from([2.0, 5.0, 20.0])
counts = st.integers(1, 40)
deltas = st.sampled_from([1e-2, 1e-3, 1e-5])


@settings(max_examples=10)
@given(rates, sigmas, counts, deltas, st.sampled_from([1.05, 2.0]))
def test_epsilon_is_monotone(q: float, sigma: float, count: int, delta: float, factor: float) -> None:
    """More noise or a larger δ costs less; a higher rate, more releases or another event cost more."""

    def cost(q: float = q, sigma: float = sigma, count: int = count, delta: float = delta) -> float:
        return epsilon([event(q, sigma, count)], delta, grid=COARSE_GRID)

    here = cost()
    assert cost(sigma=sigma * factor) <= here
    assert cost(delta=min(0.5, delta * factor)) <= here
    assert cost(q=min(1.0, q * factor)) >= here * (1 - 1e-9)
    assert cost(count=math.ceil(count * factor)) >= here
    assert epsilon([event(q, sigma, count), event(0.25, 5.0)], delta, grid=COARSE_GRID) >= here
    assert 0 <= here <= cross_check([event(q, sigma, count)], delta) * 1.005 + 2 * COARSE_GRID


@pytest.mark.parametrize("size", [1, 9, 10, 11, 60, 99, 100, 101, 12_345])
def test_delta_is_the_largest_power_of_ten_that_leaves_nobody_out(size: int) -> None:
    delta = site_delta(0.0, size)
    assert delta <= 1 / (10 * size) < 10 * delta * (1 + 1e-12)
    assert math.log10(delta) == pytest.approx(round(math.log10(delta)), abs=1e-12)
    assert delta < 1 / size, "so the gate never refuses it"
    assert site_delta(1e-7, size) == 1e-7


def test_senseless_deltas_and_budgets_are_refused() -> None:
    for delta, size in ((-1e-9, 5), (1.0, 5), (math.nan, 5), (0.0, 0)):
        with pytest.raises(BadInput):
            site_delta(delta, size)
    for cost, delta in ((0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(BadInput, match="budget"):
            Budget(epsilon=cost, delta=delta)


def test_three_phases_as_published() -> None:
    """The Gaussian (CLT) accountant reads only the last phase here; the truth is the sum of all."""
    phases = [event(0.25, 6.0, 400), event(0.1, 2.0, 1000)]
    assert epsilon(phases, 1e-3) > epsilon(phases[1:], 1e-3) * 1.01


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert cross_check([], 1e-5) == 0.0


def test_the_coarse_grid_errs_upwards_and_little() -> None:
    for q, steps, sigma, delta, _ in PUBLISHED[:4]:
        fine, coarse = (epsilon([event(q, sigma, steps)], delta, grid=g) for g in (1e-4, COARSE_GRID))
        assert fine <= coarse <= fine * 1.005


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(8.0, 1e-5, 0.25, 100), (1.0, 1e-4, 0.5, 60), (3.0, 1e-3, 1.0, 20), (6.0, 1e-6, 0.5, 50), (0.1, 1e-5, 0.01, 500)],
)
def test_calibrated_noise_never_exceeds_the_target_and_wastes_little(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate(target, delta, rate, steps)
    assert epsilon([event(rate, sigma, steps)], delta) <= target
    assert epsilon([event(rate, sigma * 0.999, steps)], delta) > target


def test_noise_has_a_floor() -> None:
    assert calibrate(500, 1e-5, 0.25, 2) == MIN_NOISE


def test_calibration_of_the_usual_studies() -> None:
    """The σ of the design notes, §5, for 200 patients: δ = 1e-5, 500 steps, expected batch 20."""
    for target, expected in ((8, 1.6), (3, 3.3), (1, 8.4)):
        assert calibrate(target, 1e-5, 0.1, 500) == pytest.approx(expected, rel=0.04)


def test_calibration_is_quick() -> None:
    started = time.process_time()
    calibrate(7.9, 1e-5, 0.25, 203)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate = 0.0"),
        ({"sample_rate": 1.5}, "sample_rate = 1.5"),
        ({"sample_rate": math.nan}, "sample_rate = nan"),
        ({"noise_multiplier": 0.0}, "noise_multiplier = 0.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier = -1.0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier = inf"),
        ({"count": 0}, "count = 0"),
    ],
)
def test_senseless_events_are_refused(values: dict[str, float], message: str) -> None:
    good = {"sample_rate": 0.1, "noise_multiplier": 1.0, "count": 1}
    with pytest.raises(BadInput, match=message):
        GaussianEvent(**{**good, **values})  # type: ignore[arg-type]


def test_senseless_promises_are_refused() -> None:
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="delta"):
            epsilon([event(0.1, 1.0)], delta)
        with pytest.raises(BadInput, match="delta"):
            calibrate(8, delta, 0.1, 10)
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BadInput, match="epsilon"):
            calibrate(target, 1e-5, 0.1, 10)
    with pytest.raises(BadInput, match="count = 0"):
        calibrate(8, 1e-5, 0.1, 0)
    with pytest.raises(BadInput, match="raise epsilon or delta"):
        calibrate(1e-7, 1e-9, 1.0, 10_000)
