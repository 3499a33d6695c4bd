# SPDX-License-Identifier: Apache-2.0
r"""Discrete Gaussian noise of one fixed, large width, drawn with integers only, a million numbers at a time.

The discrete Gaussian :math:`N_Z(0, s^2)` gives the integer k a probability proportional to
:math:`e^{-k^2/2s^2}`. It is used with one width, :data:`WIDTH`, about 2^28; the caller scales the data instead
(:mod:`fedneuro.privacy.secagg.grid`).

*How.* Three independent numbers of width :math:`s_0` = 1024 come from a table of cumulative probabilities with 128
bits (inversion, with a guide table: Chen & Asau 1974), and are added with radix 2^9:
:math:`z = z_1 + 2^9 z_2 + 2^{18} z_3`. No floating-point number is involved in a draw, so nothing of the kind that
Mironov 2012 describes can leak.

*Why the sum is what it should be.* Let X and Y be discrete Gaussians of widths a and b, x a whole number and
:math:`s^2 = a^2 + x^2 b^2`. Completing the square, :math:`P(X + xY = k) \propto e^{-k^2/2s^2} \sum_j
e^{-(j - c_k)^2/2w^2}` with :math:`w = ab/s`. By Poisson's summation formula the sum differs from
:math:`\sqrt{2\pi} w` by a factor within :math:`1 \pm 2.1 e^{-2\pi^2w^2}`, whatever :math:`c_k` is (Micciancio & Walter
2017, https://eprint.iacr.org/2017/259, do the same with smoothing parameters). Both steps have w > 1.999, so every
probability is right to a factor of 1 ± 1e-33. The table is cut at 13 :math:`s_0`, outside of which lies less than
2^-120, and rounded to 2^-128: a total variation below 2^-113 per number.

*Sums over sites.* By the same formula with :math:`w \ge s/\sqrt{2}` the sum of n independent draws is
:math:`N_Z(0, n s^2)` up to a factor that is one for all purposes (Kairouz, Liu & Steinke 2021,
https://arxiv.org/abs/2102.06387, Theorem 1: :math:`\tau` = 10 n e^{-\pi^2 s^2}).
"""

from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..noise import SecureRandom

__all__ = ["LARGEST", "WIDTH", "discrete_gaussian"]

_BASE: Final = 1024  # s0
_RADIX: Final = 512
_CUT: Final = 13 * _BASE
WIDTH: Final[float] = _BASE * float(1 + _RADIX**2 + _RADIX**4) ** 0.5
"""s: about 2.7e8. The true width of what is drawn, to the precision of a float."""
LARGEST: Final = _CUT * (1 + _RADIX + _RADIX**2)
"""No draw is larger than this; for proofs of head-room."""

_GUIDE_BITS = 16
_CHUNK = 1 << 15


def discrete_gaussian(n: int, random: SecureRandom) -> NDArray[np.int64]:
    """``n`` independent numbers of :math:`N_Z(0, s^2)` with s = :data:`WIDTH`."""
    values = np.empty(n, np.int64)
    table = _table()
    for start in range(0, n, _CHUNK):
        part = values[start : start + _CHUNK]
        part[:] = table.draw(part.size, random)
        for _ in range(2):
            part *= _RADIX
            part += table.draw(part.size, random)
    return values


@dataclass(frozen=True, slots=True)
class _Table:
    """Cumulative probabilities, 128 bits in two words, and for each head of a word where to look."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    first: NDArray[np.int32]
    several: NDArray[np.bool_]

    def draw(self, n: int, random: SecureRandom) -> NDArray[np.int64]:
        words = random.words(n)
        heads = (words >> np.uint64(64 - _GUIDE_BITS)).astype(np.int32)
        found = self.first[heads].astype(np.int64)
        found += self.high[found] < words
        # Where more than one boundary lies in the guide's cell, search; that is in the tails.
        rare = np.flatnonzero(self.several[heads])
        found[rare] = np.searchsorted(self.high, words[rare])
        # The upper word decides unless it is equal to a boundary's, once in 2^49 draws: then 64 more bits are drawn.
        for place in np.flatnonzero(self.high[found] == words):
            found[place] = self.resolve(int(words[place]), int(random.words(1)[0]))
        found -= _CUT
        return found

    def resolve(self, high: int, low: int) -> int:
        """How many boundaries are at most the number of these two words."""
        boundaries = zip(self.high[:-1].tolist(), self.low[:-1].tolist(), strict=True)
        return sum(boundary <= (high, low) for boundary in boundaries)


@cache
def _table() -> _Table:
    with localcontext() as context:
        context.prec = 60
        step = (Decimal(-1) / (2 * _BASE**2)).exp()  # w(k+1) / w(k) is step^(2k+1)
        square, ratio, weight = step * step, step, Decimal(1)
        half = []
        for _ in range(_CUT):
            weight, ratio = weight * ratio, ratio * square
            half.append(weight)
        weights = [*reversed(half), Decimal(1), *half]
        total, running, boundaries = sum(weights), Decimal(0), []
        for weight in weights[:-1]:
            running += weight
            boundaries.append(min(int((running / total * 2**128).to_integral_value()), 2**128 - 1))
    last = (1 << 64) - 1
    # One entry past the end keeps every look-up inside; nothing is larger, so it never counts.
    high = np.array([*(b >> 64 for b in boundaries), last], np.uint64)
    low = np.array([*(b & last for b in boundaries), last], np.uint64)
    edges = np.arange(1 << _GUIDE_BITS, dtype=np.uint64) << np.uint64(64 - _GUIDE_BITS)
    first = np.searchsorted(high, edges)
    after = np.append(first[1:], len(boundaries))
    return _Table(high, low, first.astype(np.int32), after - first > 1)
