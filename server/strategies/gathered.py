# SPDX-License-Identifier: Apache-2.0
"""What the robust strategies share: they compare all updates with each other, so they must hold all of them.

Memory grows with the number of sites here, one model each, and there is no way round it that is exact: what is extreme
is known only when all have answered. With many sites or large models use FedAvg, or count on sites × bytes per model.

Every site counts once: a hostile site must not gain weight by declaring many patients. The result does not depend on
the order of arrival. Under ``privacy.mode = "local"`` all this is post-processing of noised updates, and noise that is
large beside the spread of honest updates makes hostile ones hard to tell; with ``distributed`` nobody sees single
updates, so none of these can be had.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...privacy.contract import Arrays
from ...privacy.errors import QuorumLost
from ...privacy.study import Study

__all__ = ["Block", "Gathered", "Row", "by_coordinate"]

Block = NDArray[np.float64]
Row = NDArray[np.float64]

_BLOCK = 1 << 15
"""Numbers of each site that are looked at together."""


class Gathered(ABC):
    """Keeps a round's updates until :meth:`finish`; a subclass says how they become one."""

    def __init__(self, study: Study) -> None:
        self._section = study.strategy
        self._updates: list[Arrays] = []

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round."""
        del arrays, public_sizes
        self._updates = []

    def extra(self) -> Arrays:
        """The model alone goes down."""
        return {}

    def fold(self, arrays: Arrays, public_size: int) -> None:
        """Keep one site's arrays; its size does not count."""
        del public_size
        self._updates.append(arrays)

    def finish(self) -> Arrays:
        """The next global arrays.

        Raises:
            QuorumLost: too few sites answered for the method.
        """
        updates, self._updates = self._updates, []
        if not updates:
            raise QuorumLost("no site's update came: nothing can be compared; --resume when they can be reached")
        return self._combine(updates)

    def state(self) -> Mapping[str, Arrays]:
        """Nothing is kept between rounds."""
        return {}

    def load_state(self, state: Mapping[str, Arrays]) -> None:
        """Nothing to take back."""
        del state

    @abstractmethod
    def _combine(self, updates: list[Arrays]) -> Arrays:
        """One update of many."""


def by_coordinate(updates: Sequence[Arrays], rule: Callable[[Block], Row]) -> Arrays:
    """Apply ``rule`` to every number by itself.

    Args:
        updates: of the sites; same names, shapes and dtypes.
        rule: from a block ``(sites, numbers)``, sorted along the sites, to ``(numbers,)``.
    """
    found: dict[str, NDArray[np.generic]] = {}
    for name, first in updates[0].items():
        flat = [np.ravel(update[name]) for update in updates]
        out = np.empty(first.size, first.dtype)
        for start in range(0, first.size, _BLOCK):
            block = np.stack([array[start : start + _BLOCK] for array in flat]).astype(np.float64)
            block.sort(axis=0)
            out[start : start + _BLOCK] = rule(block)
        found[name] = out.reshape(first.shape)
    return found
