# SPDX-License-Identifier: Apache-2.0
"""The integer grid: sensitivity counts the rounding in, the noise is that of σ, nothing overflows in silence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedneuro.privacy.errors import BadInput, ContractViolation
from fedneuro.privacy.noise import SecureRandom
from fedneuro.privacy.secagg.discrete_gaussian import WIDTH
from fedneuro.privacy.secagg.grid import SHARE, Grid, SiteSum, check_sites


def grid_of(**changes: float) -> Grid:
    values = {"clip": 1.0, "noise_multiplier": 2.0, "size": 5000, "sites": 4, "tolerate": 1, **changes}
    return Grid(**values)  # type: ignore[arg-type]


def direction(size: int, norm: float, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(size)
    return (drawn / np.linalg.norm(drawn) * norm).astype(np.float32)


def test_the_numbers_by_hand() -> None:
    """H = 4, t = 1: the surest noise is s·√3 steps; a patient is at most s·√3/σ = C/g + √d/2 steps."""
    grid = grid_of()
    assert grid.sensitivity == pytest.approx(WIDTH * math.sqrt(3) / 2)
    assert 1.0 / grid.step + math.sqrt(5000) / 2 == pytest.approx(grid.sensitivity)
    assert grid.noise_std == pytest.approx(2.0, rel=1e-6)
    assert grid.noise_std > 2.0


@settings(max_examples=30)
@given(st.floats(0.26, 50), st.floats(1e-3, 1e3), st.integers(1, 20_000), st.integers(0, 3), st.integers(0, 99))
def test_one_patient_moves_the_whole_numbers_by_the_sensitivity_at_most(
    sigma: float, clip: float, size: int, tolerate: int, seed: int
) -> None:
    grid = grid_of(clip=clip, noise_multiplier=sigma, size=size, sites=10, tolerate=tolerate)
    with_patient, without = SiteSum(grid), SiteSum(grid)
    for other in range(3):
        for total in (with_patient, without):
            total.add(direction(size, clip * (1 - 1e-6), seed=100 + other))
    with_patient.add(direction(size, clip * (1 - 1e-6), seed))
    assert with_patient.left_out == 0
    moved = (with_patient._sum - without._sum).astype(float)
    assert np.linalg.norm(moved) <= grid.sensitivity
    np.testing.assert_allclose(moved * grid.step, direction(size, clip * (1 - 1e-6), seed), atol=grid.step * 0.51)


@pytest.mark.parametrize("gradient", [direction(5000, 1.01), np.full(5000, np.nan, np.float32)])
def test_a_gradient_beyond_the_bound_counts_as_zero(gradient: np.ndarray) -> None:
    total = SiteSum(grid_of())
    total.add(gradient)
    assert total.left_out == 1
    assert not total._sum.any()


def test_sites_together_give_the_sum_and_noise_of_at_least_sigma() -> None:
    grid = grid_of(size=40_000)
    total, plain = np.zeros(40_000, np.uint64), np.zeros(40_000)
    for site in range(4):
        part = SiteSum(grid)
        part.add(direction(40_000, 0.9, site))
        plain += direction(40_000, 0.9, site)
        total += part.noised(SecureRandom())
    noise = grid.read(total) - plain
    # All four stayed: the noise is larger than the sure one by √(4/3). 40 000 draws: ±0.4 % is one standard error.
    assert noise.std() == pytest.approx(2.0 * math.sqrt(4 / 3), rel=0.02)


def test_a_mask_that_stays_is_noticed() -> None:
    words = SecureRandom().words(5000)
    with pytest.raises(ContractViolation, match="head-room"):
        grid_of().read(words)


def test_head_room_bounds_the_patients_of_a_step() -> None:
    """H = 1000, σ at its least: 135 916 · H · Δ is the most below 2^62; Δ = s·√1000 / 0.25."""
    total = SiteSum(grid_of(noise_multiplier=0.25, sites=1000, tolerate=0, size=1))
    assert total._most == int(2**62 / (1000 * WIDTH * math.sqrt(1000) / 0.25))
    total.patients = total._most
    with pytest.raises(ContractViolation, match="head-room"):
        total.add(np.zeros(1, np.float32))


def test_the_share_pays_for_the_largest_model_on_offer_and_no_more() -> None:
    """5 million parameters, 1000 rounds: R·η = 1000 · (√5e6 + 41)² / (24 s² · 3) = 1e-9, of 5e-7 that there are."""
    grid_of(size=5_000_000).prove(releases=1000, epsilon=1.0)
    assert 1000 * (math.sqrt(5e6) + 41) ** 2 / (24 * WIDTH**2 * 3) == pytest.approx(1.0e-9, rel=0.05)
    with pytest.raises(BadInput, match="more than the proof"):
        grid_of(size=5_000_000).prove(releases=1_000_000, epsilon=SHARE)


@pytest.mark.parametrize(
    ("sites", "tolerate", "text"),
    [(1, 0, "needs two that stay"), (3, 1, "fewer than a third"), (6, 2, "fewer than a third"), (1001, 0, "at most")],
)
def test_numbers_of_sites_that_protect_nobody(sites: int, tolerate: int, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        check_sites(sites, tolerate)


def test_a_grid_too_coarse_for_its_size_is_refused() -> None:
    with pytest.raises(BadInput, match="rounding would be felt"):
        grid_of(noise_multiplier=500.0, size=10**10)
