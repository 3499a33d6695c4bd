# SPDX-License-Identifier: Apache-2.0
"""What this site got last from the coordinator, so that a message need only hold what changed.

A request that builds on it names the digest of the *whole* that it means (``Request.held``). The whole is put together
here, before any gate, and is taken only if it has that digest: what the gates check, the audit log notes and training
starts from is the same as if everything had travelled. Where this site has another model or none (it was restarted),
it answers with ``model-not-held``, which is in the audit log and counts as a message like any other, and the
coordinator sends everything. Kept in memory alone, one model.
"""

from dataclasses import replace

from ..models.state import digest
from ..privacy.contract import Arrays, Request
from ..privacy.errors import ContractViolation, Reason

__all__ = ["HeldModel"]


class HeldModel:
    """The arrays of the last request that was answered, of one study."""

    def __init__(self) -> None:
        self._study = ""
        self._arrays: Arrays = {}

    def complete(self, request: Request) -> Request:
        """``request`` with all of its arrays.

        Raises:
            ContractViolation: reason ``model-not-held``: what is here and what came are not what was meant.
        """
        if not request.held:
            return request
        known = self._arrays if request.study.hash == self._study else {}
        came = request.arrays or {}
        whole = {name: came.get(name, array) for name, array in known.items()}
        whole |= {name: array for name, array in came.items() if name not in known}
        if digest(whole) != request.held:
            text = f"a {request.kind} request of round {request.round} builds on a model that is not here"
            raise ContractViolation(text, reason=Reason.MODEL_NOT_HELD)
        return replace(request, arrays=whole, held="")

    def keep(self, request: Request) -> None:
        """Remember the arrays of a request that is complete and was answered."""
        if request.arrays is not None:
            self._study, self._arrays = request.study.hash, request.arrays
