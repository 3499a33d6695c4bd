# SPDX-License-Identifier: Apache-2.0
"""The two gates that every message passes at a hospital. Both fail closed.

Entry, in this order: the study is approved; the role that it asks for is granted; the arrays are those of the
agreed network, finite and bounded (checked by the session, which knows the network). Exit: the reply answers
the request, and holds the agreed arrays and metrics only.
"""

import numpy as np

from ..privacy.budget import site_delta
from ..privacy.contract import (
    SECURE_KINDS,
    EvaluateReply,
    HelloReply,
    KeysReply,
    MaskedReply,
    Request,
    Role,
    SharesReply,
    TrainReply,
    UnmaskReply,
    check_arrays,
    shapes_of,
)
from ..privacy.errors import ContractViolation, Reason, Refused
from ..privacy.released import MIN_CELL, is_cell, released_names
from ..privacy.wire_layout import reply_shapes
from .settings import SiteSettings

__all__ = ["Answer", "enter", "leave", "missing_arrays"]


Answer = HelloReply | TrainReply | EvaluateReply | KeysReply | SharesReply | MaskedReply | UnmaskReply
"""What a site may answer, but for a refusal."""


def enter(request: Request, settings: SiteSettings) -> None:
    """Check a request before anything else looks at it.

    Raises:
        Refused: the study is not approved, or the hospital does not grant the role.
        ContractViolation: the request's round is not one of the study's.
    """
    study, name = request.study, settings.name
    if settings.approved is not None and study.hash not in settings.approved:
        raise Refused(
            f"site {name}: study {study.hash[:12]} ({study.study.name}) is not approved; "
            "to approve it, add its hash to node.toml",
            reason=Reason.STUDY_NOT_APPROVED,
        )
    heldout = name in study.evaluation.heldout
    if heldout is not (settings.role is Role.HELDOUT):
        asked = "a held-out site" if heldout else "a training site"
        raise Refused(
            f"site {name}: the study asks for {asked}, the hospital grants role {settings.role.value}",
            reason=Reason.ROLE_REFUSED,
        )
    trains = request.kind in SECURE_KINDS or request.kind == "train"
    if trains and settings.role is not Role.TRAIN:
        raise Refused(f"site {name}: was asked to train, but is held out", reason=Reason.ROLE_REFUSED)
    if trains and (request.kind in SECURE_KINDS) is not (study.privacy.mode == "distributed"):
        raise ContractViolation(f'site {name}: {request.kind} does not suit privacy.mode = "{study.privacy.mode}"')
    first, last = (1 if trains else 0), study.training.rounds
    if not first <= request.round <= last:
        raise ContractViolation(
            f"site {name}: round {request.round} of {request.kind}; the study has rounds {first} to {last}"
        )
    delta = site_delta(study.privacy.delta, settings.public_size)
    if study.privacy.mode != "none" and delta >= 1 / settings.public_size:
        raise Refused(
            f"site {name}: privacy.delta = {delta:g} is not below 1 / public cohort size "
            f"(1/{settings.public_size}); choose a smaller delta"
        )


def missing_arrays(request: Request) -> ContractViolation:
    """The error for a request that carries no model."""
    return ContractViolation(f"a {request.kind} request of round {request.round} carries no model")


def leave(reply: Answer, request: Request) -> None:
    """Check a reply before it is handed to the transport.

    Raises:
        ContractViolation: the reply holds something else than the contract allows.
    """
    study = request.study
    if isinstance(reply, TrainReply):
        if request.arrays is None:
            raise missing_arrays(request)
        check_arrays(reply.arrays, reply_shapes(study, shapes_of(request.arrays)))
        if study.privacy.mode != "none" and reply.loss is not None:
            raise ContractViolation("a private study returns no training loss: it is not noised")
    elif isinstance(reply, MaskedReply):
        parameters = sum(array.size for array in (request.arrays or {}).values())
        if reply.vector.dtype != np.uint64 or reply.vector.ndim != 1 or not 0 < reply.vector.size <= parameters:
            raise ContractViolation("a masked vector is one uint64 word for each trainable parameter")
    elif isinstance(reply, EvaluateReply):
        allowed = released_names(study)
        if extra := set(reply.metrics) - allowed:
            raise ContractViolation(f"metrics {sorted(extra)} are not in the study")
        least = study.evaluation.min_patients
        small = [n for n, e in reply.metrics.items() if e.n < (max(least, MIN_CELL) if is_cell(n) else least)]
        if small:
            raise ContractViolation(f"metrics {small} are over fewer than evaluation.min_patients patients")
