# SPDX-License-Identifier: Apache-2.0
"""FedAdagrad: the coordinator steps along the mean update, divided by the root of squares; squares are added up.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021,
https://arxiv.org/abs/2003.00295, Algorithm 2 (FedAdagrad): ``v ← v + Δ²``.
"""

from .server_step import AdaptiveStep, Floats

__all__ = ["FedAdagrad"]


class FedAdagrad(AdaptiveStep):
    """See the module's text."""

    def _squares(self, before: Floats, square: Floats) -> Floats:
        return before + square
