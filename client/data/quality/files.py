# SPDX-License-Identifier: Apache-2.0
"""All NIfTI files of a data set by patient and session, and the files whose names or places are wrong.

Wider than :mod:`..bids`, which looks for what one study needs: a check must also see what training would pass over.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from .catalogue import Finding

__all__ = ["DataSet", "File", "Scan", "find_files"]

_NAME = re.compile(r"(?P<stem>sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+]+)*_[A-Za-z0-9]+)\.nii(?:\.gz)?")
_WHERE = ("sub", "ses", "acq", "run")
_MASKS = ("mask", "dseg", "probseg")
_TEXTS = ("*.json", "*.tsv", "*.txt", "*.csv", "README*", "CHANGES")


@dataclass(frozen=True, slots=True)
class File:
    """One image or mask."""

    path: Path
    patient: str
    session: str
    variant: str
    what: str  # entities but for those of place, and suffix: "ce-gadolinium_T1w", "label-lesion_mask"

    @property
    def is_mask(self) -> bool:
        """Drawn, not measured."""
        return self.what.rsplit("_", 1)[-1] in _MASKS


@dataclass
class Scan:
    """Images and masks of one patient in one session."""

    patient: str
    session: str
    images: list[File] = field(default_factory=list)
    masks: list[File] = field(default_factory=list)


@dataclass
class DataSet:
    """What a folder holds."""

    root: Path
    patients: tuple[str, ...]
    scans: list[Scan]
    texts: list[Path]
    findings: list[Finding]


def find_files(root: Path, patients: tuple[str, ...]) -> DataSet:
    """All files of the patients, and what is wrong with their names and places.

    Args:
        root: BIDS folder.
        patients: as :func:`..bids.find_patients` gives them.
    """
    scans: dict[tuple[str, str], Scan] = defaultdict(lambda: Scan("", ""))
    findings: list[Finding] = []
    real = root.resolve()
    for base in [root, *sorted(p for p in (root / "derivatives").glob("*") if p.is_dir())]:
        for patient in patients:
            for folder in sorted([base / patient / "anat", *(base / patient).glob("ses-*/anat")]):
                session = folder.parent.name if folder.parent.name.startswith("ses-") else ""
                for path in sorted(p for p in folder.glob("*") if p.name.endswith((".nii", ".nii.gz"))):
                    found = _named(path, patient, session, findings)
                    if not path.resolve().is_relative_to(real) and not folder.resolve().is_relative_to(real):
                        pass  # whole folders may be links: fedneuro-sim split makes them
                    elif not path.resolve().is_relative_to(real):
                        findings.append(Finding("link-outside", (patient,), f"{path.name} leads to {path.resolve()}"))
                    if found is not None:
                        scan = scans[patient, session]
                        scan.patient, scan.session = patient, session
                        (scan.masks if found.is_mask else scan.images).append(found)
    with_images = {scan.patient for scan in scans.values() if scan.images}
    findings += [Finding("bids-no-images", (p,), f"{p}: no image in anat") for p in patients if p not in with_images]
    by_fold = defaultdict(list)
    for patient in patients:
        by_fold[patient.casefold()].append(patient)
    findings += [Finding("bids-case", tuple(same), " and ".join(same)) for same in by_fold.values() if len(same) > 1]
    texts = sorted({p for pattern in _TEXTS for p in root.rglob(pattern) if p.is_file()})
    return DataSet(root, patients, [scans[key] for key in sorted(scans)], texts, findings)


def _named(path: Path, patient: str, session: str, findings: list[Finding]) -> File | None:
    match = _NAME.fullmatch(path.name)
    if not match:
        findings.append(Finding("bids-name", (patient,), f"{path.name} is no BIDS name"))
        return None
    *entities, suffix = match["stem"].split("_")
    values = {entity.split("-")[0]: entity for entity in entities}
    if values["sub"] != patient or values.get("ses", "") != session:
        where = "/".join(filter(None, (patient, session)))
        findings.append(Finding("bids-place", (patient, values["sub"]), f"{path.name} lies in {where}"))
        return None
    what = "_".join([*(e for e in entities if e.split("-")[0] not in _WHERE), suffix])
    return File(path, patient, session, "_".join(filter(None, (values.get("acq"), values.get("run")))), what)
