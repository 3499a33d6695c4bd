# SPDX-License-Identifier: Apache-2.0
"""Trimmed mean: of every weight by itself, the extreme sites are left out, and the mean of the others is taken.

Yin, Chen, Kannan, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
https://arxiv.org/abs/1803.01498, definition 2. Of n answers the ``floor(trim · n)`` largest and smallest are left out;
a share that would leave out nobody is refused, as it would protect nobody. Memory grows with
sites: see :mod:`.gathered`.
"""

import math
from collections.abc import Sequence

from ...privacy.contract import Arrays
from ...privacy.errors import QuorumLost, StudyError
from .gathered import Gathered, by_coordinate

__all__ = ["TrimmedMean"]


class TrimmedMean(Gathered):
    """See the module's text."""

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round.

        Raises:
            StudyError: so few sites are asked that none would be left out.
        """
        super().begin(arrays, public_sizes)
        if self._cut(len(public_sizes)):
            return
        trim, sites = self._section.trim, len(public_sizes)
        advice = f"set it to {math.ceil(1000 / sites) / 1000:g} or more" if sites > 2 else "it needs three sites"
        raise StudyError(f"strategy.trim = {trim:g} leaves out none of {sites} training sites: {advice}, or use fedavg")

    def _cut(self, sites: int) -> int:
        return math.floor(self._section.trim * sites + 1e-9)

    def _combine(self, updates: list[Arrays]) -> Arrays:
        count = len(updates)
        cut = self._cut(count)
        if not cut:
            text = f"{count} sites answered: strategy.trim = {self._section.trim:g} would leave out none of them"
            raise QuorumLost(f"{text}; --resume when more can be reached")
        return by_coordinate(updates, lambda block: block[cut : count - cut].mean(axis=0))
