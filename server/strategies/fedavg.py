# SPDX-License-Identifier: Apache-2.0
"""FedAvg: the weighted mean of the sites' weights.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629, Algorithm 1, with :math:`n_k` replaced by
the *public* cohort size: the true count of patients never leaves a hospital.
"""

from collections.abc import Mapping, Sequence

from ...privacy.contract import Arrays
from ...privacy.study import Study
from ..aggregation import WeightedMean

__all__ = ["FedAvg"]


class FedAvg:
    """See the module's text. ``weighting = "equal"`` gives every site weight one."""

    def __init__(self, study: Study) -> None:
        self._section = study.strategy
        self._mean = WeightedMean(capacity=1)

    def begin(self, arrays: Arrays, public_sizes: Sequence[int]) -> None:
        """Start a round; FedAvg does not look at the old weights."""
        del arrays
        self._mean = WeightedMean(capacity=sum(map(self._weight, public_sizes)))

    def extra(self) -> Arrays:
        """FedAvg sends the model alone."""
        return {}

    def fold(self, arrays: Arrays, public_size: int) -> None:
        """Add one site's weights."""
        self._mean.fold(arrays, self._weight(public_size))

    def finish(self) -> Arrays:
        """The mean of the sites that answered."""
        return self._mean.result()

    def state(self) -> Mapping[str, Arrays]:
        """FedAvg keeps nothing between rounds."""
        return {}

    def load_state(self, state: Mapping[str, Arrays]) -> None:
        """Nothing to take back."""
        del state

    def _weight(self, public_size: int) -> int:
        return public_size if self._section.weighting == "public_size" else 1
