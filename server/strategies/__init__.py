# SPDX-License-Identifier: Apache-2.0
"""Strategies: how the sites' updates become the next global model. One file each, named after the method."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ...privacy.contract import Arrays
from ...privacy.study import StrategySection
from .fedavg import FedAvg

__all__ = ["STRATEGIES", "FedAvg", "Strategy", "build_strategy"]


class Strategy(Protocol):
    """One round: ``begin``, then ``fold`` each reply as it arrives, then ``finish``.

    ``state`` must hold every array that the next round needs, so that a resumed run gives the same bits.
    """

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round from the global ``arrays``, asked of sites of these public cohort sizes."""
        ...

    def fold(self, arrays: Arrays, public_size: int) -> None:
        """Take one site's arrays; they may be freed afterwards."""
        ...

    def finish(self) -> Arrays:
        """The next global arrays."""
        ...

    def state(self) -> Mapping[str, Arrays]:
        """What must be saved between rounds, by group name."""
        ...

    def load_state(self, state: Mapping[str, Arrays]) -> None:
        """Take back what :meth:`state` gave."""
        ...


STRATEGIES: Mapping[str, Callable[[StrategySection], Strategy]] = {"fedavg": FedAvg}


def build_strategy(section: StrategySection) -> Strategy:
    """The strategy that the study names."""
    return STRATEGIES[section.name](section)
