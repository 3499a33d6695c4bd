# SPDX-License-Identifier: Apache-2.0
"""The mapping file: one line per series, proposed by the import, edited by staff, read again.

A tab-separated table that a spreadsheet opens. ``action``, ``datatype``, ``entities`` and ``suffix`` may be changed;
the other columns help to decide and are ignored when the file is read. A series that the table does not name gets
the proposal.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from ....privacy.errors import DataError
from ..tables import read_rows

__all__ = ["TAKEN", "Row", "as_table", "read_mapping"]

ACTIONS: Final = ("import", "straighten", "skip", "refused")
TAKEN: Final = ("import", "straighten")
"""Actions that write files; ``straighten`` resamples a CT that gantry tilt has sheared."""
_ENTITIES: Final = re.compile(r"(?:[a-z]+-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*)?")
_SUFFIX: Final = re.compile(r"[A-Za-z0-9]+")
_DATATYPES: Final = ("anat", "dwi", "fmap", "func", "perf", "pet")
_OURS: Final = ("sub", "ses", "run")


@dataclass(frozen=True, slots=True)
class Row:
    """One series in the mapping file; all values are text."""

    series: str
    patient: str
    session: str
    action: str
    datatype: str
    entities: str
    suffix: str
    reason: str
    description: str
    scanner: str
    objects: str
    size: str


def as_table(rows: Sequence[Row]) -> str:
    """The file's text."""
    out = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return out.getvalue()


def read_mapping(path: Path) -> dict[str, Row]:
    """Rows by series.

    Raises:
        DataError: the file cannot be read, a column is missing, a series stands there twice, or a value is no
            BIDS name; the line is named.
    """
    lines = read_rows(path, "\t", "the mapping file of an earlier import, tab-separated in UTF-8")
    names = [field.name for field in fields(Row)]
    needed = ("series", "action", "datatype", "entities", "suffix")
    lacking = [name for name in needed if not lines or name not in lines[0]]
    if lacking:
        raise DataError(f"{path}: no column {', '.join(lacking)}; expected the mapping file of an earlier import")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 2):
        row = Row(**{name: (line.get(name) or "").strip() for name in names})
        _check(row, f"{path} line {number}")
        if row.series in rows:
            raise DataError(f"{path} line {number}: series {row.series} stands there twice; keep one line")
        rows[row.series] = row
    return rows


def _check(row: Row, where: str) -> None:
    if row.action not in ACTIONS:
        raise DataError(f"{where}: action = {row.action!r}; expected import, straighten or skip")
    if row.action not in TAKEN:
        return
    if row.datatype not in _DATATYPES:
        raise DataError(f"{where}: datatype = {row.datatype!r}; expected one of {', '.join(_DATATYPES)}")
    if not _SUFFIX.fullmatch(row.suffix):
        raise DataError(f"{where}: suffix = {row.suffix!r}; expected letters and digits, such as T1w or FLAIR")
    if not _ENTITIES.fullmatch(row.entities) or any(e.split("-")[0] in _OURS for e in row.entities.split("_")):
        raise DataError(
            f"{where}: entities = {row.entities!r}; expected none, or such as ce-gadolinium or acq-sag_ce-gadolinium; "
            "sub, ses and run are set by the import"
        )
