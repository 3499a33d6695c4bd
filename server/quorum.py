# SPDX-License-Identifier: Apache-2.0
"""The quorum rule, and what it means that too few hospitals answered.

It is a refusal if all who did not answer said no by their policies or budgets, else a lost quorum.
"""

from collections.abc import Mapping

from ..privacy.errors import FedNeuroError, QuorumLost, Reason, Refused
from ..privacy.study import Study

__all__ = ["needed", "require", "require_judge", "shortfall"]

_SAID_NO = frozenset(
    {
        Reason.BUDGET_EXHAUSTED, Reason.POLICY_REFUSED, Reason.STUDY_NOT_APPROVED, Reason.ROLE_REFUSED,
        Reason.LEDGER_DISTRUSTED, Reason.LEDGER_ROLLED_BACK, Reason.ACCOUNTING_DISAGREES,
    }
)  # fmt: skip


def needed(study: Study, asked: int) -> int:
    """How many of ``asked`` training sites must answer: ``strategy.min_sites``, or all of them; one at the least."""
    return min(study.strategy.min_sites or asked, asked) or 1


def require(study: Study, answered: int, asked: int, refusals: Mapping[str, Reason], doing: str) -> None:
    """Hold the quorum rule.

    Raises:
        QuorumLost, Refused: see :func:`shortfall`.
    """
    if answered < needed(study, asked):
        raise shortfall(answered, asked, needed(study, asked), refusals, doing)


def require_judge(found: Mapping[str, object], refusals: Mapping[str, Reason], round: int) -> None:  # noqa: A002
    """A run that no hospital judged at its end is not complete, unless all of them may not say.

    Raises:
        QuorumLost: ``found`` is empty, and not for the hospitals' policies or budgets; the run can be resumed.
    """
    if not found and not set(refusals.values()) <= _SAID_NO:
        why = "; ".join(f"{site}: {reason.value} ({reason.public_text})" for site, reason in sorted(refusals.items()))
        message = f"no hospital answered the final evaluation of round {round}, so nothing is known of the model: {why}"
        raise QuorumLost(message, reason=next(iter(refusals.values())))


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
