# SPDX-License-Identifier: Apache-2.0
"""Statistics of a data set for a private study: counted, noised, charged, written down, and told once.

    1. the policy permits the study, and the ledger is the one that the audit log knows
    2. every patient is counted once in each histogram of :mod:`fedneuro.privacy.noised_statistics`
    3. the ledger is charged, on disk, for the whole data set: those who train and those who are evaluated
    4. noise is drawn, the answer is kept in ``state/statistics``, and the audit log has its digest

A study is answered once: the same question gets the same numbers again, which costs nothing. A second look with fresh
noise would be a second release.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...privacy.accounting import COARSE_GRID, epsilon
from ...privacy.budget import site_delta, training_event
from ...privacy.contract import Role
from ...privacy.data_statistics import LEAST, rounded_count
from ...privacy.errors import BadInput, Refused
from ...privacy.identity import replace_file
from ...privacy.ledger import Ledger
from ...privacy.noise import SecureRandom
from ...privacy.noised_statistics import QUESTIONS, Histogram, Noised, event_for, questions
from ...privacy.study import Study
from ..gatekeeper import audit_log, under_policy
from ..ledger_witness import LedgerWitness
from ..policy import load_policy
from ..policy_rules import Case, require
from ..settings import SiteSettings
from .statistics import Measured

__all__ = ["Answer", "counted", "release_noised", "require_permission"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What may be handed over, and what it cost.

    Attributes:
        told: the file.
        again: whether it was told before, at no new cost.
        with_training: ε of a patient together with the study's training here, composed, at the file's δ.
    """

    told: Noised
    again: bool
    with_training: float


def require_permission(settings: SiteSettings, study: Study, wanted: float, threshold: int) -> SiteSettings:
    """What the hospital permits decides, before anything is read; returns its settings under its policy.

    Raises:
        Refused: study, role, data set, mode, δ, cohort or ε are not permitted.
    """
    least = max(threshold, study.evaluation.min_patients, settings.min_patients, LEAST)
    if settings.public_size < least:
        raise Refused(f"public cohort size {settings.public_size}, and the threshold is {least}: nothing is released")
    if settings.policy is None:
        if settings.approved is not None and study.hash not in settings.approved:
            raise Refused(f"study {study.hash[:12]} ({study.study.name}) is not approved; nothing is released")
        return settings
    policy = load_policy(settings.policy)
    require(policy, Case(study=study, site=settings))
    for key, limit in (
        ("max_epsilon_round", policy.privacy.max_epsilon_round),
        ("max_epsilon_study", policy.privacy.max_epsilon_study),
    ):
        if wanted > limit:
            raise Refused(f"policy privacy.{key}: statistics of ε {wanted:g}; at most {limit:g}; nothing is released")
    return under_policy(settings, policy)


def release_noised(
    found: Measured, settings: SiteSettings, study: Study, wanted: float, *, threshold: int = LEAST
) -> Answer:
    """Charge the ledger and make the file.

    Args:
        found: of the data set of ``settings``.
        settings: the hospital's, as in ``node.toml``.
        study: a private one.
        wanted: ε that the hospital grants, above 0.
        threshold: patients that the public cohort must have, at least 5.

    Raises:
        Refused, BudgetExhausted, LedgerDistrusted: the hospital does not permit it, or the ledger does not cover it.
        BadInput: ``wanted`` or ``threshold`` is out of range.
        OSError, EnvironmentProblem: it could not be written down; nothing may be handed over.
    """
    if threshold < LEAST:
        raise BadInput(f"threshold {threshold}: expected at least {LEAST} patients")
    if not 0 < wanted <= 1000:
        raise BadInput(f"--epsilon {wanted:g}: expected a number above 0, at most 1000")
    settings = require_permission(settings, study, wanted, threshold)
    path = settings.state / "statistics" / f"{study.hash}.json"
    if path.is_file():
        told = Noised.model_validate_json(path.read_bytes())
        return Answer(told, True, _with_training(told, study, settings))
    counts = counted(found, study)
    log = audit_log(settings)
    witness = LedgerWitness(settings, log, log.append)
    witness.check()
    event, delta = event_for(study, settings.public_size, wanted), site_delta(study.privacy.delta, settings.public_size)
    ledger = Ledger(settings.ledger, settings.name)
    charge = ledger.reserve(
        study.hash, settings.dataset_id, 0, event, delta=delta, budget_epsilon=wanted, lifetime=settings.lifetime,
        purpose="statistics",
    )  # fmt: skip
    noised = with_noise(counts, event.noise_multiplier, SecureRandom())
    told = Noised(
        site=settings.name, study=study.hash, threshold=threshold,
        patients=rounded_count(settings.public_size), epsilon=wanted, delta=delta,
        noise_multiplier=event.noise_multiplier,
        histograms=tuple(
            Histogram.model_validate({"question": question, "of": of, "counts": tuple(int(v) for v in part)})
            for (question, of), part in zip(questions(study), noised, strict=True)
        ),
    )  # fmt: skip
    content = (told.model_dump_json(indent=1) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)
    ledger.settle(charge.id)
    witness.note()
    digest = hashlib.sha256(content).hexdigest()
    log.append("out", message="statistics", study=study.hash, answer="Statistics", bytes=len(content), digest=digest,
               epsilon=charge.epsilon_after, noise_multiplier=event.noise_multiplier)  # fmt: skip
    return Answer(told, False, _with_training(told, study, settings))


def counted(found: Measured, study: Study) -> list[NDArray[np.int64]]:
    """Exact histograms, in the order of :func:`questions`. Never leave. A patient is in one bin of each at most."""
    histograms = []
    for question, of in questions(study):
        values = _values(found, question, of)
        bins = np.zeros(len(QUESTIONS[question]) + 1, np.int64)
        for value in values:
            bins[bisect_right(QUESTIONS[question], value)] += 1
        histograms.append(bins)
    return histograms


def with_noise(counts: Sequence[NDArray[np.int64]], sigma: float, random: SecureRandom) -> list[NDArray[np.int64]]:
    """Counts + N(0, σ² × number of histograms), to whole numbers."""
    scale = sigma * math.sqrt(len(counts))
    return [np.rint(part + scale * random.normal(len(part))).astype(np.int64) for part in counts]


def _values(found: Measured, question: str, of: str) -> list[float]:
    """One number per patient."""
    if question == "volume_ml" or " " in of:
        mask, value = of.split(" ")
        entry = found.labels.get(mask, {}).get(value, {"ml": [], "share": []})
        return [0.0] * len(entry["share"]) if question == "patients" else list(entry["ml"])
    group = found.images.get(of, {})
    if question == "patients":
        return [0.0] * len(group.get("greys", ()))
    if question == "grey_p50":
        return [float(greys[2]) for greys in group.get("greys", ())]
    side = min if question == "finest_voxel_mm" else max
    return [float(side(voxel)) for voxel in group.get("voxel", ())]


def _with_training(told: Noised, study: Study, settings: SiteSettings) -> float:
    events = [event_for(study, settings.public_size, told.epsilon)]
    if settings.role is Role.TRAIN:
        events.append(training_event(study, settings.public_size))
    return epsilon(events, told.delta, grid=COARSE_GRID)
