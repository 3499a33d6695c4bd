# SPDX-License-Identifier: Apache-2.0
"""Strategies: how the sites' updates become the next global model. One file each, named after the method.

docs/strategies.md has a table of them: paper, when to use, what travels, which privacy modes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ...privacy.contract import Arrays
from ...privacy.study import Study
from .ditto import Ditto
from .fedadagrad import FedAdagrad
from .fedadam import FedAdam
from .fedavg import FedAvg
from .fedavgm import FedAvgM
from .fedbn import FedBN
from .fedprox import FedProx
from .fedyogi import FedYogi
from .krum import Krum
from .median import Median
from .scaffold import Scaffold
from .trimmed_mean import TrimmedMean

__all__ = ["STRATEGIES", "FedAvg", "Strategy", "build_strategy"]


class Strategy(Protocol):
    """One round: ``begin``, then ``fold`` each reply as it arrives, then ``finish``.

    Arrays are those that come up from sites (:mod:`fedneuro.privacy.wire_layout`), as weights.
    ``state`` must hold every array that the next round needs, so that a resumed run gives the same bits.
    """

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round from the global ``arrays``, asked of sites of these public cohort sizes."""
        ...

    def extra(self) -> Arrays:
        """What goes down to training sites beside the model, under names of the contract."""
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


STRATEGIES: Mapping[str, Callable[[Study], Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "fedbn": FedBN,
    "scaffold": Scaffold,
    "ditto": Ditto,
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "krum": Krum,
}


def build_strategy(study: Study) -> Strategy:
    """The strategy that the study names."""
    return STRATEGIES[study.strategy.name](study)
