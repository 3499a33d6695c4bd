# SPDX-License-Identifier: Apache-2.0
"""FedAdam: the coordinator steps along the mean update, divided by the root of squares; squares are a running mean.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021,
https://arxiv.org/abs/2003.00295, Algorithm 2 (FedAdam): ``v ← β2 v + (1 - β2) Δ²``.
"""

import numpy as np

from .server_step import AdaptiveStep, Floats

__all__ = ["FedAdam"]


class FedAdam(AdaptiveStep):
    """See the module's text."""

    def _squares(self, before: Floats, square: Floats) -> Floats:
        return np.asarray(self._decay * before + (np.float32(1) - self._decay) * square, np.float32)
