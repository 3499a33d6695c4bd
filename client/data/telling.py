# SPDX-License-Identifier: Apache-2.0
"""The gate through which statistics of a data set leave, as a file that a person hands over.

    1. the policy as it is now permits statistics (``reply.statistics``), and the study, where it is for one
    2. the public cohort size is at least every minimum that the hospital or the study sets
    3. the content is what :mod:`fedneuro.privacy.data_statistics` or :mod:`~fedneuro.privacy.noised_statistics` permits
    4. the decision and what left, with its check sum, are in the audit log, on disk; where that fails, nothing leaves
    5. the file is sealed with the node's key (:mod:`fedneuro.privacy.site_seals`)

For a private study, the ledger pays between 2 and 3 (:mod:`.noised`). A refusal is in the audit log, too.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...privacy.data_statistics import LEAST, PURPOSE, Released
from ...privacy.errors import BadInput, FedNeuroError, Refused
from ...privacy.noised_statistics import Noised
from ...privacy.site_seals import content_digest, sealed_by_site
from ...privacy.study import Study
from ..audit_chain import Signer
from ..code_hash import code_hash
from ..gatekeeper import audit_log, under_policy
from ..policy import Denied, PolicyFile
from ..policy_rules import Case, require
from ..settings import SiteSettings

__all__ = ["content_of", "note_refusal", "note_told", "require_permission", "sealed"]


def require_permission(
    settings: SiteSettings, study: Study | None, *, threshold: int, epsilon: float = 0.0, signature: bytes = b""
) -> SiteSettings:
    """Steps 1 and 2; returns the settings under the hospital's policy.

    Args:
        settings: the hospital's, as in ``node.toml``.
        study: that the statistics are for; None: none yet.
        threshold: patients that the public cohort must have, at least 5.
        epsilon: what they are to cost each patient; 0: nothing, as the study is not private.
        signature: the coordinator's under the study, for policies that approve by signature.

    Raises:
        Refused: statistics, study, role, data set, mode, δ, cohort or ε are not permitted; it is in the audit log.
        BadInput: the threshold is out of range.
    """
    if threshold < LEAST:
        raise BadInput(f"threshold {threshold}: expected at least {LEAST} patients")
    try:
        return _permitted(settings, study, threshold, epsilon, signature)
    except FedNeuroError as error:
        note_refusal(settings, study, error)
        raise


def _permitted(
    settings: SiteSettings, study: Study | None, threshold: int, epsilon: float, signature: bytes
) -> SiteSettings:
    least = max(threshold, settings.min_patients, study.evaluation.min_patients if study else 0)
    if settings.policy is None:
        if study and settings.approved is not None and study.hash not in settings.approved:
            raise Refused(f"study {study.hash[:12]} ({study.study.name}) is not approved; nothing is released")
    else:
        policy, _ = PolicyFile(settings.policy).look()
        if not policy.reply.statistics:
            text = f"not permitted; to permit them, write statistics = true into [reply] of {settings.policy}"
            raise Denied("reply.statistics", text)
        if study:
            require(policy, Case(study=study, site=settings, signature=signature))
        for key, limit in (
            ("max_epsilon_round", policy.privacy.max_epsilon_round),
            ("max_epsilon_study", policy.privacy.max_epsilon_study),
        ):
            if epsilon > limit:
                text = f"statistics of ε {epsilon:g}; at most {limit:g}; nothing is released"
                raise Denied(f"privacy.{key}", text)
        least = max(least, policy.privacy.min_cohort)
        settings = under_policy(settings, policy)
    if settings.public_size < least:
        raise Refused(f"public cohort size {settings.public_size}, and the threshold is {least}: nothing is released")
    return settings


def note_refusal(settings: SiteSettings, study: Study | None, error: FedNeuroError) -> None:
    """Write down that nothing was told; a full disk must not hide why."""
    with suppress(OSError, FedNeuroError):
        rule = error.rule if isinstance(error, Denied) else "contract"
        about = _about(settings, study.hash if study else "")
        audit_log(settings).append("in", **about, decision="refused", rule=rule, reason=error.reason.value)


def note_told(told: Released | Noised, settings: SiteSettings) -> None:
    """Step 4. Written before the file is: what stands in the log may leave, and nothing else.

    Raises:
        Refused, EnvironmentProblem, OSError: it could not be written down; nothing may be handed over.
    """
    content = content_of(told)
    fields: dict[str, Any] = {"digest": content_digest(content)}
    if isinstance(told, Noised):
        fields |= {"epsilon": told.epsilon, "noise_multiplier": told.noise_multiplier}
    audit_log(settings).append("out", **_about(settings, told.study), answer="Statistics", **fields)


def sealed(told: Released | Noised, settings: SiteSettings) -> str:
    """Step 5: the file.

    Raises:
        BadInput, EnvironmentProblem: the node has no key, or one of another kind.
    """
    if settings.identity is None:
        raise BadInput("the node has no key to sign with; enrol it first: fedneuro-node enrol INVITATION")
    signer = Signer(settings.identity)
    return sealed_by_site(
        content_of(told), PURPOSE, site=told.site, study_hash=told.study, sign=signer.sign, public=signer.public
    )


def content_of(told: Released | Noised) -> dict[str, Any]:
    """The JSON values of a file."""
    values: dict[str, Any] = told.model_dump(mode="json", exclude_none=True)
    return values


def _about(settings: SiteSettings, study_hash: str) -> Mapping[str, Any]:
    digest = ""
    if settings.policy is not None:
        with suppress(Denied):
            _, digest = PolicyFile(settings.policy).look()
    return {"message": PURPOSE, "study": study_hash, "policy": digest, "code": code_hash()}
