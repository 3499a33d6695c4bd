# SPDX-License-Identifier: Apache-2.0
"""Names and tables of the data set that an import writes: what is taken already, and what staff added stays."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ....privacy.errors import DataError, StateError
from ..bids import read_participants
from .mapping import Row, read_mapping

__all__ = ["README", "Runs", "load_record", "other_rows", "participants_table"]

README: Final = """Imported from DICOM by FedNeuro.

Patients and sessions are named by keyed hash; the key lies in the node's folder. Dates and private tags were dropped.
Faces were not removed unless the import was told to: treat the images as identifying.
code/dicom_mapping.tsv says what became of each series; edit it and run the import with --mapping to change that.
"""


class Runs:
    """Names of one session that are taken: a second series of the same name gets run-2, in this import or a later one.

    Args:
        record: files by series, of earlier imports into the same folder.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._owner = {Path(path).name.split(".")[0]: key for key, files in record.items() for path in files}

    def stem(self, key: str, row: Row, entities: str, suffix: str) -> str:
        """Name of the file without its ending."""
        number = 1
        while True:
            run = f"run-{number}" if number > 1 else ""
            stem = "_".join(filter(None, (f"{row.patient}_{row.session}", _ordered(entities, run), suffix)))
            if not self.taken(stem, key):
                return stem
            number += 1

    def taken(self, stem: str, key: str) -> bool:
        """Whether another series has a file of this name; if not, this one has it from now on."""
        return self._owner.setdefault(stem, key) != key


def _ordered(entities: str, run: str) -> str:
    """Entities in the order that BIDS wants: task, acq, ce, dir, run, echo, part."""
    order = ("task", "acq", "ce", "rec", "dir", "run", "mod", "echo", "flip", "inv", "part")
    parts = [part for part in (*entities.split("_"), run) if part]
    return "_".join(
        sorted(parts, key=lambda p: order.index(p.split("-")[0]) if p.split("-")[0] in order else len(order))
    )


def other_rows(path: Path, rows: Mapping[str, Row]) -> list[Row]:
    """Rows of an earlier import that this one did not see."""
    try:
        return [row for key, row in read_mapping(path).items() if key not in rows] if path.exists() else []
    except DataError:
        return []


def participants_table(out: Path, patients: list[str]) -> str:
    """The table, with a line for each new patient; lines and columns that staff added stay."""
    table = read_participants(out) or {}
    columns = list(next(iter(table.values()), {"participant_id": ""}))
    lines = [columns]
    for patient in sorted({*table, *patients}):
        row = table.get(patient, {"participant_id": patient})
        lines.append([row.get(column, "n/a") or "n/a" for column in columns])
    return "".join("\t".join(line) + "\n" for line in lines)


def load_record(path: Path) -> dict[str, Any]:
    """Files by series, as earlier imports wrote them.

    Raises:
        StateError: the record cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise StateError(f"{path}: cannot be read ({error}); give a new folder") from error
    return values if isinstance(values, dict) else {}
