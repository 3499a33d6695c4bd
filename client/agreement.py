# SPDX-License-Identifier: Apache-2.0
"""How a released model's predictions agree with what the hospital knows of its own patients, in a line.

A hospital should look at this before it trusts a model from elsewhere. Nothing of it leaves.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..models import metrics as m
from ..models.spec import TaskSection
from ..privacy.errors import DataError
from .data import checks
from .data.outcomes import Outcome, outcome_of

__all__ = ["agreement", "known_of"]

Table = Mapping[str, Mapping[str, str]]
Known = Mapping[str, Outcome]
"""Patient: what is known; of a class its number."""


def known_of(table: Table | None, patients: Sequence[str], task: TaskSection) -> dict[str, Outcome]:
    """Class or outcome of the patients whom ``participants.tsv`` names; of the others nothing is known."""
    found: dict[str, Outcome] = {}
    for patient in patients if table else ():
        try:
            if task.kind == "classification":
                table_ = checks.check_target(table, task.target)
                found[patient] = Outcome(checks.class_of(table_, patient, task.target, task.labels))
            else:
                found[patient] = outcome_of(table or {}, patient, task)
        except DataError:
            continue
    return found


def agreement(known: Known, predicted: Mapping[str, Sequence[Sequence[float]]], task: TaskSection) -> str:
    """The line; empty where nothing can be compared.

    Args:
        known: of patients.
        predicted: patient: per scan the probability of each class, or the one number; scans are averaged.
        task: what is predicted.
    """
    patients = [patient for patient in predicted if patient in known]
    if not patients:
        return ""
    values = np.array([np.mean(predicted[patient], axis=0) for patient in patients])
    observed = np.array([known[patient].value for patient in patients])
    what = f"{len(patients)} patients whose {task.target} is in participants.tsv"
    if task.kind == "classification":
        area = m.auroc(values, observed.astype(np.int64))
        ranks = "" if area is None else f", AUROC {area:.3f}"
        return f"accuracy {m.accuracy(values, observed.astype(np.int64)):.3f}{ranks} over {what}"
    unit = f" {task.unit}".rstrip()
    if task.kind == "regression":
        error = np.abs(values[:, 0] - observed)
        guess = np.abs(np.median(observed) - observed)
        return f"mean error {error.mean():.3g}{unit} over {what}; their median for everybody: {guess.mean():.3g}{unit}"
    index = m.c_index(-values[:, 0], observed, np.array([known[patient].event for patient in patients]))
    return f"C-index {index:.3f} over {what}" if index is not None else ""
