# SPDX-License-Identifier: Apache-2.0
"""The bound on a site's update (``strategy.max_update_norm``): what is larger is left out of the round, and named.

A site whose update is many times larger than the others' decides the mean alone, by a fault or on purpose. The norm is
that of the change of all weights that came back, as in Sun et al., "Can You Really Backdoor Federated Learning?"
(2019), section 4; there a long update is shortened, here it is left out, so that a fault does not go unseen.
"""

import math

import numpy as np

from ..privacy.contract import Arrays
from ..privacy.errors import ContractViolation, Reason

__all__ = ["check_norm", "update_norm"]

BLOCK = 1 << 16
"""Elements at a time, so that no copy of the model is made."""


def update_norm(weights: Arrays, model: Arrays) -> float:
    """L2 norm of ``weights`` minus ``model`` over the arrays of ``model``, summed in float64."""
    total = 0.0
    for name, before in model.items():
        new, old = np.ravel(weights[name]), np.ravel(before)
        for start in range(0, new.size, BLOCK):
            change = np.subtract(new[start : start + BLOCK], old[start : start + BLOCK], dtype=np.float64)
            total += float(change @ change)
    return math.sqrt(total)


def check_norm(weights: Arrays, model: Arrays, bound: float) -> None:
    """Refuse an update that is longer than ``bound``.

    Raises:
        ContractViolation: with reason ``out-of-norm``.
    """
    if (norm := update_norm(weights, model)) > bound:
        text = f"an update of length {norm:.4g}, beyond strategy.max_update_norm = {bound:g}"
        raise ContractViolation(text, reason=Reason.OUT_OF_NORM)
