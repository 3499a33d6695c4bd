# SPDX-License-Identifier: Apache-2.0
"""FedAvgM: the coordinator steps along the mean update with momentum.

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
https://arxiv.org/abs/1909.06335, section 4.3: ``v ← β v + Δ``, ``x ← x + rate · v``. With β = 0 and
rate 1 it is FedAvg.
"""

from .server_step import Floats, ServerStep

__all__ = ["FedAvgM"]


class FedAvgM(ServerStep):
    """See the module's text; β and rate are ``strategy.momentum`` and ``learning_rate``."""

    groups = ("momentum",)

    def _step(self, name: str, delta: Floats) -> Floats:
        memory = self._memory["momentum"]
        memory[name] = self._momentum * memory[name] + delta if name in memory else delta
        return self._rate * memory[name]
