# SPDX-License-Identifier: Apache-2.0
"""Turns public data into site folders, as hospitals would hold them. The sites that are made here are simulated.

:func:`import_tumour_jpg` reads the brain-tumour slices of Cheng (figshare 1512427, CC BY 4.0). They carry no patient or
hospital id, and neighbouring slices show one person, so a contiguous *block* of slices is taken as one patient and is
never cut. :func:`split_site` deals one BIDS data set out to several sites.
Both write the word *simulated* into ``dataset_description.json``, and results on such sites say nothing about
how a model travels between real hospitals.
"""

import csv
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..client.data.bids import find_patients, read_participants
from ..client.data.split import keyed_fraction
from ..privacy.errors import BadInput, DataError, EnvironmentProblem, StateError

__all__ = ["import_tumour_jpg", "split_site"]

TARGET = "tumour_type"
_COLUMNS = ("class_name", "file", "block")
# Rows of the picture run to the back, columns to the patient's left, as an axial slice is shown. Nominal: the
# slices are axial, coronal and sagittal, and which is which was not published.
_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def import_tumour_jpg(source: Path, out: Path, sites: int = 4, *, size: int = 128) -> dict[str, int]:
    """Write ``out/sim-1`` … as BIDS folders for classification: 2D images of suffix T1w, classes in ``tumour_type``.

    Args:
        source: folder with ``index.csv`` and the JPEG files.
        out: folder of the sites; sites must not exist there yet.
        sites: how many; every site gets blocks of every class.
        size: side of the square images in pixels, 8 to 256; the originals have 512. The voxel size is not known.

    Returns:
        Patients (blocks) by site.

    Raises:
        DataError: no such data, or fewer blocks of a class than sites.
        StateError: a site is there already.
    """
    if not 8 <= size <= 256:
        raise BadInput(f"size = {size}; expected 8 to 256 pixels")
    blocks = _read_index(source / "index.csv")
    places = _deal(blocks, sites)
    names = _new_sites(out, sites, f"Brain tumour slices of {source.name}, a block of slices taken as a patient")
    for site, chosen in zip(names, places, strict=True):
        for block in chosen:
            _write_block(source, out / site, block, blocks[block][1], size)
        rows = ({"participant_id": block, TARGET: blocks[block][0]} for block in chosen)
        _write_table(out / site, ("participant_id", TARGET), rows)
    return {site: len(chosen) for site, chosen in zip(names, places, strict=True)}


def _read_index(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Class and files of each block, by the patient id that it is given."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = {(f"sub-block{int(row['block']):03d}", row["class_name"]) for row in rows}
    except (OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected a table with columns {', '.join(_COLUMNS)}"
        ) from error
    if not rows or len({block for block, _ in found}) != len(found):
        raise DataError(f"{path}: empty, or a block with slices of two classes; expected one class per block")
    blocks: dict[str, tuple[str, list[str]]] = {block: (kind, []) for block, kind in sorted(found)}
    for row in rows:
        blocks[f"sub-block{int(row['block']):03d}"][1].append(row["file"])
    return blocks


def _deal(blocks: Mapping[str, tuple[str, list[str]]], sites: int) -> list[list[str]]:
    """Blocks of each site: class by class, in the order of a hash of the id, one to each site in turn."""
    by_class: dict[str, list[str]] = defaultdict(list)
    for block, (kind, _) in blocks.items():
        by_class[kind].append(block)
    fewest = min(len(members) for members in by_class.values())
    if not 1 <= sites <= fewest:
        raise BadInput(f"sites = {sites}; expected 1 to {fewest}, so that every site gets every class")
    places: list[list[str]] = [[] for _ in range(sites)]
    turn = 0
    for kind in sorted(by_class):
        for block in sorted(by_class[kind], key=lambda name: hashlib.sha256(name.encode()).digest()):
            places[turn % sites].append(block)
            turn += 1
    return [sorted(chosen) for chosen in places]


def _write_block(source: Path, site: Path, patient: str, files: Iterable[str], size: int) -> None:
    import nibabel
    from PIL import Image

    nib: Any = nibabel  # its own annotations are partial
    folder = site / patient / "anat"
    folder.mkdir(parents=True)
    for run, name in enumerate(files, 1):
        try:
            with Image.open(source / name) as picture:
                grey = np.asarray(picture.convert("L").resize((size, size), Image.Resampling.BOX))
        except OSError as error:
            raise DataError(f"{source / name}: cannot be read ({error}); expected a JPEG picture") from error
        # A picture is (row, column); NIfTI wants (x, y, slice).
        image = nib.Nifti1Image(np.ascontiguousarray(grey.T[:, :, None], dtype=np.uint8), _AFFINE)
        image.header.set_xyzt_units("unknown", "unknown")
        nib.save(image, folder / f"{patient}_run-{run:02d}_T1w.nii.gz")


def split_site(source: Path, out: Path, sites: int, key: str = "fedneuro") -> dict[str, int]:
    """Deal one BIDS data set out to ``out/sim-1`` …, whole patients, by keyed hash of the patient's id.

    Files are not copied but linked, where the file system can. Adding a patient to ``source`` moves no other.

    Args:
        source: BIDS folder.
        out: folder of the sites; sites must not exist there yet.
        sites: how many; their sizes differ, as chance has it.
        key: another key, another deal.

    Returns:
        Patients by site.

    Raises:
        DataError: not a BIDS folder, or a site would stay empty.
        StateError: a site is there already.
    """
    patients = find_patients(source)
    table = read_participants(source)
    places: list[list[str]] = [[] for _ in range(sites)]
    for patient in patients:
        places[int(keyed_fraction(patient, key, "site") * sites)].append(patient)
    if not all(places) or not places:
        raise DataError(
            f"{source}: {len(patients)} patients leave one of {sites} sites empty; use fewer sites or another key"
        )
    names = _new_sites(out, sites, f"Part of {source.name}")
    for site, chosen in zip(names, places, strict=True):
        for patient in chosen:
            for folder in (source / patient, *sorted((source / "derivatives").glob(f"*/{patient}"))):
                _link(folder.resolve(), out / site / folder.relative_to(source))
        if table is not None:
            rows = [table[patient] for patient in chosen if patient in table]
            _write_table(out / site, list(next(iter(table.values()))), rows)
    return {site: len(chosen) for site, chosen in zip(names, places, strict=True)}


def _link(folder: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(folder, target_is_directory=True)
    except OSError:  # Windows without the privilege, or a file system without links
        shutil.copytree(folder, place)


def _new_sites(out: Path, sites: int, name: str) -> list[str]:
    names = [f"sim-{i}" for i in range(1, sites + 1)]
    taken = next((site for site in names if (out / site).exists()), None)
    if taken:
        raise StateError(f"{out / taken} exists; expected a new folder; remove it or give another")
    description = {
        "Name": f"{name} (simulated site)",
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "GeneratedBy": [{"Name": "FedNeuro", "Description": "Simulated: no hospital collected this set of patients."}],
    }
    for site in names:
        try:
            (out / site).mkdir(parents=True)
            (out / site / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
        except OSError as error:
            raise EnvironmentProblem(
                f"{out / site}: cannot be written ({error.strerror}); free the disk or give another folder"
            ) from error
    return names


def _write_table(site: Path, columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> None:
    with (site / "participants.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
