# SPDX-License-Identifier: Apache-2.0
"""Who the patients of simulated sites are: a table per site with small cells suppressed, and traits for strata.

Read from ``participants.tsv`` and from the side-car of a patient's first scan. Only a simulation can: it lies on the
machine of somebody who owns the data. A deployment knows public cohort sizes, and says that it knows no more.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...client.data.bids import read_participants
from ...privacy.errors import DataError
from ...privacy.study import Study
from ...server.statistics.strata import Traits, age_band, cell
from .links import patients_of

__all__ = ["cohort_rows", "majority_class", "traits_of"]

COLUMNS: Final = ("sex", "grade", "scanner", "vendor", "manufacturer", "field_strength", "diagnosis", "group")
"""Columns of participants.tsv that become strata as they are, whatever their case."""
SIDECAR: Final = {"Manufacturer": "vendor", "MagneticFieldStrength": "field strength (T)"}
MOST_GROUPS: Final = 8
"""A column with more values is no stratum."""
UNKNOWN: Final = ("", "n/a", "nan", "none", "unknown")


def traits_of(sites: Mapping[str, Path], study: Study) -> dict[str, dict[str, dict[str, str]]]:
    """Traits of every patient of every site; a site whose table cannot be read has none."""
    found = {name: _site_traits(folder, study) for name, folder in sites.items()}
    groups: dict[str, set[str]] = {}
    for patients in found.values():
        for traits in patients.values():
            for trait, value in traits.items():
                groups.setdefault(trait, set()).add(value)
    wide = {trait for trait, values in groups.items() if len(values) > MOST_GROUPS}
    return {
        name: {
            patient: {trait: value for trait, value in traits.items() if trait not in wide}
            for patient, traits in patients.items()
        }
        for name, patients in found.items()
    }


def _site_traits(folder: Path, study: Study) -> dict[str, dict[str, str]]:
    try:
        table = read_participants(folder) or {}
        patients = patients_of(folder)
    except DataError:
        return {}
    return {patient: _traits(folder, patient, table.get(patient, {}), study) for patient in patients}


def _traits(folder: Path, patient: str, row: Mapping[str, str], study: Study) -> dict[str, str]:
    lower = {column.lower(): value for column, value in row.items()}
    found = {column: lower[column] for column in COLUMNS if lower.get(column, "").lower() not in UNKNOWN}
    if band := age_band(lower.get("age", "")):
        found["age"] = band
    if study.task.kind == "classification" and row.get(study.task.target):
        found["class"] = row[study.task.target]
    sidecar = next(iter(sorted((folder / patient).rglob(f"*_{study.data.modalities[0]}.json"))), None)
    if sidecar is not None:
        try:
            values = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            values = {}
        if isinstance(values, dict):
            found |= {name: str(values[key]) for key, name in SIDECAR.items() if key in values}
    return found


def cohort_rows(sites: Mapping[str, Path], traits: Traits) -> list[dict[str, Any]]:
    """Per site the number of patients and of each trait's groups; counts under five are shown as "<5"."""
    rows = []
    for name, folder in sites.items():
        try:
            count = len(patients_of(folder))
        except DataError:
            count = 0
        groups: dict[str, Counter[str]] = {}
        for patient in traits.get(name, {}).values():
            for trait, value in patient.items():
                groups.setdefault(trait, Counter())[value] += 1
        shown = {
            trait: {value: cell(number) for value, number in sorted(counts.items())}
            for trait, counts in sorted(groups.items())
        }
        rows.append({"site": name, "patients": cell(count), "groups": shown})
    return rows


def majority_class(train: Mapping[str, Path], study: Study) -> int | None:
    """Number of the class that most patients of the training hospitals have; None where it cannot be known."""
    counts: Counter[str] = Counter()
    for folder in train.values():
        try:
            table = read_participants(folder) or {}
        except DataError:
            continue
        counts.update(row.get(study.task.target, "") for row in table.values())
    known = [label for label in study.task.labels if counts[label]]
    return study.task.labels.index(max(known, key=lambda label: counts[label])) if known else None
