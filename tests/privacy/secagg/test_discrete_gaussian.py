# SPDX-License-Identifier: Apache-2.0
"""The discrete Gaussian: its table against the formula, its draws against the table and against wrong widths."""

import math

import numpy as np
import pytest
from scipy import stats

from fedneuro.privacy.noise import SecureRandom
from fedneuro.privacy.secagg import discrete_gaussian as module
from fedneuro.privacy.secagg.discrete_gaussian import LARGEST, WIDTH, discrete_gaussian

ALPHA = 1e-6


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    return discrete_gaussian(200_000, SecureRandom())


def test_the_width_is_that_of_the_radix_sum() -> None:
    assert pytest.approx(1024 * math.sqrt(1 + 512**2 + 512**4), rel=1e-15) == WIDTH


def test_the_table_is_the_formula() -> None:
    """Differences of the 128-bit boundaries, against exp(-k²/2s²) normalised in float64, to its precision."""
    table = module._table()
    whole = [(int(h) << 64) + int(l_) for h, l_ in zip(table.high[:-1], table.low[:-1], strict=True)]
    k = np.arange(-3000, 3001)
    weights = np.exp(-(k.astype(float) ** 2) / (2 * 1024**2))
    # Beyond 3000 lies 0.34 % of the mass: the normaliser is Poisson's sum, sqrt(2π)·s to a relative 1e-8000000.
    expected = weights / (math.sqrt(2 * math.pi) * 1024)
    middle = module._CUT
    found = [(whole[middle + int(i)] - whole[middle + int(i) - 1]) / 2**128 for i in k]
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_inversion_meets_the_boundaries_exactly() -> None:
    """Words just below, at and above a boundary, also in the crowded tails, go to the right numbers."""
    table = module._table()

    class Fixed(SecureRandom):
        def __init__(self, words: np.ndarray) -> None:
            super().__init__()
            self.given = words

        def words(self, n: int) -> np.ndarray:
            given, self.given = self.given[:n], self.given[n:]
            return given

    places = np.array([module._CUT + k for k in (-6000, -4000, -300, 0, 1500, 5000)])
    boundaries = table.high[places]
    for shift in (-1, 1):
        words = boundaries + np.uint64(shift % 2**64)
        np.testing.assert_array_equal(
            table.draw(len(words), Fixed(words)) + module._CUT, np.searchsorted(table.high, words, side="left")
        )
    place = module._CUT  # a tie in the upper word is decided by the lower
    tie, low = boundaries[3:4], int(table.low[place])
    below, above = Fixed(np.append(tie, np.uint64(low - 1))), Fixed(np.append(tie, np.uint64(low)))
    assert table.draw(1, below)[0] + module._CUT == place
    assert table.draw(1, above)[0] + module._CUT == place + 1


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (0.96, False), (1.04, False)])
def test_draws_have_the_width_and_no_other(draws: np.ndarray, factor: float, accepted: bool) -> None:
    found = stats.kstest(draws / (WIDTH * factor), "norm").pvalue
    assert bool(found > ALPHA) is accepted


def test_low_digits_are_uniform_and_draws_are_fresh(draws: np.ndarray) -> None:
    """At width 2^28 the residue modulo 16 is uniform: a sampler that rounds floats, or skips a digit, is not."""
    assert stats.chisquare(np.bincount(draws % 16, minlength=16)).pvalue > ALPHA
    assert stats.chisquare(np.bincount((draws // 512) % 16, minlength=16)).pvalue > ALPHA
    assert np.abs(draws).max() <= LARGEST
    assert not np.array_equal(draws[:100], discrete_gaussian(100, SecureRandom()))


def test_sums_of_shares_have_the_width_of_the_whole() -> None:
    total = sum(discrete_gaussian(50_000, SecureRandom()) for _ in range(7))
    assert stats.kstest(total / (WIDTH * math.sqrt(7)), "norm").pvalue > ALPHA
    assert stats.kstest(total / (WIDTH * math.sqrt(6)), "norm").pvalue < ALPHA
