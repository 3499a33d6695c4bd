# SPDX-License-Identifier: Apache-2.0
"""Which group each patient belongs to: age band, sex, scanner, size of the lesions.

Age and sex come from ``participants.tsv``, vendor and field strength from the BIDS side-car of a patient's first scan
(or the one at the root of the data set, which all scans inherit), size from the reference mask. Names of groups follow
from the study (:func:`~fedneuro.privacy.study_evaluation.strata_cells`); no text of a hospital's files becomes one.
What is missing or cannot be read is the cell ``unknown``.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ..privacy.study_evaluation import SIZES, UNKNOWN, EvaluationSection, strata_cells
from .data.bids import read_participants
from .evaluation_patients import PatientResult
from .session import Session

__all__ = ["patient_cells"]

MAX_SIDECAR_BYTES: Final = 1 << 20
_SEXES: Final = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "other", "other": "other"}
_VENDORS: Final = (
    ("siemens", "siemens"), ("general electric", "ge"), ("ge ", "ge"), ("ge_", "ge"), ("philips", "philips"),
    ("canon", "canon"), ("toshiba", "canon"), ("fuji", "fujifilm"), ("hitachi", "fujifilm"),
    ("united imaging", "united-imaging"), ("uih", "united-imaging"),
)  # fmt: skip
_FIELDS: Final = ((1.0, 2.0, "1.5T"), (2.0, 4.0, "3T"), (6.0, 8.0, "7T"))

Row = Mapping[str, str]


def patient_cells(session: Session, results: Mapping[str, PatientResult]) -> dict[str, dict[str, str]]:
    """The cell of every patient, for each stratum of the study: ``{stratum: {patient: cell}}``."""
    section = session.study.evaluation
    root = session.settings.data
    table = (read_participants(root) or {}) if section.strata else {}
    found: dict[str, dict[str, str]] = {}
    for stratum, known in strata_cells(section).items():
        of_patient: Callable[[str, PatientResult], str] = {
            "age": lambda patient, _: _age(_field(table.get(patient, {}), "age"), section),
            "sex": lambda patient, _: _SEXES.get(_field(table.get(patient, {}), "sex"), UNKNOWN),
            "vendor": lambda patient, _: _vendor(_sidecar(session, patient).get("Manufacturer")),
            "field": lambda patient, _: _field_strength(_sidecar(session, patient).get("MagneticFieldStrength")),
            "size": lambda _, result: _size(result.millilitres, section),
        }[stratum]
        cells = {patient: of_patient(patient, result) for patient, result in results.items()}
        found[stratum] = {patient: cell if cell in known else UNKNOWN for patient, cell in cells.items()}
    return found


def _field(row: Row, name: str) -> str:
    return next((value.strip().lower() for column, value in row.items() if column.lower() == name), "")


def _age(text: str, section: EvaluationSection) -> str:
    """BIDS writes ages above 89 as "89+"; bands are of whole years."""
    try:
        years = float(text.rstrip("+"))
    except ValueError:
        return UNKNOWN
    if not 0 <= years < 130:
        return UNKNOWN
    return strata_cells(section)["age"][bisect_right(section.age_cuts, years)]


def _vendor(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        return UNKNOWN
    text = value.strip().lower() + " "
    return next((name for start, name in _VENDORS if text.startswith(start)), "other")


def _field_strength(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return UNKNOWN
    tesla = value / 10_000 if value > 100 else value  # some scanners write gauss
    if tesla < 1:
        return "below-1T"
    return next((name for low, high, name in _FIELDS if low <= tesla < high), "other")


def _size(millilitres: float | None, section: EvaluationSection) -> str:
    if not millilitres:  # unknown, or no lesion
        return UNKNOWN
    return SIZES[bisect_right(section.size_cuts, millilitres)]


def _sidecar(session: Session, patient: str) -> Mapping[str, Any]:
    """The side-car of a patient's first scan, with what it inherits from the root of the data set."""
    root, modality = session.settings.data, session.study.data.modalities[0]
    own = next(iter(sorted((root / patient).rglob(f"*_{modality}.json"))), None)
    return {**_read(root / f"{modality}.json"), **(_read(own) if own else {})}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
