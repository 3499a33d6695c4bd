# SPDX-License-Identifier: Apache-2.0
"""What it means that too few hospitals answered: a refusal if their policies or budgets said no, else a lost quorum."""

from collections.abc import Mapping

from ..privacy.errors import FedNeuroError, QuorumLost, Reason, Refused

__all__ = ["shortfall"]

_SAID_NO = frozenset(
    {
        Reason.BUDGET_EXHAUSTED, Reason.POLICY_REFUSED, Reason.STUDY_NOT_APPROVED, Reason.ROLE_REFUSED,
        Reason.LEDGER_DISTRUSTED, Reason.LEDGER_ROLLED_BACK, Reason.ACCOUNTING_DISAGREES,
    }
)  # fmt: skip


def shortfall(answered: int, asked: int, needed: int, refusals: Mapping[str, Reason], doing: str) -> FedNeuroError:
    """The error to raise; the saved state can be resumed after either.

    Args:
        answered: training sites that did what they were asked.
        asked: training sites that were asked.
        needed: how many must.
        refusals: why the others did not.
        doing: what they were asked, such as "to train in round 3".
    """
    why = "; ".join(f"{site}: {reason.value} ({reason.public_text})" for site, reason in sorted(refusals.items()))
    message = f"{answered} of {asked} training sites answered when asked {doing}, {needed} are needed: {why}"
    if refusals and set(refusals.values()) <= _SAID_NO:
        return Refused(message, reason=next(iter(refusals.values())))
    return QuorumLost(message, reason=next(iter(refusals.values()), Reason.LOST))
