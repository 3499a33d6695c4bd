# SPDX-License-Identifier: Apache-2.0
"""Statistics of a data set for a private study: counted, noised, charged, written down, and told once.

    1. the policy permits statistics and the study (:mod:`.telling`), and the ledger is the one that the audit log knows
    2. every patient is counted once in each histogram of :mod:`fedneuro.privacy.noised_statistics`
    3. noise is drawn, and the answer is kept beside its place in ``state/statistics``
    4. the ledger is charged, on disk, for the whole data set: those who train and those who are evaluated
    5. its head and the answer's check sum are in the audit log; then the answer takes its place

A study is answered once: the same question gets the same numbers again, which costs nothing. A second look with fresh
noise would be a second release. What was drawn and not paid for was seen by nobody and is thrown away; what was paid
for when the process died is the answer.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...privacy.accounting import COARSE_GRID, epsilon
from ...privacy.budget import site_delta, training_event
from ...privacy.contract import Role
from ...privacy.data_statistics import LEAST, rounded_count
from ...privacy.errors import BadInput, FedNeuroError
from ...privacy.file_lock import locked_file
from ...privacy.identity import replace_file
from ...privacy.ledger import Ledger
from ...privacy.noise import SecureRandom
from ...privacy.noised_statistics import QUESTIONS, Histogram, Noised, event_for, questions
from ...privacy.seals import as_text
from ...privacy.study import Study
from ..gatekeeper import audit_log
from ..ledger_witness import LedgerWitness
from ..settings import SiteSettings
from .statistics import Measured
from .telling import content_of, note_refusal, note_told, require_permission

__all__ = ["Answer", "counted", "release_noised"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What may be handed over, and what it cost.

    Attributes:
        told: the content of the file.
        again: whether it was told before, at no new cost.
        with_training: ε of a patient together with the study's training here, composed, at the file's δ.
    """

    told: Noised
    again: bool
    with_training: float


def release_noised(
    found: Measured,
    settings: SiteSettings,
    study: Study,
    wanted: float,
    *,
    threshold: int = LEAST,
    signature: bytes = b"",
) -> Answer:
    """Charge the ledger and make the answer.

    Args:
        found: of the data set of ``settings``.
        settings: the hospital's, as in ``node.toml``.
        study: a private one.
        wanted: ε that the hospital grants, above 0.
        threshold: patients that the public cohort must have, at least 5.
        signature: the coordinator's under the study, for policies that approve by signature.

    Raises:
        Refused, BudgetExhausted, LedgerDistrusted: the hospital does not permit it, or the ledger does not cover it.
        BadInput: ``wanted`` or ``threshold`` is out of range.
        OSError, EnvironmentProblem: it could not be written down; nothing may be handed over.
    """
    if not 0 < wanted <= 1000:
        raise BadInput(f"--epsilon {wanted:g}: expected a number above 0, at most 1000")
    settings = require_permission(settings, study, threshold=threshold, epsilon=wanted, signature=signature)
    path = settings.state / "statistics" / f"{study.hash}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path.parent / "lock", "statistics"):
        if path.is_file():
            return _answer(path, study, settings, again=True)
        ledger = Ledger(settings.ledger, settings.name)
        witness = LedgerWitness(settings, log := audit_log(settings), log.append)
        try:
            witness.check()
            paid = _paid_for(path, ledger, found, settings, study, wanted, threshold)
        except FedNeuroError as error:
            note_refusal(settings, study, error)
            raise
        witness.note()
        answer = _answer(paid, study, settings, again=False)
        note_told(answer.told, settings)
        paid.replace(path)
        return answer


def _paid_for(
    path: Path,
    ledger: Ledger,
    found: Measured,
    settings: SiteSettings,
    study: Study,
    wanted: float,
    threshold: int,
) -> Path:
    """Steps 3 and 4: an answer that nobody has seen, and that the ledger has paid for.

    Its name counts the study's charges: one that was drawn for a charge which never came is passed over.
    """
    charges = len(ledger.events(study.hash, settings.dataset_id, "statistics"))
    if (paid := path.with_suffix(f".drawn-{charges}")).is_file():
        return paid
    drawn = path.with_suffix(f".drawn-{charges + 1}")
    _draw(drawn, found, settings, study, wanted, threshold)
    try:
        _charge(ledger, settings, study, wanted)
    except FedNeuroError:
        drawn.unlink(missing_ok=True)
        raise
    return drawn


def _draw(path: Path, found: Measured, settings: SiteSettings, study: Study, wanted: float, threshold: int) -> None:
    """Step 3: an answer that nobody has seen."""
    event, delta = event_for(study, settings.public_size, wanted), site_delta(study.privacy.delta, settings.public_size)
    noised = with_noise(counted(found, study), event.noise_multiplier, SecureRandom())
    told = Noised(
        site=settings.name, study=study.hash, threshold=threshold,
        patients=rounded_count(settings.public_size), epsilon=wanted, delta=delta,
        noise_multiplier=event.noise_multiplier,
        histograms=tuple(
            Histogram.model_validate({"question": question, "of": of, "counts": tuple(int(v) for v in part)})
            for (question, of), part in zip(questions(study), noised, strict=True)
        ),
    )  # fmt: skip
    replace_file(path, as_text(content_of(told)).encode())


def _charge(ledger: Ledger, settings: SiteSettings, study: Study, wanted: float) -> None:
    """Step 4. It settles itself: the answer is drawn, and nothing is computed after the charge that could fail."""
    event, delta = event_for(study, settings.public_size, wanted), site_delta(study.privacy.delta, settings.public_size)
    charge = ledger.reserve(
        study.hash, settings.dataset_id, 0, event, delta=delta, budget_epsilon=wanted, lifetime=settings.lifetime,
        purpose="statistics",
    )  # fmt: skip
    ledger.settle(charge.id)


def _answer(path: Path, study: Study, settings: SiteSettings, *, again: bool) -> Answer:
    try:
        told = Noised.model_validate_json(path.read_bytes())
    except ValueError as error:
        text = f"{path}: is not as it was written; put it back from a backup: the answer is paid for, and given once"
        raise BadInput(text) from error
    events = [event_for(study, settings.public_size, told.epsilon)]
    if settings.role is Role.TRAIN:
        events.append(training_event(study, settings.public_size))
    return Answer(told, again, epsilon(events, told.delta, grid=COARSE_GRID))


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
