# SPDX-License-Identifier: Apache-2.0
"""Every error that a person may meet, as one tree; the branch decides the exit code.

    FedNeuroError
    ├── BadInput              2  something that the user wrote or supplied is wrong
    │   ├── StudyError           the study file or a ``--set`` override
    │   ├── DataError            a scan, a mask, a table, a data set
    │   └── StateError           an output folder that cannot be resumed or overwritten
    ├── Refused               3  a hospital's policy or privacy budget says no
    │   ├── BudgetExhausted      the ledger has no ε left for the round
    │   └── LedgerDistrusted     the ledger was changed, replaced or put back, or is another hospital's
    ├── QuorumLost            4  fewer hospitals answered than the study needs
    ├── EnvironmentProblem    5  port, disk, certificate, missing package
    └── ContractViolation     3  a message does not hold exactly what was agreed

A message is one line: what, where, what was expected, what to do. It may name paths and patients, so it
stays at the hospital; only the :class:`Reason` code and its fixed public text ever cross the wall.
"""

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "BadInput",
    "BudgetExhausted",
    "ContractViolation",
    "DataError",
    "EnvironmentProblem",
    "FedNeuroError",
    "LedgerDistrusted",
    "QuorumLost",
    "Reason",
    "Refused",
    "StateError",
    "StudyError",
]


class Reason(StrEnum):
    """Why a site did not do what it was asked. The only words of an error that leave a hospital."""

    STUDY_NOT_APPROVED = "study-not-approved"
    ROLE_REFUSED = "role-refused"
    POLICY_REFUSED = "policy-refused"
    POLICY_INVALID = "policy-invalid"
    OUTSIDE_HOURS = "outside-hours"
    TOO_MANY_REQUESTS = "too-many-requests"
    ROUND_REPLAYED = "round-replayed"
    AUDIT_DISTRUSTED = "audit-distrusted"
    BUDGET_EXHAUSTED = "budget-exhausted"
    LEDGER_DISTRUSTED = "ledger-distrusted"
    LEDGER_ROLLED_BACK = "ledger-rolled-back"
    ACCOUNTING_DISAGREES = "accounting-disagrees"
    CONTRACT_VIOLATION = "contract-violation"
    DATA_INVALID = "data-invalid"
    NON_FINITE = "non-finite"
    OUT_OF_NORM = "out-of-norm"
    OUT_OF_STEP = "out-of-step"
    MODEL_NOT_HELD = "model-not-held"
    ENVIRONMENT = "environment"
    INTERNAL = "internal-error"
    TRAINING_CRASHED = "training-crashed"
    OUT_OF_MEMORY = "out-of-memory"
    OVER_TIME = "over-time"
    LOST = "lost"
    TIMEOUT = "timeout"

    @property
    def public_text(self) -> str:
        """A fixed sentence without paths, identifiers or values."""
        return _PUBLIC_TEXT[self]


_PUBLIC_TEXT: dict[Reason, str] = {
    Reason.STUDY_NOT_APPROVED: "the hospital has not approved this study",
    Reason.ROLE_REFUSED: "the hospital does not grant the role that was asked of it",
    Reason.POLICY_REFUSED: "the hospital's policy forbids the request",
    Reason.POLICY_INVALID: "the hospital's policy cannot be read, so nothing is permitted; its staff see why",
    Reason.OUTSIDE_HOURS: "the hospital computes at other hours",
    Reason.TOO_MANY_REQUESTS: "the hospital was asked more often in an hour than it permits",
    Reason.ROUND_REPLAYED: "the hospital has answered this round, or a later one, before",
    Reason.AUDIT_DISTRUSTED: "the hospital's audit log is not as it was written, so nothing leaves",
    Reason.BUDGET_EXHAUSTED: "the hospital's privacy budget does not cover the round",
    Reason.LEDGER_DISTRUSTED: "the hospital's privacy ledger is not as it was written",
    Reason.LEDGER_ROLLED_BACK: "the hospital's privacy ledger does not hold a charge that it gave a receipt for",
    Reason.ACCOUNTING_DISAGREES: "two accountants contradict each other about what the round costs",
    Reason.CONTRACT_VIOLATION: "the message does not hold what the contract allows",
    Reason.DATA_INVALID: "the hospital's data set has a fault; its staff see it in the node's log",
    Reason.NON_FINITE: "training gave a value that is not a finite number",
    Reason.OUT_OF_NORM: "the hospital's update is larger than the study permits, and was left out",
    Reason.OUT_OF_STEP: "the hospital's saved state belongs to another round",
    Reason.MODEL_NOT_HELD: "the hospital no longer has the model that the message builds on",
    Reason.ENVIRONMENT: "the hospital's machine has a fault; its staff see it in the node's log",
    Reason.INTERNAL: "the node met an unexpected error; its staff see it in the node's log",
    Reason.TRAINING_CRASHED: "the hospital's training process ended; its staff see why in the node's log",
    Reason.OUT_OF_MEMORY: "training took more memory than the hospital's machine gives it",
    Reason.OVER_TIME: "training took longer than the hospital's machine gives it",
    Reason.LOST: "the hospital cannot be reached",
    Reason.TIMEOUT: "the hospital did not answer in time",
}


class FedNeuroError(Exception):
    """Base of all errors with a message made for people. ``exit_code`` ends the command, ``reason`` may leave."""

    exit_code: ClassVar[int] = 1
    default_reason: ClassVar[Reason] = Reason.INTERNAL

    def __init__(self, message: str, *, reason: Reason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason


class BadInput(FedNeuroError):
    """Something that a person wrote or supplied is wrong."""

    exit_code = 2
    default_reason = Reason.CONTRACT_VIOLATION


class StudyError(BadInput):
    """The study file, or an override of it, is wrong."""


class DataError(BadInput):
    """A scan, mask, table or data set is wrong."""

    default_reason = Reason.DATA_INVALID


class StateError(BadInput):
    """An output or state folder cannot be resumed or overwritten."""

    default_reason = Reason.OUT_OF_STEP


class Refused(FedNeuroError):
    """A hospital's policy says no."""

    exit_code = 3
    default_reason = Reason.POLICY_REFUSED


class BudgetExhausted(Refused):
    """The privacy ledger does not cover the round."""

    default_reason = Reason.BUDGET_EXHAUSTED


class LedgerDistrusted(Refused):
    """The privacy ledger is not what it was: a changed row, an old copy, another hospital's file."""

    default_reason = Reason.LEDGER_DISTRUSTED


class ContractViolation(FedNeuroError):
    """A message holds something else than the contract allows."""

    exit_code = 3
    default_reason = Reason.CONTRACT_VIOLATION


class QuorumLost(FedNeuroError):
    """Fewer hospitals answered than the study needs."""

    exit_code = 4
    default_reason = Reason.LOST


class EnvironmentProblem(FedNeuroError):
    """Port, disk, certificate or package: the machine, not the study."""

    exit_code = 5
    default_reason = Reason.ENVIRONMENT
