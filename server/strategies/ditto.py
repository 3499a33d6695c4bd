# SPDX-License-Identifier: Apache-2.0
"""Ditto: FedAvg, and beside it a personal model at each site that is pulled towards the global one.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221, Algorithm 1. The personal model is trained at the site on
``F + lambda / 2 · ‖v - w‖²`` (:mod:`fedneuro.client.training`), is what a training site is judged with, and never
leaves. ``lambda`` is ``strategy.proximal``. The coordinator's part is FedAvg's; a held-out site is judged with the
global model.
"""

from .fedavg import FedAvg

__all__ = ["Ditto"]


class Ditto(FedAvg):
    """See the module's text."""
