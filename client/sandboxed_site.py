# SPDX-License-Identifier: Apache-2.0
"""A site whose work is done by a child process behind walls, while both gates stay in the runner.

What comes in and what goes out passes the gates, the policy and the audit log *here*, where no scan is read and nothing
is computed (a process of its own counts the weights of a study's network, :mod:`.network_layout`); only what lies
between them is done over there. So a child that was taken over through a hole in what reads arrays or scans has no
network, and what it answers is still checked against the contract. (What is left to it: docs/threats.md.)
"""

from ..privacy.contract import Refusal, Request
from . import gate
from .site import Site
from .training_child import ChildFault, TrainingChild

__all__ = ["SandboxedSite"]


class SandboxedSite(Site):
    """A :class:`Site` with another place of work.

    Args:
        child: where.
    """

    def __init__(self, child: TrainingChild) -> None:
        super().__init__(child.settings)
        self.child = child

    def _dispatch(self, request: Request) -> gate.Answer:
        reply = self.child.ask(request, self.settings)
        if isinstance(reply, Refusal):
            raise ChildFault("the process that trains answered with a refusal", reply.reason)
        if request.kind == "hello":
            self._clear_fault()
        return reply

    def close(self) -> None:
        """The node stops: end the child, sign the audit log."""
        self.child.close()
        super().close()
