# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD: control variates take out the drift of sites whose data differ.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML
2020, https://arxiv.org/abs/1910.06378, Algorithm 1, option II. A site steps with ``g - c_i + c`` and afterwards sets

    c_i ← c_i - c + (x - y_i) / (K η)

with x the model that it got, y_i the one that it sends back after K steps of size η. The paper sends the change of c_i
up as well. Here it is *not sent*: K and η are in the study, so the coordinator computes it from y_i itself, and

    c ← c + 1/N Σ (-c + (x - y_i) / (K η)) = (1 - s) c + s (x - mean of y_i) / (K η),    s = sites that answered / N

So nothing goes up but what FedAvg sends, and under ``privacy.mode = "local"`` the variates are post-processing of
noised updates: no second release, nothing more to account for. c goes down beside the model.

A site whose reply was lost on the way has moved its c_i and the coordinator has not moved c: their means then differ
by that one term, which fades as rounds go on.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...privacy.contract import Arrays
from ...privacy.study import Study
from ...privacy.wire_layout import CONTROL
from ..aggregation import WeightedMean
from .fedavg import FedAvg

__all__ = ["Scaffold"]

_GROUP = "control"


class Scaffold(FedAvg):
    """See the module's text; the step of the global model is ``strategy.learning_rate`` times the mean update."""

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self._rate = study.strategy.step_size
        self._path = study.training.local_steps * study.training.learning_rate  # K η
        self._control: dict[str, NDArray[np.float32]] = {}
        self._even: WeightedMean | None = None
        self._model: Arrays = {}
        self._asked = 1

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round from the global ``arrays``; all training sites are asked."""
        super().begin(arrays, public_sizes)
        self._model, self._asked = arrays, len(public_sizes)
        self._even = WeightedMean(self._asked) if self._section.weighting == "public_size" else None

    def extra(self) -> Arrays:
        """The control variate; empty before the first round, when it is zero."""
        return {CONTROL + name: array for name, array in self._control.items()}

    def fold(self, arrays: Arrays, public_size: int) -> None:
        """Add one site's weights to the mean, and to the even mean that the control variate is made of."""
        super().fold(arrays, public_size)
        if self._even:
            self._even.fold(arrays, 1)

    def finish(self) -> Arrays:
        """The global arrays after the step; moves the control variate."""
        count = self._mean.count
        mean = super().finish()
        even = self._even.result() if self._even else mean
        share = count / self._asked
        new: dict[str, NDArray[np.generic]] = {}
        for name, old in self._model.items():
            whole = old.astype(np.float64)
            drift = (whole - even[name].astype(np.float64)) / self._path
            before = self._control.get(name, np.zeros(old.shape, np.float32))
            self._control[name] = np.asarray((1 - share) * before + share * drift, np.float32)
            step = mean[name].astype(np.float64) - whole
            new[name] = mean[name] if self._rate == 1 else np.asarray(whole + self._rate * step, old.dtype)
        self._model, self._even = {}, None
        return new

    def state(self) -> Mapping[str, Arrays]:
        """The control variate."""
        return {_GROUP: dict(self._control)} if self._control else {}

    def load_state(self, state: Mapping[str, Arrays]) -> None:
        """Take back what :meth:`state` gave."""
        self._control = {name: array.astype(np.float32) for name, array in state.get(_GROUP, {}).items()}
