# SPDX-License-Identifier: Apache-2.0
"""Finds a hospital's scans: a BIDS folder with images, masks below ``derivatives/`` and ``participants.tsv``.

    SITE/sub-X/[ses-Y/]anat/sub-X_[ses-Y_][acq-A_][run-R_][entities_]SUFFIX.nii.gz       images
    SITE/derivatives/PIPELINE/sub-X/[ses-Y/]anat/…_label-lesion_mask.nii.gz              masks
    SITE/participants.tsv                                                                classes

A modality is named by its entities and suffix. ``sub``, ``ses``, ``acq`` and ``run`` say which scan a file
belongs to; every other entity must match exactly, so ``T1w`` never picks up ``ce-gadolinium_T1w``.
Files are found by name only; :mod:`.checks` judges what they hold.

Reference: Brain Imaging Data Structure 1.10, https://bids-specification.readthedocs.io.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...privacy.errors import DataError
from .tables import read_rows

__all__ = ["ScanFiles", "find_patients", "find_scans", "read_participants"]

PATIENT = re.compile(r"sub-[A-Za-z0-9+]+")
_FILE = re.compile(r"(?P<stem>sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+)\.nii(?:\.gz)?")
_WHERE = ("sub", "ses", "acq", "run")

Kind = tuple[frozenset[str], str]
"""What a file shows: its entities but for :data:`_WHERE`, and its suffix."""


@dataclass(frozen=True, slots=True)
class ScanFiles:
    """The files of one scan: an image per modality of the study (None: missing), and the masks where they exist."""

    patient: str
    name: str
    images: tuple[Path | None, ...]
    mask: Path | None
    brain: Path | None = None  # the foreground, where the study takes it from a file


@dataclass(frozen=True, slots=True)
class _Named:
    path: Path
    patient: str
    session: str
    variant: tuple[str, str]  # acquisition and run
    kind: Kind


def _kind(stem: str) -> Kind:
    *entities, suffix = stem.split("_")
    return frozenset(e for e in entities if e.split("-")[0] not in _WHERE), suffix


def find_patients(root: Path) -> tuple[str, ...]:
    """Sorted ids of the patients that have a folder.

    Raises:
        DataError: no such folder, or not a BIDS one.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"data set {root} {what}; expected a BIDS folder with sub-*/anat; check the path")
    entries = _listed(root)
    folders = sorted(p.name for p in entries if p.name.startswith("sub-") and p.is_dir())
    if not folders:
        seen = ", ".join(sorted(p.name for p in entries)[:4]) or "nothing"
        raise DataError(
            f"data set {root} has zero patients (it holds {seen}); expected BIDS folders sub-*/anat with NIfTI files; "
            "give the folder that holds sub-*, or convert the scans to BIDS"
        )
    for folder in folders:
        if not PATIENT.fullmatch(folder):
            raise DataError(
                f"{folder}: not a BIDS patient folder; expected sub- and then letters and digits; rename or remove it"
            )
    return tuple(folders)


def find_scans(
    root: Path, patient: str, modalities: Sequence[str], mask: str | None, brain: str | None = None
) -> list[ScanFiles]:
    """Scans of one patient, sorted by name; missing images and masks are None.

    Within a session the first modality of the study that exists there says which scans (acquisition, run)
    there are. Another modality belongs to the scan of the same acquisition and run, or is shared by the
    session if there is only one such file. A mask is never shared between scans.

    Args:
        root: the BIDS folder.
        patient: its id, ``sub-X``.
        modalities: as in the study, for example ``("FLAIR", "ce-gadolinium_T1w")``.
        mask: as in the study, for example ``"label-lesion_mask"``; None for classification.
        brain: name of the mask of the foreground, where the study takes it from a file.

    Raises:
        DataError: a file of another patient in this one's folder, or two files for one place.
    """
    images = _named([root], patient)
    masks = _named(_listed(root / "derivatives"), patient) if mask or brain else []
    scans = []
    for session in sorted({file.session for file in images}):
        here = [[f for f in images if f.session == session and f.kind == _kind(m)] for m in modalities]
        drawn, brains = (
            [f for f in masks if f.session == session and name and f.kind == _kind(name)] for name in (mask, brain)
        )
        anchor = next((files for files in here if files), [])
        variants = sorted({f.variant for f in anchor})
        for variant in variants:
            label = "_".join([patient, *([session] if session else []), *(v for v in variant if v)])
            scans.append(
                ScanFiles(
                    patient,
                    label,
                    tuple(_pick(files, variant, share=True) for files in here),
                    _pick(drawn, variant, share=len(variants) == 1),
                    _pick(brains, variant, share=len(variants) == 1),
                )
            )
    return scans


def _named(roots: Iterable[Path], patient: str) -> list[_Named]:
    """NIfTI files below ``root/patient/[ses-*/]anat`` with BIDS names; other files are passed over."""
    found = []
    for root in roots:
        sessions = [p for p in _listed(root / patient) if p.name.startswith("ses-")]
        for folder in [root / patient / "anat", *(p / "anat" for p in sessions)]:
            session = folder.parent.name if folder.parent.name.startswith("ses-") else ""
            for path in _listed(folder):
                match = _FILE.fullmatch(path.name)
                if not match:
                    continue
                stem = match["stem"]
                entities = {part.split("-")[0]: part for part in stem.split("_")[:-1]}
                if entities["sub"] != patient or entities.get("ses", "") != session:
                    raise DataError(
                        f"{path.name}: lies in the folder {Path(patient, session)} but is named after another "
                        "patient or session; expected one patient per folder; move or rename it"
                    )
                variant = (entities.get("acq", ""), entities.get("run", ""))
                found.append(_Named(path, patient, session, variant, _kind(stem)))
    return found


def _listed(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing where there is none. A folder that may not be read is a fault, not empty."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); expected a folder that the node's account may read; "
            "give it the right, or leave the folder out"
        ) from error


def _pick(files: Sequence[_Named], variant: tuple[str, str], *, share: bool) -> Path | None:
    """The file of a scan: the one of the same acquisition and run, else the only one there is if it may be shared."""
    exact = [f for f in files if f.variant == variant]
    chosen = exact or (list(files) if share else [])
    if len(chosen) > 1:
        names = " and ".join(str(Path(*f.path.parts[-4:])) for f in chosen[:2])
        raise DataError(f"{names}: {len(chosen)} files for one place; expected one; remove or rename the others")
    return chosen[0].path if chosen else None


def read_participants(root: Path) -> Mapping[str, Mapping[str, str]] | None:
    """Rows of ``participants.tsv`` by patient id, or None where there is no such file.

    Raises:
        DataError: not a table with a ``participant_id`` column, not UTF-8, or a patient named twice.
    """
    path = root / "participants.tsv"
    if not path.exists():
        return None
    rows = read_rows(path, "\t", "tab-separated text in UTF-8; save it so", name="participants.tsv")
    table: dict[str, Mapping[str, str]] = {}
    twice = set()
    for row in rows:
        patient = (row.get("participant_id") or "").strip()
        if not patient:
            raise DataError(
                "participants.tsv: a row without participant_id; expected that column, tab-separated; add it"
            )
        if patient in table:
            twice.add(patient)
        table[patient] = {
            column: (value or "").strip() for column, value in row.items() if isinstance(value, str | None) and column
        }
    if twice:
        raise DataError(
            f"participants.tsv: {', '.join(sorted(twice)[:3])} stands there more than once; expected one row "
            "per patient; remove the double rows"
        )
    return table
