# SPDX-License-Identifier: Apache-2.0
"""The values of single patients in the final evaluation: a file in the site's own folder, for the site's own eyes.

Nothing here is sent: no message of :mod:`fedneuro.privacy.contract` has a place for it. In a simulation the site's
folder lies on the researcher's machine, who owns the data, and paired tests and pooled intervals are computed from it
(:mod:`fedneuro.server.statistics`).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..models.state import digest
from ..privacy.contract import Arrays
from .session import Session

__all__ = ["FILE", "PatientScores", "keep_patient_scores"]

FILE: Final = "patient-scores.json"
SCHEMA_VERSION: Final = 1

PatientScores = dict[str, dict[str, float]]
"""Patient: metric: value, the mean over the patient's scans."""


def keep_patient_scores(session: Session, number: int, arrays: Arrays, scores: PatientScores) -> Path:
    """Write the scores of model ``arrays`` of round ``number``; a value that is not finite is written as null."""
    path = session.settings.state / FILE
    content = {
        "schema_version": SCHEMA_VERSION,
        "study_hash": session.study.hash,
        "site": session.settings.name,
        "role": session.settings.role.value,
        "round": number,
        "model_digest": digest(arrays),
        "patients": {patient: _finite(values) for patient, values in scores.items()},
    }
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    temporary.replace(path)
    return path


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
