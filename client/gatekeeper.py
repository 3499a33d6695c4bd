# SPDX-License-Identifier: Apache-2.0
"""The hospital's side of both gates: policy, repeated rounds, floods, and the audit log. Everything fails closed.

A message in, each step deciding before the next begins:

    1. the policy is read again; where it cannot be, nothing is permitted
    2. the hour is one of its windows, and it was not asked too often in the last hour
    3. the contract of :mod:`.gate`: round, role, kind of request
    4. the rules of :mod:`.policy_rules`: study, privacy, model, reply
    5. the study has hours of computing left, the ledger is the one that the audit log knows (:mod:`.ledger_witness`),
       and the round was not answered before (:mod:`.round_guard`)
    6. the decision is in the audit log, on disk; where that fails, nothing is computed

The answer out:

    7. the contract again: what leaves is what was agreed, and nothing else
    8. the policy as it is *now*: an approval that was withdrawn during a long round holds the answer back
    9. the head of the ledger that paid, and the audit entry, are on disk; where that fails, a reason code leaves and
       nothing else

On a researcher's own machine (no policy, no list of approved studies) only the contract applies: the person who starts
the study owns the data.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, get_args

from ..models.state import digest
from ..privacy.budget import Budget, site_delta
from ..privacy.contract import (
    Arrays,
    EvaluateReply,
    Kind,
    MaskedReply,
    Request,
    TrainReply,
    payload_bytes,
)
from ..privacy.errors import FedNeuroError, Reason
from . import gate
from .audit import AuditLog
from .code_hash import code_hash
from .ledger_witness import LedgerWitness, may_charge
from .policy import Denied, Policy, PolicyFile
from .policy_rules import Case, require
from .round_guard import Answered, RoundGuard
from .settings import SiteSettings

__all__ = ["Gatekeeper", "audit_log", "under_policy"]

HOUR = 3600.0


def audit_log(settings: SiteSettings) -> AuditLog:
    """The audit log of a site."""
    return AuditLog(settings.audit, settings.name, settings.identity)


def under_policy(settings: SiteSettings, policy: Policy) -> SiteSettings:
    """``settings`` with what the policy narrows: the budget of the data set's life, and the share of the GPU."""
    fraction = min(settings.gpu_memory_fraction, policy.limits.gpu_memory_fraction)
    settings = replace(settings, gpu_memory_fraction=fraction)
    limit, lifetime = policy.privacy.max_epsilon_dataset, settings.lifetime
    if limit <= 0:  # private studies are refused by its rule; others spend nothing
        return settings
    if lifetime is None:
        return replace(settings, lifetime=Budget(epsilon=limit, delta=site_delta(0.0, settings.public_size)))
    return replace(settings, lifetime=replace(lifetime, epsilon=min(limit, lifetime.epsilon)))


class Gatekeeper:
    """Guards one site. Belongs to the one thread that handles its messages.

    Args:
        settings: the site's, as the hospital wrote them.
        now: local time; for tests.
    """

    def __init__(self, settings: SiteSettings, now: Callable[[], datetime] | None = None) -> None:
        self._settings = settings
        self._now = now or (lambda: datetime.now().astimezone())
        self._file = PolicyFile(settings.policy) if settings.policy else None
        self._guarded = settings.policy is not None or settings.approved is not None
        self._rounds = RoundGuard(settings.state)
        self._log: AuditLog | None = None
        self._seen: LedgerWitness | None = None
        self._asked: deque[float] = deque()
        self._flooded = False
        self._policy_digest = ""
        self._judged: dict[tuple[str, str, bytes], str] = {}
        self._started = 0.0  # of computing; 0 before it begins
        self._before: tuple[str, Answered] | None = None

    # -- steps 1 to 6 ----------------------------------------------------------------------------------

    def enter(self, request: Request) -> SiteSettings:
        """Let a request in; returns the settings under which it is computed.

        Raises:
            FedNeuroError, OSError: it is refused, or the decision could not be written down.
        """
        if not self._guarded:
            gate.enter(request, self._settings)
            return self._settings
        self._started, self._before, self._flooded = 0.0, None, False
        model = digest(request.arrays) if request.arrays else ""
        rule = "study.approved"
        try:
            policy = self._policy()
            if policy:
                self._at_this_hour(policy)
                self._not_too_often(policy)
            gate.enter(request, self._settings)
            if policy:
                rule = self._permitted(policy, request)
                self._hours_left(policy, request)
            if may_charge(request):
                self._witness().check()
            retries = policy.limits.max_retries if policy else MAX_RETRIES
            self._before = (request.study.hash, self._rounds.begin(request, model, retries))
        except (FedNeuroError, OSError) as error:
            with suppress(OSError, FedNeuroError):
                self._note_in(request, model, decision="refused", rule=_rule_of(error), reason=_reason_of(error))
            raise
        self._note_in(request, model, decision="allowed", rule=rule)
        self._started = time.monotonic()
        return under_policy(self._settings, policy) if policy else self._settings

    def _policy(self) -> Policy | None:
        if self._file is None:
            return None
        try:
            policy, found = self._file.look()
        except Denied as error:
            self._note_policy("invalid", problem=str(error))
            raise
        self._note_policy(found)
        return policy

    def _note_policy(self, found: str, **fields: str) -> None:
        if found != self._policy_digest:
            self._append("policy", digest=found, before=self._policy_digest, **fields)
            self._policy_digest = found

    def _at_this_hour(self, policy: Policy) -> None:
        now = self._now()
        if not policy.open_at(now):
            raise Denied("windows", f"{now:%a %H:%M} is in no window", reason=Reason.OUTSIDE_HOURS)

    def _not_too_often(self, policy: Policy) -> None:
        now, limit = time.monotonic(), policy.limits.max_requests_per_hour
        while self._asked and self._asked[0] <= now - HOUR:
            self._asked.popleft()
        if len(self._asked) >= limit:
            self._flooded = True
            text = f"{limit} requests came within the last hour"
            raise Denied("limits.max_requests_per_hour", text, reason=Reason.TOO_MANY_REQUESTS)
        self._asked.append(now)

    def _permitted(self, policy: Policy, request: Request) -> str:
        """The rule that lets the study in; judged once for a policy as it stands."""
        signature = request.signature
        key = (self._policy_digest, request.study.hash, signature)
        if key not in self._judged:
            rule = require(policy, Case(study=request.study, site=self._settings, signature=signature))
            self._judged = {k: v for k, v in self._judged.items() if k[0] == self._policy_digest} | {key: rule}
        return self._judged[key]

    def _hours_left(self, policy: Policy, request: Request) -> None:
        hours, limit = self._rounds.read(request.study.hash).seconds / HOUR, policy.limits.max_hours
        if hours >= limit:
            raise Denied("limits.max_hours", f"the study has computed for {hours:.2f} hours here; at most {limit:g}")

    # -- steps 7 to 9 ----------------------------------------------------------------------------------

    def leave(self, reply: gate.Answer, request: Request) -> gate.Answer:
        """Let an answer out, as it may leave.

        Raises:
            FedNeuroError, OSError: it holds what it may not, or could not be written down; nothing may leave.
        """
        if not self._guarded:
            gate.leave(reply, request)
            return reply
        gate.leave(reply, request)
        policy = self._policy()
        if policy:
            self._permitted(policy, request)
            reply = self._within(policy, reply)
        arrays = _arrays_of(reply)
        fields: dict[str, Any] = {"arrays": digest(arrays) if arrays else "", "bytes": payload_bytes(arrays)}
        for name in ("epsilon", "noise_multiplier", "attempt", "loss"):
            if (value := getattr(reply, name, None)) is not None:
                fields[name] = value
        if isinstance(reply, EvaluateReply):
            fields["metrics"] = sorted(reply.metrics)
        self._spend(request)
        if may_charge(request):
            self._witness().note()
        self._append("out", **self._about(request), answer=type(reply).__name__, **fields)
        self._before = None
        return reply

    def _within(self, policy: Policy, reply: gate.Answer) -> gate.Answer:
        """The answer less what the policy withholds.

        Raises:
            Denied: it holds what the policy does not permit.
        """
        if isinstance(reply, EvaluateReply):
            permitted = policy.reply.metrics
            if extra := [n for n in reply.metrics if not any(n == m or n.startswith(f"{m}_") for m in permitted)]:
                raise Denied("reply.metrics", f"the answer holds {extra[:3]}")
        if isinstance(reply, TrainReply) and reply.loss is not None and not policy.reply.training_loss:
            reply = replace(reply, loss=None)
        if isinstance(reply, TrainReply | MaskedReply) and reply.epsilon is not None:
            limit, sigma = policy.privacy.max_epsilon_study, reply.noise_multiplier
            if not reply.epsilon <= limit * (1 + 1e-6):
                raise Denied(
                    "privacy.max_epsilon_study", f"the ledger stands at ε {reply.epsilon:.3f}; at most {limit:g}"
                )
            if sigma is None or not sigma >= policy.privacy.min_noise_multiplier:
                raise Denied("privacy.min_noise_multiplier", f"the answer has noise {sigma}")
        return reply

    def _spend(self, request: Request) -> None:
        if self._started:
            self._rounds.spend(request.study.hash, time.monotonic() - self._started)
            self._started = 0.0

    # -- refusals --------------------------------------------------------------------------------------

    def refuse(self, request: Request, reason: Reason) -> None:
        """Write down that a reason code leaves; a full disk must not hide it."""
        if self._guarded:
            if self._started and may_charge(request):
                with suppress(OSError, FedNeuroError):
                    self._witness().note()
            with suppress(OSError, FedNeuroError):
                self._spend(request)
                if self._before is not None:
                    self._rounds.undo(*self._before)
                    self._before = None
                self._append("out", **self._about(request), answer="Refusal", reason=reason.value)

    def turn_away(self, kind: str, reason: Reason) -> None:
        """Write down a message that could not be read as a request, or came with another bundle.

        Args:
            kind: Flower's type of the message, such as ``query.hello``; it came from outside.
            reason: the code that leaves.
        """
        if not self._guarded:
            return
        kind = kind.rpartition(".")[2]
        shown = kind if kind in get_args(Kind) else "unknown"
        with suppress(OSError, FedNeuroError):
            self._count()
            common = {"message": shown, "reason": reason.value}
            self._append("in", **common, decision="refused", rule="contract")
            self._append("out", **common, answer="Refusal")

    def turn_away_part(self, request: Request, reason: Reason) -> None:
        """Write down a request that builds on a model that is not here, so that no gate could judge it.

        Args:
            request: as it came, with what it holds of its arrays.
            reason: the code that leaves.
        """
        if not self._guarded:
            return
        with suppress(OSError, FedNeuroError):
            self._count()
            self._note_in(request, "", decision="refused", rule="contract", reason=reason.value)
            self._append("out", **self._about(request), answer="Refusal", reason=reason.value)

    def _count(self) -> None:
        """A message that goes no further is one of the hour's, too; in a flood its entries are not flushed."""
        self._flooded = False
        with suppress(Denied):
            if policy := self._policy():
                self._not_too_often(policy)

    def close(self) -> None:
        """Sign the audit log; the node stops."""
        if self._log is not None:
            with suppress(OSError, FedNeuroError):
                self._log.append("stop")
                self._log.checkpoint()

    # -- audit log -------------------------------------------------------------------------------------

    def _note_in(self, request: Request, model: str, **fields: Any) -> None:
        size = payload_bytes(request.arrays)
        self._append("in", **self._about(request), arrays=model, bytes=size, **fields)

    def _about(self, request: Request) -> dict[str, Any]:
        return {
            "message": request.kind,
            "study": request.study.hash,
            "round": request.round,
            "final": request.final,
            "policy": self._policy_digest,
            "code": code_hash(),
        }

    def _append(self, kind: str, **fields: Any) -> None:
        self._opened().append(kind, durable=not self._flooded, **fields)

    def _opened(self) -> AuditLog:
        if self._log is None:
            log = audit_log(self._settings)
            log.append("start", code=code_hash())
            self._log = log
        return self._log

    def _witness(self) -> LedgerWitness:
        if self._seen is None:
            self._seen = LedgerWitness(self._settings, self._opened(), self._append)
        return self._seen


MAX_RETRIES = 3
"""Of a node without a policy file."""


def _rule_of(error: Exception) -> str:
    return error.rule if isinstance(error, Denied) else "contract"


def _reason_of(error: Exception) -> str:
    return (error.reason if isinstance(error, FedNeuroError) else Reason.ENVIRONMENT).value


def _arrays_of(reply: gate.Answer) -> Arrays | None:
    if isinstance(reply, TrainReply):
        return reply.arrays
    return {"vector": reply.vector} if isinstance(reply, MaskedReply) else None
