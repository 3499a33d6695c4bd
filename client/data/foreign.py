# SPDX-License-Identifier: Apache-2.0
"""Other forms in which data lie about, turned into BIDS: pictures with a table, nnU-Net's raw layout, outcome tables.

Patients get pseudonyms under the node's key, as in the DICOM import, and image headers are written anew, so that
nothing of the old files is carried over but voxels, places and the columns that were asked for.

Reference: nnU-Net v2, documentation/dataset_format.md; FeTS challenge, partitioning_*.csv (Partition_ID, Subject_ID).
"""

import csv
import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.errors import BadInput, DataError, EnvironmentProblem, StateError
from .bids import read_participants
from .dicom.convert import save_nifti
from .dicom.identity import Pseudonyms

__all__ = ["import_images", "import_nnunet", "import_table"]

_CHANNELS: Final = {
    "t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "t2flair": "FLAIR", "ct": "CT",
    "mri": "T1w",
    "t1c": "ce-gadolinium_T1w", "t1ce": "ce-gadolinium_T1w", "t1gd": "ce-gadolinium_T1w", "t1wce": "ce-gadolinium_T1w",
}  # fmt: skip
# Rows of a picture run to the back, columns to the patient's left, as an axial slice is shown; its place is not known.
_PICTURE: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
_CASE: Final = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})\.nii\.gz")


def import_images(
    source: Path, table: Path, out: Path, state: Path, *, patient: str, target: str, file: str, suffix: str, size: int
) -> int:
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

    Returns:
        Number of patients.

    Raises:
        DataError: a column, row or picture that cannot be used.
        BadInput: a size or suffix that cannot be.
        StateError: ``out`` exists.
    """
    if not 8 <= size <= 1024 or not re.fullmatch(r"[A-Za-z0-9]+", suffix):
        raise BadInput(f"size {size}, suffix {suffix!r}: expected 8 to 1024 pixels and a BIDS suffix such as T1w")
    rows = _rows(table, ",", (patient, target, file))
    pictures: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        who = row[patient]
        if classes.setdefault(who, row[target]) != row[target]:
            raise DataError(f"{table} line {number}: {patient} {who} has two classes; expected one; correct the table")
        pictures[who].append(row[file])
    names = Pseudonyms(state)
    with _fresh(out, f"Imported from {table.name}") as stage:
        lines = [("participant_id", target)]
        for who, files in sorted(pictures.items()):
            subject = "sub-" + names.name("patient", "", who)
            lines.append((subject, classes[who]))
            for run, name in enumerate(files, 1):
                _write(stage / subject / "anat" / f"{subject}_run-{run:02d}_{suffix}.nii.gz",
                       _picture(source, name, size), _PICTURE, "unknown")  # fmt: skip
        _table(stage / "participants.tsv", lines)
    return len(pictures)


def _picture(source: Path, name: str, size: int) -> Any:
    from PIL import Image

    path = source / name
    if not path.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{name}: leads out of {source}; expected a path below it; correct the table")
    try:
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L").resize((size, size), Image.Resampling.BOX))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a picture; correct the table") from error
    return np.ascontiguousarray(grey.T[:, :, None], dtype=np.uint8)  # (row, column) to (x, y, slice)


def import_nnunet(source: Path, out: Path, state: Path) -> int:
    """nnU-Net's raw layout (``imagesTr``, ``labelsTr``, ``dataset.json``) to BIDS, labels as ``_dseg``.

    Returns:
        Number of patients; each case is taken for one.

    Raises:
        DataError: no such layout, or a file that cannot be read.
        StateError: ``out`` exists.
    """
    import nibabel

    nib: Any = nibabel
    try:
        description = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
        channels = {int(k): str(v) for k, v in (description.get("channel_names") or description["modality"]).items()}
        labels = {str(k): v for k, v in description["labels"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{source}/dataset.json: cannot be used ({error}); expected nnU-Net's raw layout") from error
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
        jobs = []
        for match, path in found:
            channel = channels.get(int(match["channel"]), f"channel{match['channel']}")
            word = re.sub(r"[^a-z0-9]", "", channel.lower())
            subject = subjects[match["case"]]
            jobs.append((path, Path(subject, "anat", f"{subject}_{_CHANNELS.get(word, word or 'image')}.nii.gz")))
        for case, subject in subjects.items():
            mask = source / "labelsTr" / f"{case}.nii.gz"
            if mask.exists():
                jobs.append((mask, Path("derivatives", "manual", subject, "anat", f"{subject}_dseg.nii.gz")))
        for path, target in jobs:
            try:
                image = nib.load(path)
                slope, intercept = image.dataobj.slope, image.dataobj.inter
                _write(stage / target, np.asarray(image.dataobj.get_unscaled()), image.affine, "mm", slope, intercept)
            except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
                raise DataError(f"{path}: cannot be read ({error}); copy it again") from error
        _table(stage / "participants.tsv", [("participant_id",), *((s,) for s in sorted(subjects.values()))])
        if (stage / "derivatives").exists():
            pairs = sorted((str(k), str(v)) if str(v).isdigit() else (str(v), str(k)) for k, v in labels.items())
            _table(stage / "derivatives" / "manual" / "dseg.tsv", [("index", "name"), *((v, k) for k, v in pairs)])
    return len(subjects)


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
        DataError: a missing table or column, or two rows for one patient.
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
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a table in UTF-8 with a header") from error
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
