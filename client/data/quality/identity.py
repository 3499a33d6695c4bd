# SPDX-License-Identifier: Apache-2.0
"""Looks for what should not be in a shared data set: names, dates, hospital numbers, in headers, text and file names.

Patterns find dates and the usual field names; they cannot know every name. So the absence of a finding is no proof,
and the report says so.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .catalogue import Finding

__all__ = ["judge_names", "judge_texts", "suspicious"]

_DATE: Final = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-./]?(?:0[1-9]|1[0-2])[-./]?(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[./](?:0?[1-9]|1[0-2])[./](?:19|20)?\d\d)(?!\d)"
)
_WORD: Final = re.compile(
    r"\b[A-Za-zÀ-ÿ'-]{2,}\^[A-Za-zÀ-ÿ'-]+|patient ?name|birth ?date|\bDOB\b|\bMRN\b", re.IGNORECASE
)
_FIELDS: Final = re.compile(
    r"patient_?(?:s?name|id|birth|address|phone)|birth_?(?:date|day)|^dob$|^mrn$|^name$|(?:first|last|family|given|sur)_?name"
    r"|accession|institution|station_?name|physician|operator|(?:study|series|acquisition|content|scan)_?(?:date|datetime)"
    r"|acq(?:uisition)?_?time$|instance_?uid|device_?serial|^address$|^phone|insurance|social_?security",
    re.IGNORECASE,
)
MAX_BYTES: Final = 4 << 20


def suspicious(text: str) -> bool:
    """Whether text from a header holds a date or a name as DICOM writes it."""
    return bool(_DATE.search(text) or _WORD.search(text))


def judge_texts(root: Path, texts: list[Path]) -> Iterator[Finding]:
    """Fields of side-cars and columns of tables that identify, and dates in them."""
    for path in texts:
        name = path.relative_to(root).as_posix()
        patient = next((part for part in path.relative_to(root).parts if part.startswith("sub-")), "").split("_")[0]
        patients = (patient,) if patient else ()
        try:
            content = path.read_bytes()[:MAX_BYTES].decode("utf-8-sig", "replace")
        except OSError:
            continue
        if path.name == "dataset_description.json" or path.name.endswith("dseg.tsv"):  # a column of structures' names
            continue
        found = sorted(set(_json(content) if path.suffix == ".json" else _table(content, path.suffix)))
        if found:
            yield Finding("identity-text", patients, f"{name}: {', '.join(found[:5])}")


def _json(content: str) -> Iterator[str]:
    try:
        values = json.loads(content)
    except ValueError:
        return
    yield from _walk(values)


def _walk(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            if _FIELDS.search(str(key)) and value not in ("", None, [], "n/a"):
                yield str(key)
            yield from _walk(value)
    elif isinstance(values, list):
        for value in values:
            yield from _walk(value)
    elif isinstance(values, str) and _WORD.search(values):
        yield "a name"


def _table(content: str, suffix: str) -> Iterator[str]:
    if suffix not in (".tsv", ".csv"):
        if _WORD.search(content):
            yield "a name"
        return
    rows = list(csv.reader(content.splitlines(), delimiter="\t" if suffix == ".tsv" else ","))
    if not rows:
        return
    for number, column in enumerate(rows[0]):
        cells = [row[number] for row in rows[1:] if len(row) > number and row[number] not in ("", "n/a")]
        if cells and _FIELDS.search(column.strip()):
            yield f"column {column}"
        elif any(_DATE.fullmatch(cell.strip()[:10]) for cell in cells):
            yield f"dates in column {column}"
        elif any("^" in cell and _WORD.search(cell) for cell in cells):
            yield f"names in column {column}"


def judge_names(patients: tuple[str, ...]) -> Iterator[Finding]:
    """Patient ids that are dates."""
    dated = tuple(patient for patient in patients if _DATE.search(patient.removeprefix("sub-")))
    if dated:
        yield Finding("identity-name", dated, f"{', '.join(dated[:3])}: like a date of birth or of a visit")
