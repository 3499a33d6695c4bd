# SPDX-License-Identifier: Apache-2.0
"""FedYogi: the coordinator steps along the mean update, divided by the root of squares; squares that forget slowly.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021,
https://arxiv.org/abs/2003.00295, Algorithm 2 (FedYogi): ``v ← v - (1 - β2) Δ² sign(v - Δ²)``.
"""

import numpy as np

from .server_step import AdaptiveStep, Floats

__all__ = ["FedYogi"]


class FedYogi(AdaptiveStep):
    """See the module's text."""

    def _squares(self, before: Floats, square: Floats) -> Floats:
        step = (np.float32(1) - self._decay) * square * np.sign(before - square)
        return np.asarray(before - step, np.float32)
