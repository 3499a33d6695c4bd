# SPDX-License-Identifier: Apache-2.0
"""Coordinate median: every weight by itself is the median over the sites.

Yin, Chen, Kannan, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
https://arxiv.org/abs/1803.01498, definition 1. Bears fewer than half of the sites being hostile; of an even number the
middle two are averaged. Memory grows with sites: see :mod:`.gathered`.
"""

import numpy as np

from ...privacy.contract import Arrays
from .gathered import Gathered, by_coordinate

__all__ = ["Median"]


class Median(Gathered):
    """See the module's text."""

    def _combine(self, updates: list[Arrays]) -> Arrays:
        return by_coordinate(updates, lambda block: np.asarray(np.median(block, axis=0)))
