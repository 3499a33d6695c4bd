# SPDX-License-Identifier: Apache-2.0
"""FedBN: FedAvg of everything but normalisation layers, which stay at their site.

Li, Jiang, Zhang, Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
https://arxiv.org/abs/2102.07623, Algorithm 1. Here there is no BatchNorm (it mixes patients); what stays is scales and
shifts of Instance- or GroupNorm. They match no agreed name of a reply (:mod:`fedneuro.privacy.wire_layout`), so the
gate lets none out. The global model keeps those of round 0; a held-out site, which never trains, is judged with them.
"""

from .fedavg import FedAvg

__all__ = ["FedBN"]


class FedBN(FedAvg):
    """See the module's text."""
