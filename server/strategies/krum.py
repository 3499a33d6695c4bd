# SPDX-License-Identifier: Apache-2.0
"""Krum and Multi-Krum: the update that lies closest to its neighbours, or the mean of the few that do.

Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NIPS
2017, https://papers.nips.cc/paper/6617, section 4. Of n answers, f of them possibly hostile, each scores the sum of the
squared distances to its n - f - 2 nearest; the ``keep`` lowest scores win. It holds for n ≥ 2 f + 3, and that is asked
for. Ties go by the SHA-256 of the updates, so the order of arrival does not matter.

Distances are taken of differences, in float64. (Flower 1.41 takes ‖x‖² + ‖y‖² - 2 x·y of the *weights* in float32,
which cancels to noise where updates are small beside them.) Memory grows with sites: see :mod:`.gathered`.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...models.state import digest
from ...privacy.contract import Arrays
from ...privacy.errors import QuorumLost, StudyError
from ..aggregation import WeightedMean
from .gathered import Gathered

__all__ = ["Krum", "squared_distances"]

_BLOCK = 1 << 16


class Krum(Gathered):
    """See the module's text; f and the number kept are ``strategy.byzantine`` and ``keep``."""

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round.

        Raises:
            StudyError: the training sites are too few for f, or for the number that is kept.
        """
        super().begin(arrays, public_sizes)
        if fault := self._fault(len(public_sizes)):
            raise StudyError(f"{fault}; lower strategy.byzantine or keep, or use median")

    def _fault(self, sites: int) -> str:
        """Why ``sites`` updates are too few; empty where they are not."""
        hostile, keep = self._section.byzantine, self._section.keep
        if sites < 2 * hostile + 3:
            return f"strategy.byzantine = {hostile} needs {2 * hostile + 3} training sites (2 f + 3), not {sites}"
        if keep > sites - hostile - 2:
            return f"strategy.keep = {keep} of {sites} training sites; at most {sites - hostile - 2} (n - f - 2)"
        return ""

    def _combine(self, updates: list[Arrays]) -> Arrays:
        if fault := self._fault(len(updates)):
            raise QuorumLost(f"{fault} answered; --resume when more can be reached")
        ordered = sorted(updates, key=digest)
        nearest = len(ordered) - self._section.byzantine - 2
        distances = squared_distances(ordered)
        scores = [math.fsum(sorted(np.delete(row, index))[:nearest]) for index, row in enumerate(distances)]
        chosen = sorted(range(len(ordered)), key=scores.__getitem__)[: self._section.keep]
        mean = WeightedMean(capacity=len(chosen))
        for index in chosen:
            mean.fold(ordered[index], 1)
        return mean.result()


def squared_distances(updates: Sequence[Arrays]) -> NDArray[np.float64]:
    """Squared L2 distances between updates ``(n, n)``."""
    found = np.zeros((len(updates), len(updates)))
    for name in updates[0]:
        flat = [np.ravel(update[name]) for update in updates]
        for start in range(0, flat[0].size, _BLOCK):
            parts = np.stack([array[start : start + _BLOCK] for array in flat]).astype(np.float64)
            for index in range(len(parts) - 1):
                found[index, index + 1 :] += np.square(parts[index + 1 :] - parts[index]).sum(axis=1)
    return found + found.T
