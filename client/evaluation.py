# SPDX-License-Identifier: Apache-2.0
"""Judging a model at a site: per patient, over whole volumes, with intervals over patients.

A training site judges on its validation patients, a held-out site on all of its patients. What leaves is a
mean, a 95 % interval and the public number of patients per metric (and per label), as :mod:`.metric_release` allows;
the values of single patients, the pictures and the site's own report (:mod:`.local_report`) stay in the site's folder.

    1. every patient is judged (:mod:`.evaluation_patients`)
    2. their values become metrics of the cohort (:mod:`.evaluation_cohort`), in the final evaluation also of its groups
       (:mod:`.evaluation_strata`)
    3. in the final evaluation: what stays is written
    4. what may leave of the metrics leaves
"""

import time
from collections.abc import Mapping

import torch

from ..privacy.contract import Arrays, Estimate, EvaluateReply, Role
from ..privacy.released import THRESHOLD, uses_threshold
from ..privacy.study import Study
from .evaluation_cohort import (
    DEFAULT_THRESHOLD,
    cohort_estimates,
    failure_estimate,
    own_threshold,
    strata_estimates,
)
from .evaluation_patients import PatientResult, judge_patients, metrics_now
from .evaluation_pictures import Pictures
from .evaluation_strata import patient_cells
from .local_report import write_local_report
from .methods import load_for_evaluation
from .metric_release import release
from .patient_scores import PatientScores, keep_patient_scores
from .session import Session

__all__ = ["evaluate"]


def evaluate(
    session: Session, number: int, arrays: Arrays, *, final: bool, threshold: float | None = None
) -> EvaluateReply:
    """Judge the global ``arrays`` of round ``number``.

    Args:
        session: the study at this site.
        number: round of the model; 0 is the untrained one.
        arrays: its weights.
        final: compute every metric of the study, and write the local pictures and report.
        threshold: of sensitivity and specificity, as the training sites chose it; None: none did.
    """
    started = time.monotonic()
    study = session.study
    load_for_evaluation(session, number, arrays)
    session.network.eval()
    names, used = metrics_now(study, final=final), DEFAULT_THRESHOLD if threshold is None else threshold
    pictures = Pictures(session) if final and session.evaluated else None
    with torch.inference_mode():
        results = judge_patients(session, names, pictures.see if pictures else None)
    if pictures:
        pictures.close()
    metrics = cohort_estimates(study, names, results, used) | failure_estimate(study, results)
    if final:
        cells = patient_cells(session, results)
        metrics |= strata_estimates(study, results, cells, used)
        if uses_threshold(study) and results:
            metrics[THRESHOLD] = Estimate(mean=used, low=used, high=used, n=len(results))
        keep_patient_scores(session, number, arrays, _scores(study, results))
        if study.evaluation.worst:
            _report(session, number, metrics, results, cells)
    elif session.settings.role is Role.TRAIN:
        metrics |= own_threshold(study, results)
    metrics = release(session, number, arrays, metrics, final=final)
    return EvaluateReply(site=session.settings.name, round=number, metrics=metrics, seconds=time.monotonic() - started)


def _report(
    session: Session,
    number: int,
    metrics: Mapping[str, Estimate],
    results: Mapping[str, PatientResult],
    cells: Mapping[str, Mapping[str, str]],
) -> None:
    """Write the site's own report; where that fails the evaluation stands, and the site's log says why."""
    try:
        write_local_report(session, number, metrics, results, cells)
    except (RuntimeError, ValueError, ArithmeticError, OSError) as error:
        session.notes.append(f"the site's own report was not written: {type(error).__name__}: {error}")


def _scores(study: Study, results: Mapping[str, PatientResult]) -> PatientScores:
    """The values of single patients, as they are kept at the site."""
    kept: PatientScores = {}
    for patient, result in results.items():
        kept[patient] = dict(result.scores)
        if study.task.kind == "segmentation":
            kept[patient] |= {} if result.millilitres is None else {"reference_ml": result.millilitres}
            kept[patient] |= {f"absent_{label}": 1.0 for label in study.task.labels if label not in result.drawn}
        if result.probability is not None:
            right = result.probability.argmax() == result.target and not result.failure
            kept[patient] |= {"accuracy": float(right), "class": float(result.target)}
            kept[patient] |= {f"probability_{label}": float(p) for label, p in enumerate(result.probability)}
        if result.predicted is not None and result.outcome is not None:
            kept[patient] |= {"predicted": result.predicted, "observed": result.outcome.value}
            error = kept[patient].pop("error")
            survival = study.task.kind == "survival"
            kept[patient] |= {"event": float(result.outcome.event)} if survival else {"mae": error}
        if result.failure:
            kept[patient]["failures"] = 1.0
    return kept
