# SPDX-License-Identifier: Apache-2.0
"""Other forms in which data lie about, turned into BIDS: pictures with a table, nnU-Net's raw layout, outcome tables.

Patients get pseudonyms under the node's key, as in the DICOM import, and image headers are written anew, so that
nothing of the old files is carried over but voxels, places and the columns that were asked for. A file that cannot be
used is listed with the reason, and the others go on; the new folder is there whole or not at all.

Reference: nnU-Net v2, documentation/dataset_format.md; FeTS challenge, partitioning_*.csv (Partition_ID, Subject_ID).
"""

import csv
import json
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.errors import BadInput, DataError, EnvironmentProblem, StateError
from .bids import read_participants
from .dicom.convert import save_nifti
from .dicom.identity import Pseudonyms
from .nifti import read_stored
from .tables import read_rows
from .words import said

__all__ = ["Imported", "import_images", "import_nnunet", "import_table"]

_CHANNELS: Final = {
    "t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "t2flair": "FLAIR", "ct": "CT",
    "mri": "T1w",
    "t1c": "ce-gadolinium_T1w", "t1ce": "ce-gadolinium_T1w", "t1gd": "ce-gadolinium_T1w", "t1wce": "ce-gadolinium_T1w",
}  # fmt: skip
# Rows of a picture run to the back, columns to the patient's left, as an axial slice is shown; its place is not known.
_PICTURE: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
_CASE: Final = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})\.nii\.gz")


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of an import."""

    patients: int
    faults: dict[str, str]  # path below the source: why the file is not in


def import_images(
    source: Path, table: Path, out: Path, state: Path, *, patient: str, target: str, file: str, suffix: str, size: int
) -> Imported:
    """2D pictures with a table, one row per picture, to 2D images and a class per patient.

    Args:
        source: folder that the table's paths start from.
        table: CSV with a header.
        out: new BIDS folder.
        state: the node's private folder.
        patient: column that says whose picture it is; all pictures of a patient must have one class.
        target: column of the class; it becomes a column of participants.tsv.
        file: column of the path.
        suffix: BIDS suffix, such as ``T1w``.
        size: side in pixels that pictures are brought to, 8 to 1024.

    Raises:
        DataError: a column or row that cannot be used, or no picture that can.
        BadInput: a size or suffix that cannot be.
        StateError: ``out`` exists.
    """
    if not 8 <= size <= 1024 or not re.fullmatch(r"[A-Za-z0-9]+", suffix):
        raise BadInput(f"size {size}, suffix {suffix!r}: expected 8 to 1024 pixels and a BIDS suffix such as T1w")
    rows = _rows(table, ",", (patient, target, file))
    pictures: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        who, lacking = row[patient].strip(), next((c for c in (patient, target, file) if not row[c].strip()), "")
        if lacking:
            raise DataError(f"{table} line {number}: no {lacking}; expected a value in every row; correct the table")
        if classes.setdefault(who, row[target]) != row[target]:
            raise DataError(f"{table} line {number}: {patient} {who} has two classes; expected one; correct the table")
        pictures[who].append(row[file])
    names = Pseudonyms(state)
    lines, faults = [("participant_id", target)], dict[str, str]()
    with _fresh(out, f"Imported from {table.name}") as stage:
        for who, files in sorted(pictures.items()):
            subject, run = "sub-" + names.name("patient", "", who), 0
            for name in files:
                try:
                    grey = _picture(source, name, size)
                except DataError as error:
                    faults[name] = str(error)
                    continue
                run += 1
                path = stage / subject / "anat" / f"{subject}_run-{run:02d}_{suffix}.nii.gz"
                _write(path, grey, _PICTURE, "unknown")
            if run:
                lines.append((subject, classes[who]))
        _require(len(lines) > 1, faults, source)
        _table(stage / "participants.tsv", lines)
    return Imported(len(lines) - 1, faults)


def _require(something: bool, faults: Mapping[str, str], source: Path) -> None:
    """An import of nothing is a fault of its own."""
    if not something:
        name, why = next(iter(faults.items()), ("", "no file"))
        raise DataError(f"{source}: none of {len(faults)} files can be used; the first: {name}: {why}")


def _picture(source: Path, name: str, size: int) -> Any:
    """Grey values (x, y, 1): bytes, or 32-bit numbers where the picture is deeper than that."""
    from PIL import Image

    path = source / name
    if not path.resolve().is_relative_to(source.resolve()):
        raise DataError(f"leads out of {source}; expected a path below it; correct the table")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                deep = picture.mode.startswith(("I", "F"))
                plain = Image.fromarray(np.asarray(picture, np.float32)) if deep else picture.convert("L")
            grey = np.asarray(plain.resize((size, size), Image.Resampling.BOX))
    except Exception as error:  # a broken picture may raise anything inside Pillow
        system = error.strerror if isinstance(error, OSError) else ""
        detail = system or said(error, 4000).replace(str(path), "it")[:120]
        raise DataError(f"cannot be read ({detail}); expected a picture; export it again") from error
    return np.ascontiguousarray(grey.T[:, :, None])  # (row, column) to (x, y, slice)


def import_nnunet(source: Path, out: Path, state: Path) -> Imported:
    """nnU-Net's raw layout (``imagesTr``, ``labelsTr``, ``dataset.json``) to BIDS, labels as ``_dseg``.

    Each case is taken for one patient; a case with a file that cannot be read is left out.

    Raises:
        DataError: no such layout, or no case that can be read.
        StateError: ``out`` exists.
    """
    try:
        description = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
        channels = {int(k): str(v) for k, v in (description.get("channel_names") or description["modality"]).items()}
        labels = {str(k): v for k, v in description["labels"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"{source}/dataset.json: cannot be used ({why}); expected nnU-Net's raw layout; for pictures give --table"
        ) from error
    found = [
        (match, path)
        for path in sorted((source / "imagesTr").glob("*.nii.gz"))
        if (match := _CASE.fullmatch(path.name))
    ]
    if not found:
        raise DataError(f"{source}/imagesTr: no CASE_0000.nii.gz; expected nnU-Net's raw layout; check the path")
    names = Pseudonyms(state)
    with _fresh(out, f"Imported from nnU-Net {source.name}") as stage:
        subjects = {match["case"]: "sub-" + names.name("patient", "", match["case"]) for match, _ in found}
        jobs: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
        for match, path in found:
            channel = channels.get(int(match["channel"]), f"channel{match['channel']}")
            word = re.sub(r"[^a-z0-9]", "", channel.lower())
            subject = subjects[match["case"]]
            name = f"{subject}_{_CHANNELS.get(word, word or 'image')}.nii.gz"
            jobs[match["case"]].append((path, Path(subject, "anat", name)))
        for case, subject in subjects.items():
            mask = source / "labelsTr" / f"{case}.nii.gz"
            if mask.exists():
                place = Path("derivatives", "manual", subject, "anat", f"{subject}_dseg.nii.gz")
                jobs[case].append((mask, place))
        faults = {}
        for case, files in jobs.items():
            path = files[0][0]
            try:
                for path, target in files:
                    _copy(source, path, stage / target)
            except DataError as error:
                faults[path.relative_to(source).as_posix()] = str(error).removeprefix(f"{path.name}: ")
                subject = subjects.pop(case)
                for folder in (stage / subject, stage / "derivatives" / "manual" / subject):
                    shutil.rmtree(folder, ignore_errors=True)
        _require(bool(subjects), faults, source)
        _table(stage / "participants.tsv", [("participant_id",), *((s,) for s in sorted(subjects.values()))])
        if (stage / "derivatives").exists():
            pairs = sorted((str(k), str(v)) if str(v).isdigit() else (str(v), str(k)) for k, v in labels.items())
            _table(stage / "derivatives" / "manual" / "dseg.tsv", [("index", "name"), *((v, k) for k, v in pairs)])
    return Imported(len(subjects), faults)


def _copy(source: Path, path: Path, target: Path) -> None:
    """Voxels and place of an image under another name, with a header of ours."""
    if not path.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{path.name}: a link that leads out of {source}; copy the file itself")
    stored = read_stored(path)
    _write(target, stored.voxels, stored.affine, "mm", stored.slope, stored.intercept)


def import_table(
    table: Path, out: Path, state: Path | None, *, patient: str, columns: Sequence[str]
) -> tuple[int, int]:
    """Outcome columns of a table into ``participants.tsv`` of a BIDS folder.

    Args:
        table: CSV (or TSV) with a header; FeTS partition files have ``Subject_ID`` and ``Partition_ID``.
        out: BIDS folder with participants.tsv.
        state: the node's folder, where rows name hospital numbers rather than pseudonyms.
        patient: column of the patient.
        columns: those that are taken over; nothing else is.

    Returns:
        Patients that got values, and rows that fit no patient.

    Raises:
        DataError: a missing table or column, two rows for one patient, or no row that fits one; nothing is written.
    """
    rows = _rows(table, "\t" if table.suffix == ".tsv" else ",", (patient, *columns))
    present = read_participants(out)
    if present is None:
        raise DataError(f"{out}: no participants.tsv; expected a BIDS folder with one; import the scans first")
    names = Pseudonyms(state) if state else None
    values: dict[str, Mapping[str, str]] = {}
    lost = 0
    for number, row in enumerate(rows, 2):
        who = row[patient].strip()
        candidates = [who, f"sub-{who}", *([f"sub-{names.name('patient', '', who)}"] if names else [])]
        subject = next((name for name in candidates if name in present), None)
        if subject is None:
            lost += 1
        elif subject in values:
            raise DataError(f"{table} line {number}: a second row for one patient; expected one; remove the others")
        else:
            values[subject] = row
    if not values:
        like = f"such as {next(iter(present)).removeprefix('sub-')}" if present else "and none is there"
        how = "" if names else "; where rows hold hospital numbers, give the node's --state, as at the import"
        raise DataError(
            f"{table}: none of {lost} rows fits a patient of {out}; expected their names in column {patient}, "
            f"{like}{how}"
        )
    old = [c for c in next(iter(present.values()), {"participant_id": ""}) if c not in columns]
    lines = [(*old, *columns)]
    for subject, entry in present.items():
        mine = values.get(subject, {})
        lines.append((*(entry.get(c) or "n/a" for c in old), *(mine.get(c) or entry.get(c) or "n/a" for c in columns)))
    fresh = out / ".participants.tsv.new"
    _table(fresh, lines)
    fresh.replace(out / "participants.tsv")
    return len(values), lost


def _rows(path: Path, delimiter: str, columns: Sequence[str]) -> list[dict[str, str]]:
    rows = read_rows(path, delimiter, "a table in UTF-8 with a header")
    lacking = [column for column in columns if not rows or column not in rows[0]]
    if lacking:
        has = ", ".join(list(rows[0])[:8]) if rows else "no rows"
        raise DataError(f"{path}: no column {', '.join(lacking)} (it has {has}); name the right one")
    return rows


@contextmanager
def _fresh(out: Path, name: str) -> Iterator[Path]:
    """A folder that becomes ``out`` when all went well, and vanishes otherwise."""
    if out.exists() and any(out.iterdir()):
        raise StateError(f"{out} exists; expected a new folder; remove it or give another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield stage
            description = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw"}
            (stage / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            stage.chmod(0o755)
            stage.replace(out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{out}: cannot be written ({error.strerror or error}); give another folder"
        ) from error


def _write(path: Path, voxels: Any, affine: Any, unit: str, slope: float = 1.0, intercept: float = 0.0) -> None:
    import nibabel

    image: Any = nibabel.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
    image.header.set_slope_inter(slope, intercept)
    image.header.set_xyzt_units(unit, "unknown")
    save_nifti(path, image)


def _table(path: Path, lines: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(lines)
