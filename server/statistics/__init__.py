# SPDX-License-Identifier: Apache-2.0
"""How sure we are: intervals, paired tests, families of tests, equivalence. The patient is the resampling unit.

Pure functions over numbers; SciPy does the mathematics. Read in this order: :mod:`fedneuro.models.metrics.means` (the
intervals, which hospitals compute as well), :mod:`.paired`, :mod:`.ranked`, :mod:`.family`, :mod:`.moments` (what
hospitals may send where single patients' values stay), :mod:`.equivalence`, :mod:`.evidence` (everything that the
report says of several models on the same patients).
"""

from ...models.metrics.means import Interval, finite, mean_interval
from .equivalence import Equivalence, equivalence
from .family import holm
from .moments import Moments, moments_interval, pool_moments, site_moments
from .paired import Paired, compare_paired, power_note

__all__ = [
    "Equivalence",
    "Interval",
    "Moments",
    "Paired",
    "compare_paired",
    "equivalence",
    "finite",
    "holm",
    "mean_interval",
    "moments_interval",
    "pool_moments",
    "power_note",
    "site_moments",
]
