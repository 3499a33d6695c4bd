# SPDX-License-Identifier: Apache-2.0
"""FedProx: FedAvg whose sites are held near the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127, Algorithm 2. The term ``mu / 2 · ‖w - w_global‖²`` is added at the site
(:class:`fedneuro.client.methods.Pull`); the coordinator's part is FedAvg's. ``mu`` is ``strategy.proximal``.
"""

from .fedavg import FedAvg

__all__ = ["FedProx"]


class FedProx(FedAvg):
    """See the module's text."""
