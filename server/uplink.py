# SPDX-License-Identifier: Apache-2.0
"""The way up from the sites: what a reply of a round must hold, read as weights that a strategy can take."""

from ..privacy.contract import Arrays
from ..privacy.study import Study
from ..privacy.wire_layout import read_reply, uplink_names
from .update_norm import check_norm

__all__ = ["Uplink"]


class Uplink:
    """One round's.

    Args:
        study: the study.
        model: the global model that goes out.

    Attributes:
        model: the part of it that comes back.
    """

    def __init__(self, study: Study, model: Arrays) -> None:
        names = uplink_names(study)
        self._study, self._whole = study, model
        self._bound = study.strategy.max_update_norm
        self.model: Arrays = {name: array for name, array in model.items() if names is None or name in names}

    def read(self, arrays: Arrays) -> Arrays:
        """A reply's arrays as weights.

        Raises:
            ContractViolation: they are not exactly what was agreed, give a weight that is not finite or bounded, or are
            further from the model than ``strategy.max_update_norm``.
        """
        weights = read_reply(self._study, self._whole, arrays)
        if self._bound:
            check_norm(weights, self.model, self._bound)
        return weights

    def whole(self, new: Arrays) -> Arrays:
        """The next global model: ``new`` in the places of what came back, the rest as it was."""
        return {name: new.get(name, array) for name, array in self._whole.items()}
