# SPDX-License-Identifier: Apache-2.0
"""From single patients to the exact metrics of a cohort, with 95 % intervals over patients.

They do not leave as such: :mod:`.metric_release` decides what does.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..models import metrics as m
from ..models.spec import OUTCOMES
from ..privacy.contract import Estimate
from ..privacy.errors import ContractViolation, Reason
from ..privacy.released import FAILURES, THRESHOLD, bin_name, uses_threshold
from ..privacy.study import Study
from .evaluation_patients import PatientResult

__all__ = ["DEFAULT_THRESHOLD", "cohort_estimates", "failure_estimate", "own_threshold", "strata_estimates"]

DEFAULT_THRESHOLD = 0.5
"""Of sensitivity and specificity, where no training site gave one."""

Rows = NDArray[np.intp]
Results = Mapping[str, PatientResult]


def cohort_estimates(study: Study, names: Sequence[str], results: Results, threshold: float) -> dict[str, Estimate]:
    """The metrics ``names`` over all patients; those that are undefined are absent.

    Args:
        study: the study.
        names: out of its metrics.
        results: of every evaluated patient.
        threshold: of sensitivity and specificity, with two classes.
    """
    if study.task.kind == "segmentation":
        keys = dict.fromkeys(key for result in results.values() for key in result.scores)
        found = {key: _mean(study, key, [r.scores[key] for r in results.values() if key in r.scores]) for key in keys}
        return {key: estimate for key, estimate in found.items() if estimate is not None}
    found = {name: _of_cohort(study, name, list(results.values()), threshold) for name in names}
    exact = {name: estimate for name, estimate in found.items() if estimate is not None}
    if "reliability" in names:
        exact |= _curve(study, results)
    return exact


def failure_estimate(study: Study, results: Results) -> dict[str, Estimate]:
    """The share of patients on whom inference failed; empty where it never did."""
    failed = [float(bool(result.failure)) for result in results.values()]
    estimate = _mean(study, FAILURES, failed) if any(failed) else None
    return {FAILURES: estimate} if estimate else {}


def own_threshold(study: Study, results: Results) -> dict[str, Estimate]:
    """The threshold that suits these patients best, where the study needs one and both classes are there."""
    if not uses_threshold(study) or not results:
        return {}
    value = m.youden_threshold(*_arrays(list(results.values())))
    return {} if value is None else {THRESHOLD: Estimate(mean=value, low=value, high=value, n=len(results))}


def strata_estimates(
    study: Study, results: Results, cells: Mapping[str, Mapping[str, str]], threshold: float
) -> dict[str, Estimate]:
    """The first metric of the study in every cell that holds a patient, by ``<metric>:<stratum>:<cell>``."""
    name, found = study.metric_names[0], dict[str, Estimate]()
    for stratum, of_patient in cells.items():
        for cell in dict.fromkeys(of_patient.values()):
            inside = [results[patient] for patient, own in of_patient.items() if own == cell]
            if study.task.kind == "segmentation":
                estimate = _mean(study, name, [r.scores[name] for r in inside if name in r.scores])
            else:
                estimate = _of_cohort(study, name, inside, threshold)
            if estimate is not None:
                found[f"{name}:{stratum}:{cell}"] = estimate
    return found


def _mean(study: Study, name: str, values: Sequence[float]) -> Estimate | None:
    """A mean over patients with its interval; of one patient alone, a distance and the like has one of no width.

    Raises:
        ContractViolation: a patient's value is no finite number; left out, it would make the mean look better.
    """
    if not values:
        return None
    evaluation, bounds = study.evaluation, (0.0, 1.0) if name == FAILURES else m.bounds_of(name)
    method = None if evaluation.interval == "auto" else evaluation.interval
    found = m.mean_interval(
        [values], seed=study.study.seed, resamples=evaluation.bootstrap, method=method, bounds=bounds, fewest=1
    )
    if found.failed:
        raise ContractViolation(f"{name} of {found.failed} patients is no finite number", reason=Reason.NON_FINITE)
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    return Estimate(mean=found.mean, low=low, high=high, n=len(values))


def _of_cohort(study: Study, name: str, results: Sequence[PatientResult], threshold: float) -> Estimate | None:
    """A metric of a classification or an outcome over patients; None where it is undefined."""
    judge = _of_outcomes if study.task.kind in OUTCOMES else _statistic
    return judge(study, name, results, threshold)


def _of_outcomes(study: Study, name: str, results: Sequence[PatientResult], _: float) -> Estimate | None:
    known = [(r.predicted, r.outcome.value, r.outcome.event) for r in results if r.predicted is not None and r.outcome]
    if not known:
        return None
    predicted, observed, event = (np.array(values) for values in zip(*known, strict=True))
    if name == "mae":
        return _mean(study, name, np.abs(predicted - observed).tolist())
    resampling = {"resamples": study.evaluation.bootstrap, "seed": study.study.seed}
    if name == "c_index":  # a short time without the event is a high risk
        found = m.c_index_interval(-predicted, observed, event, **resampling)
    else:
        found = m.bootstrap(
            lambda rows: m.root_mean_squared_error(predicted[rows], observed[rows]), len(known), **resampling
        )
    return None if found is None else Estimate(mean=found[0], low=found[1], high=found[2], n=len(known))


def _statistic(study: Study, name: str, results: Sequence[PatientResult], threshold: float) -> Estimate | None:
    statistics: Mapping[str, Callable[[NDArray[np.float64], NDArray[np.int64]], float | None]] = {
        "accuracy": m.accuracy,
        "auroc": m.auroc,
        "auprc": m.auprc,
        "sensitivity": lambda p, t: m.sensitivity(p, t, threshold),
        "specificity": lambda p, t: m.specificity(p, t, threshold),
        "brier": m.brier,
        "ece": lambda p, t: m.ece(p, t, study.evaluation.bins),
    }
    if name not in statistics or not results:
        return None
    p, t = _arrays(results)
    if (counted := _share(name, p, t, threshold)) is not None and statistics[name](p, t) is not None:
        return _mean(study, "accuracy", counted)
    interval = m.bootstrap(
        lambda rows: statistics[name](p[rows], t[rows]),
        len(t),
        resamples=study.evaluation.bootstrap,
        seed=study.study.seed,
    )
    if interval is None:
        return None
    value, *ends = interval
    if name == "auroc":
        ends = list(m.perfect_ends(value, int(np.unique(t, return_counts=True)[1].min())) or ends)
    return Estimate(mean=value, low=ends[0], high=ends[1], n=len(t))


def _share(name: str, p: NDArray[np.float64], t: NDArray[np.int64], threshold: float) -> list[float] | None:
    """The patients of whom a metric is the share that is right, as 0 and 1; None: it is no such share.

    Of ``sensitivity`` these are the patients of the second class alone: so many, and no more, does it speak of.
    """
    right = (p[:, 1] >= threshold) == (t == 1) if p.shape[1] == 2 else None
    if name == "accuracy":
        return [float(found) for found in p.argmax(1) == t]
    if right is not None and name in ("sensitivity", "specificity"):
        return [float(found) for found in right[t == (name == "sensitivity")]]
    return None


def _arrays(results: Sequence[PatientResult]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    probabilities = [result.probability for result in results if result.probability is not None]
    return np.array(probabilities), np.array([result.target for result in results])


def _curve(study: Study, results: Results) -> dict[str, Estimate]:
    if not results:
        return {}
    found = {}
    for point in m.reliability(*_arrays(list(results.values())), study.evaluation.bins):
        predicted = point.predicted
        found[bin_name("predicted", point.number)] = Estimate(mean=predicted, low=predicted, high=predicted, n=point.n)
        found[bin_name("observed", point.number)] = Estimate(
            mean=point.observed, low=point.low, high=point.high, n=point.n
        )
    return found
