# SPDX-License-Identifier: Apache-2.0
"""A weighted mean of model states that is folded as replies arrive, and whose bits do not depend on their order.

Floating-point addition is not associative: a plain running sum would give other bits when hospitals answer
in another order, and simulation and deployment would drift apart. Here every term is first rounded to one
common grid, coarse enough that the sum of all terms is exact in float64, so any order gives the same sum
(pre-rounded summation, one fold: Demmel & Nguyen, "Parallel Reproducible Summation", IEEE Trans. Comput.
64(7), 2015, section 3). The grid follows from public numbers alone: the bound that the contract puts on a
weight (:data:`~fedneuro.privacy.contract.MAX_ABSOLUTE`) and the total of the public cohort sizes. For a total
of 200 patients it is 2^-31, which the division by the total turns into an error of the mean below 3e-12 per
site: below half a unit in the last place of every float32 beyond 5e-5.

Memory is one float64 per parameter, however many hospitals answer. Work proceeds in blocks that stay in the
processor's cache.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ..privacy.contract import MAX_ABSOLUTE, Arrays

__all__ = ["WeightedMean"]

BLOCK = 1 << 15
"""Elements folded at a time."""


class WeightedMean:
    """Fold ``(arrays, weight)`` pairs; :meth:`result` is their weighted mean in the arrays' own dtypes.

    Args:
        capacity: upper bound on the total of the weights, at least 1; public, and the same in every engine.

    Example:
        >>> mean = WeightedMean(capacity=3)
        >>> mean.fold({"w": np.array([1.0, 2.0], np.float32)}, 1)
        >>> mean.fold({"w": np.array([4.0, 2.0], np.float32)}, 2)
        >>> mean.result()["w"].tolist(), mean.count
        ([3.0, 2.0], 2)
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: expected at least 1")
        self.count = 0
        self.total = 0
        self._capacity = capacity
        # (x + magic) - magic rounds x to multiples of 2^exponent while |x| <= 2^(51 + exponent).
        exponent = math.ceil(math.log2(MAX_ABSOLUTE * capacity)) - 51
        self._magic = 1.5 * 2.0 ** (52 + exponent)
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._dtypes: dict[str, np.dtype[np.generic]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._work = np.empty(BLOCK)

    def fold(self, arrays: Arrays, weight: int) -> None:
        """Add one site's arrays with its weight.

        The arrays must have passed :func:`~fedneuro.privacy.contract.check_arrays`, which bounds them.

        Raises:
            ValueError: the weight is below 1, or the weights now exceed the capacity.
        """
        if weight < 1 or self.total + weight > self._capacity:
            raise ValueError(f"weight = {weight}: expected 1 to {self._capacity - self.total} (capacity left)")
        if not self.count:
            for name, array in arrays.items():
                self._sums[name] = np.zeros(array.size)
                self._dtypes[name] = array.dtype
                self._shapes[name] = array.shape
        for name, array in arrays.items():
            self._add(self._sums[name], np.ravel(array), float(weight))
        self.count += 1
        self.total += weight

    def _add(self, sums: NDArray[np.float64], array: NDArray[np.generic], weight: float) -> None:
        for start in range(0, array.size, BLOCK):
            target = sums[start : start + BLOCK]
            term = self._work[: target.size]
            np.multiply(array[start : start + BLOCK], weight, out=term, dtype=np.float64)  # exact: 24 + 29 bits
            term += self._magic
            term -= self._magic
            target += term

    def result(self) -> dict[str, NDArray[np.generic]]:
        """The mean: read-only arrays in the order, shapes and dtypes of the replies. Ends the fold.

        Raises:
            ValueError: nothing was folded.
        """
        if not self.count:
            raise ValueError("no reply was folded: a mean of nothing is not defined")
        mean: dict[str, NDArray[np.generic]] = {}
        for name, dtype in self._dtypes.items():
            sums = self._sums.pop(name)
            out = np.empty(self._shapes[name], dtype)
            flat = out.reshape(-1)
            for start in range(0, sums.size, BLOCK):
                part = sums[start : start + BLOCK]
                part /= self.total
                flat[start : start + BLOCK] = np.rint(part) if dtype.kind in "iu" else part
            out.flags.writeable = False
            mean[name] = out
        return mean
