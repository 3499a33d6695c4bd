# SPDX-License-Identifier: Apache-2.0
"""Judging a model patient by patient. Nothing here leaves: the values of single patients stay at the site.

A patient on whom inference fails (a network that gives NaN, an image that it cannot take) is counted and has the worst
score that there is; nobody is left out of a mean because the model broke down. Where it fails on *every* patient with
an error, that is a fault of the set-up, and the error goes on to the site's log.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..models.metrics import LESION_RULES, ScanRules, failed_scores, scan_scores
from ..models.metrics.overlap import MM3_PER_ML
from ..models.spec import OUTCOMES, TaskSection
from ..privacy.study import Study
from .data import Scan
from .data.outcomes import Outcome
from .inference import class_probabilities, label_map, predicted_outcome
from .session import Session

__all__ = ["CHEAP", "PatientResult", "SeeScan", "judge_patients", "metrics_now", "scan_rules"]

CHEAP = frozenset({"dice", "accuracy", "auroc", "mae", "rmse", "c_index"})
"""Metrics of every evaluation; the others are computed in the final one."""

_FAILURES = (RuntimeError, ValueError, ArithmeticError)


@dataclass(slots=True, kw_only=True)
class PatientResult:
    """What is known of one patient after evaluation.

    Attributes:
        scores: segmentation: metric by name, the mean over the patient's scans; undefined ones are absent.
        probability: classification: ``(classes,)``, the mean over slices and scans.
        target: classification: the true class.
        predicted: regression: the number; survival: the mean time without the event (:func:`.predicted_outcome`).
        outcome: regression, survival: what became of the patient.
        failure: why inference failed; empty where it did not.
        millilitres: segmentation: volume of all lesions of the first scan, 0 for none; None: voxel size unknown.
        drawn: segmentation: labels that the reference of a scan holds.
    """

    scores: dict[str, float] = field(default_factory=dict)
    probability: NDArray[np.float64] | None = None
    target: int = 0
    predicted: float | None = None
    outcome: Outcome | None = None
    failure: str = ""
    millilitres: float | None = None
    drawn: set[str] = field(default_factory=set)


SeeScan = Callable[[str, Scan, NDArray[np.int64] | NDArray[np.float64], dict[str, float]], None]
"""Told of every scan that was judged: patient, scan, label map, probabilities or predicted outcome, scores."""


def metrics_now(study: Study, *, final: bool) -> tuple[str, ...]:
    """The study's metrics that are computed now, in its order."""
    return tuple(m for m in study.metric_names if final or m in CHEAP or m == study.select_metric)


def scan_rules(study: Study) -> ScanRules:
    """What the study fixes of its segmentation metrics."""
    evaluation = study.evaluation
    return ScanRules(
        labels=study.task.labels,
        tolerance=evaluation.nsd_tolerance,
        lesions=LESION_RULES[evaluation.lesions],
        cuts=evaluation.lesion_cuts,
    )


def judge_patients(session: Session, names: Iterable[str], see: SeeScan | None = None) -> dict[str, PatientResult]:
    """Judge every evaluated patient with the network that is loaded, in evaluation mode.

    Args:
        session: the study at this site.
        names: metrics that are wanted of a segmentation.
        see: told of each scan, for pictures.

    Raises:
        RuntimeError, ValueError, ArithmeticError: inference raised it for every patient.
        DataError: a file was changed since the data set was opened.
    """
    names, errors, found = tuple(names), list[Exception](), dict[str, PatientResult]()
    kind = session.study.task.kind
    judge = _foreseen if kind in OUTCOMES else _segmented if kind == "segmentation" else _classified
    for patient in session.evaluated:
        scans = session.data.scans(patient)
        found[patient] = judge(session, patient, scans, names, see, errors)
    if errors and len(errors) >= sum(len(session.data.scans(patient)) for patient in session.evaluated):
        raise errors[0]
    return found


def _segmented(
    session: Session,
    patient: str,
    scans: Iterable[Scan],
    names: tuple[str, ...],
    see: SeeScan | None,
    errors: list[Exception],
) -> PatientResult:
    result, rules, scores = PatientResult(), scan_rules(session.study), dict[str, list[float]]()
    for scan in scans:
        truth = scan.label.numpy()
        result.drawn |= {label for value, label in enumerate(rules.labels, 1) if (truth == value).any()}
        if result.millilitres is None and scan.spacing is not None:
            result.millilitres = int(np.count_nonzero(truth)) * float(np.prod(scan.spacing)) / MM3_PER_ML
        try:
            prediction = label_map(session, scan.image).numpy()
        except _FAILURES as error:
            errors += [] if isinstance(error, FloatingPointError) else [error]
            result.failure = f"{scan.name}: {type(error).__name__}: {error}"
            found = failed_scores(truth, scan.spacing, names, rules)
        else:
            found = scan_scores(prediction, truth, scan.spacing, names, rules)
            if see:
                see(patient, scan, prediction, found)
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
    result.scores = {name: float(np.mean(per_scan)) for name, per_scan in scores.items()}
    return result


def _classified(
    session: Session,
    patient: str,
    scans: Iterable[Scan],
    names: tuple[str, ...],  # noqa: ARG001 - a cohort's metrics need the probabilities alone
    see: SeeScan | None,
    errors: list[Exception],
) -> PatientResult:
    scans = tuple(scans)
    result = PatientResult(target=int(scans[0].label))
    try:
        per_scan = [class_probabilities(session, scan.image) for scan in scans]
    except _FAILURES as error:
        errors += [] if isinstance(error, FloatingPointError) else [error] * len(scans)
        result.failure = f"{scans[0].name}: {type(error).__name__}: {error}"
        classes = len(session.study.task.labels)
        # Sure of every class but the true one.
        wrong = np.full(classes, 1 / (classes - 1))
        wrong[result.target] = 0.0
        result.probability = wrong
        return result
    probability: NDArray[np.float64] = np.mean(per_scan, axis=0)
    result.probability = probability
    if see:
        see(patient, scans[0], probability, {})
    return result


def _foreseen(
    session: Session,
    patient: str,
    scans: Iterable[Scan],
    names: tuple[str, ...],  # noqa: ARG001 - a cohort's metrics need the predictions alone
    see: SeeScan | None,
    errors: list[Exception],
) -> PatientResult:
    scans, task = tuple(scans), session.study.task
    outcome = session.data.outcomes[patient]
    result = PatientResult(outcome=outcome)
    try:
        result.predicted = float(np.mean([predicted_outcome(session, scan.image) for scan in scans]))
    except _FAILURES as error:
        errors += [] if isinstance(error, FloatingPointError) else [error] * len(scans)
        result.failure = f"{scans[0].name}: {type(error).__name__}: {error}"
        result.predicted = _worst_prediction(outcome, task)
    result.scores["error"] = _error(result.predicted, outcome, task)
    if see and not result.failure:
        see(patient, scans[0], np.array([result.predicted]), {})
    return result


FAR: Final = 3.0
"""Spreads (``task.scale``) from the centre that are predicted where inference failed, on the wrong side."""


def _worst_prediction(outcome: Outcome, task: TaskSection) -> float:
    """What counts where inference failed: for survival the end of time that is wrong, else a far number."""
    if task.kind == "survival":
        return task.time_cuts[-1] if outcome.event else 0.0
    return task.centre + (-FAR if outcome.value > task.centre else FAR) * task.scale


def _error(predicted: float, outcome: Outcome, task: TaskSection) -> float:
    """How far off, in the unit; survival: within the time that is modelled, and nothing beyond the end of observation.

    For the site's own eyes; no metric of survival is made of it.
    """
    if task.kind == "regression":
        return abs(predicted - outcome.value)
    observed = min(outcome.value, task.time_cuts[-1])
    return abs(predicted - observed) if outcome.event else max(0.0, observed - predicted)
