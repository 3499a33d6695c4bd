# SPDX-License-Identifier: Apache-2.0
"""What FedAvgM, FedAdam, FedYogi and FedAdagrad share: a step of the coordinator along the mean update.

FedOpt of Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 1: with x
the global model and Δ the mean of the sites' weights less x, a rule makes a step of Δ and of what it remembers.
Replies are folded as they come, as in FedAvg; the memory of a rule is one or two models, whatever the number of sites.
Arithmetic is float32, as the weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...privacy.contract import Arrays
from ...privacy.study import Study
from .fedavg import FedAvg

__all__ = ["AdaptiveStep", "Floats", "ServerStep"]

Floats = NDArray[np.float32]


class ServerStep(FedAvg, ABC):
    """A rule is a subclass with :meth:`_step`, and its memory in :attr:`_memory`, by group and array.

    Args:
        study: the study.
    """

    groups: tuple[str, ...] = ()
    """Groups of the rule's memory."""

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self._rate = np.float32(study.strategy.step_size)
        self._momentum = np.float32(study.strategy.momentum)
        self._memory: dict[str, dict[str, Floats]] = {group: {} for group in self.groups}
        self._model: Arrays = {}

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round from the global ``arrays``."""
        super().begin(arrays, public_sizes)
        self._model = arrays

    def finish(self) -> Arrays:
        """The global arrays after one step."""
        new: dict[str, NDArray[np.generic]] = {}
        for name, mean in super().finish().items():
            old = self._model[name].astype(np.float32)
            new[name] = np.asarray(old + self._step(name, mean.astype(np.float32) - old))
        self._model = {}
        return new

    def state(self) -> Mapping[str, Arrays]:
        """The rule's memory; empty before the first round."""
        return {group: dict(arrays) for group, arrays in self._memory.items() if arrays}

    def load_state(self, state: Mapping[str, Arrays]) -> None:
        """Take back what :meth:`state` gave."""
        for group in self.groups:
            self._memory[group] = {name: array.astype(np.float32) for name, array in state.get(group, {}).items()}

    @abstractmethod
    def _step(self, name: str, delta: Floats) -> Floats:
        """What is added to array ``name``, whose mean update is ``delta``."""


class AdaptiveStep(ServerStep):
    """Reddi et al., Algorithm 2: ``m ← β1 m + (1 - β1) Δ``; v by the rule; ``x ← x + rate · m / (√v + τ)``.

    v begins at τ², the least that the algorithm asks for; there is no correction for the start. (Flower 1.41 begins at
    0 and, in FedAdam alone, corrects with an exponent that is one too high.) β1, β2 and τ are ``strategy.momentum``,
    ``second_moment`` and ``adaptivity``.
    """

    groups = ("first", "second")

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self._decay = np.float32(study.strategy.second_moment)
        self._tau = np.float32(study.strategy.adaptivity)

    def _step(self, name: str, delta: Floats) -> Floats:
        first, second = self._memory["first"], self._memory["second"]
        one = np.float32(1)
        moved = self._momentum * first.get(name, np.zeros_like(delta)) + (one - self._momentum) * delta
        first[name] = np.asarray(moved, np.float32)
        second[name] = self._squares(second.get(name, np.full_like(delta, self._tau**2)), np.square(delta))
        return np.asarray(self._rate * first[name] / (np.sqrt(second[name]) + self._tau), np.float32)

    @abstractmethod
    def _squares(self, before: Floats, square: Floats) -> Floats:
        """The squares v after a round whose Δ² is ``square``."""
