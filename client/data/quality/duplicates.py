# SPDX-License-Identifier: Apache-2.0
"""One person under two names: the same voxels (exact), or nearly the same picture (perceptual).

Exact: SHA-256 of the voxels in RAS+ order, so that repacking, another number type or another storage order of the same
values does not hide a copy. Perceptual: heads brought to 24×24×24 and compared after the cohort's mean was taken
away, for all heads are alike; what is left is the person. Two scans of one person at two visits can also be found
that way; no threshold on real cohorts finds all of them without false alarms, so it is set to find copies that
were rescaled, resampled or noised.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from ....privacy.errors import DataError
from ..bids import read_participants
from ..split import side_of
from .catalogue import Finding
from .files import DataSet
from .look import Look

__all__ = ["judge_duplicates"]

ALIKE: Final = 0.97
"""Correlation of two heads without the mean head from which on they are taken for one person."""
FEWEST: Final = 6
SPLIT_COLUMNS: Final = ("split", "fold", "side", "partition", "subset", "set")


def judge_duplicates(
    data: DataSet, images: list[Look], masks: list[Look], split: tuple[str, float] | None
) -> Iterator[Finding]:
    """Duplicate patients, scans and masks, and leaks between training and test.

    Args:
        data: the files.
        images: of all patients.
        masks: of all patients.
        split: key and validation share of a study; None: only a split column of participants.tsv is looked at.
    """
    sides = _sides(data, split)
    pairs: dict[tuple[str, str], str] = {}
    for one, other, words in [*_exact(images), *_alike(images)]:
        a, b = one.file, other.file
        if a.patient == b.patient:
            if a.what == b.what and words == "the same voxels":
                yield Finding("duplicate-scan", (a.patient,), f"{a.path.name} and {b.path.name}: {words}")
            continue
        first, second = sorted((a.patient, b.patient))
        pairs.setdefault((first, second), f"{a.path.name} and {b.path.name}: {words}")
    for (first, second), words in sorted(pairs.items()):
        yield Finding("duplicate-patient", (first, second), words)
        if sides.get(first) and sides.get(second) and sides[first] != sides[second]:
            yield Finding("duplicate-split", (first, second), f"{first} is {sides[first]}, {second} is {sides[second]}")
    for one, other, _ in _exact([mask for mask in masks if max(mask.values, default=0) > 0]):
        first, second = sorted((one.file.patient, other.file.patient))
        if first != second and (first, second) not in pairs:
            yield Finding("duplicate-mask", (first, second), f"{one.file.path.name} and {other.file.path.name}")
    yield from _same_person(data, sides)


def _exact(looks: list[Look]) -> Iterator[tuple[Look, Look, str]]:
    by_digest: dict[str, list[Look]] = defaultdict(list)
    for look in looks:
        if not any(finding.check == "voxels-constant" for finding in look.findings):
            by_digest[look.digest].append(look)
    for same in by_digest.values():
        for other in same[1:]:
            yield same[0], other, "the same voxels"


def _alike(images: list[Look]) -> Iterator[tuple[Look, Look, str]]:
    by_what: dict[str, list[Look]] = defaultdict(list)
    for look in images:
        if look.cube is not None:
            by_what[look.file.what].append(look)
    for looks in by_what.values():
        if len(looks) < FEWEST:
            continue
        table = np.stack([np.asarray(look.cube, np.float32).ravel() for look in looks])
        table -= np.median(table, axis=0)
        table -= table.mean(axis=1, keepdims=True)
        table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        alike = np.triu(table @ table.T, 1)
        for i, j in np.argwhere(alike > ALIKE):
            if looks[i].digest != looks[j].digest:
                yield looks[i], looks[j], f"nearly the same picture ({alike[i, j]:.3f})"


def _sides(data: DataSet, split: tuple[str, float] | None) -> Mapping[str, str]:
    if split is not None:
        return {patient: side_of(patient, *split) for patient in data.patients}
    column, table = _split_column(data)
    return {patient: row.get(column, "") for patient, row in table.items()} if column else {}


def _split_column(data: DataSet) -> tuple[str, Mapping[str, Mapping[str, str]]]:
    try:
        table = read_participants(data.root) or {}
    except DataError:
        return "", {}
    columns = list(next(iter(table.values()), {}))
    return next((c for c in columns if c.lower() in SPLIT_COLUMNS), ""), table


def _same_person(data: DataSet, sides: Mapping[str, str]) -> Iterator[Finding]:
    """A column of the table that says which rows are one person, across sides."""
    _, table = _split_column(data)
    for column in list(next(iter(table.values()), {})):
        if column.lower() not in ("person", "person_id", "subject", "subject_id", "individual"):
            continue
        persons: dict[str, list[str]] = defaultdict(list)
        for patient, row in table.items():
            if row.get(column, "") not in ("", "n/a"):
                persons[row[column]].append(patient)
        for rows in persons.values():
            if len({sides.get(p, "") for p in rows} - {""}) > 1:
                yield Finding("duplicate-split", tuple(rows), f"one {column} on two sides")
            elif len(rows) > 1:
                yield Finding("duplicate-patient", tuple(rows), f"one {column} in {len(rows)} rows")
