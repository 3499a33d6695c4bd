# SPDX-License-Identifier: Apache-2.0
"""BIDS data sets made of patients of other data sets, by symbolic links: no scan is copied.

So a pooled hospital, and the folds of a cross-validation, are data sets like any other: the engine reads them without
knowing. A patient keeps the id where it is unique. Where two hospitals use the same one, the patients get new ids that
fall on the *same side* of the study's split, so that nobody who validates in the federation trains in the pool.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ...client.data import side_of
from ...client.data.bids import find_patients, read_participants
from ...privacy.errors import EnvironmentProblem
from ...privacy.study import Study

__all__ = ["INDEX", "Member", "link_data_set", "patients_of", "read_index", "union"]

INDEX: Final = "members.json"
"""File beside the linked patients that says who is who: new id → [site, id]."""

Member = tuple[str, Path, str]
"""Site, its BIDS folder, the patient's id there."""


def patients_of(folder: Path) -> tuple[str, ...]:
    """Ids of the patients of a BIDS folder, sorted."""
    return find_patients(folder)


def union(sites: Mapping[str, Path]) -> list[Member]:
    """Every patient of every site."""
    return [(name, folder, patient) for name, folder in sites.items() for patient in patients_of(folder)]


def link_data_set(target: Path, members: Sequence[Member], study: Study) -> dict[str, tuple[str, str]]:
    """Make ``target`` a BIDS data set of ``members``; returns site and id of each new id.

    An existing ``target`` is made anew; only links and small texts of ours are in it.

    Args:
        target: the new data set's folder.
        members: its patients.
        study: whose split the new ids respect.

    Raises:
        EnvironmentProblem: the folder cannot be written, or the disk knows no links.
    """
    names = _names(members, study)
    try:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for (_, folder, patient), name in zip(members, names, strict=True):
            _link_tree(folder / patient, target / name, patient, name)
            for pipeline in sorted((folder / "derivatives").glob("*")):
                if (pipeline / patient).is_dir():
                    _link_tree(pipeline / patient, target / "derivatives" / pipeline.name / name, patient, name)
        _write_table(target, members, names)
        description = {"Name": target.name, "BIDSVersion": "1.10.0", "DatasetType": "raw"}
        (target / "dataset_description.json").write_text(json.dumps(description) + "\n", encoding="utf-8")
        index = {name: (site, patient) for (site, _, patient), name in zip(members, names, strict=True)}
        (target / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            f"{target}: cannot be made of links ({error.strerror or error}); give an --out on a disk that has them"
        ) from error
    return index


def read_index(folder: Path) -> dict[str, tuple[str, str]]:
    """What :func:`link_data_set` returned; empty for a folder that it did not make."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: (site, patient) for name, (site, patient) in found.items()}


def _names(members: Sequence[Member], study: Study) -> list[str]:
    counts = Counter(patient for _, _, patient in members)
    taken = {patient for patient, count in counts.items() if count == 1}
    names = []
    for site, _, patient in members:
        name = patient if counts[patient] == 1 else _fresh(site, patient, study, taken)
        taken.add(name)
        names.append(name)
    return names


def _fresh(site: str, patient: str, study: Study, taken: Iterable[str]) -> str:
    """A new id on the patient's own side of the split."""
    key, share = study.data.split_key, study.evaluation.validation_fraction
    side, number = side_of(patient, key, share), 0
    stem = "sub-" + "".join(c for c in site + patient.removeprefix("sub-") if c.isalnum() and c.isascii())
    while True:
        name = stem if not number else f"{stem}x{number}"
        if name not in taken and side_of(name, key, share) == side:
            return name
        number += 1


def _link_tree(source: Path, target: Path, patient: str, name: str) -> None:
    """``target`` shows what is in ``source``, with ``patient`` in file names replaced by ``name``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if name == patient:
        target.symlink_to(source.resolve(), target_is_directory=True)
        return
    for folder, _, files in os.walk(source, followlinks=True):
        inside = target / Path(folder).relative_to(source)
        inside.mkdir(parents=True, exist_ok=True)
        for file in files:
            renamed = name + file.removeprefix(patient) if file.startswith(f"{patient}_") else file
            (inside / renamed).symlink_to((Path(folder) / file).resolve())


def _write_table(target: Path, members: Sequence[Member], names: Sequence[str]) -> None:
    """participants.tsv of all members; a column that a hospital lacks is empty there."""
    tables = {folder: read_participants(folder) for _, folder, _ in members}
    rows = [
        dict((tables[folder] or {}).get(patient, {})) | {"participant_id": name}
        for (_, folder, patient), name in zip(members, names, strict=True)
    ]
    if all(table is None for table in tables.values()):
        return
    columns = ["participant_id", *sorted({column for row in rows for column in row} - {"participant_id"})]
    lines = ["\t".join(columns), *("\t".join(row.get(column, "") or "n/a" for column in columns) for row in rows)]
    (target / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
