# SPDX-License-Identifier: Apache-2.0
"""Runs every check of the catalogue over a data set. Nothing leaves the hospital: the result is a page and a JSON file.

Steps: 1 the folder and its tables; 2 each scan, its voxels read once; 3 the cohort. Voxels are let go after each scan,
so memory does not grow with the number of patients.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....privacy.errors import DataError
from ..bids import find_patients, read_participants
from ..nifti import Volume, digest_of, read_volume
from .catalogue import CATALOGUE, Finding
from .cohort import judge_cohort
from .duplicates import judge_duplicates
from .files import DataSet, File, Scan, find_files
from .identity import judge_names, judge_texts
from .look import Look, look_at
from .mask_cohort import judge_masks
from .orientation import judge_orientation
from .pairing import Fit, judge_pairing
from .pictures import views_of

__all__ = ["Report", "check_data"]

Memory = dict[tuple[str, ...], Any]
Progress = Callable[[int, int], None]
"""Called after each scan with the number done and the number in all."""


@dataclass
class Report:
    """What was found in one data set."""

    name: str
    root: Path
    patients: tuple[str, ...]
    looks: list[Look]
    findings: list[Finding]
    pictures: dict[str, bytes] = field(default_factory=dict)  # scan: PNG

    @property
    def may_join(self) -> bool:
        """No finding blocks."""
        return not any(finding.entry.severity == "blocks" for finding in self.findings)

    def counts(self) -> dict[str, int]:
        """Findings by severity."""
        found = Counter(finding.entry.severity for finding in self.findings)
        return {severity: found[severity] for severity in ("blocks", "warns", "notes")}

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; it names patients, so it stays at the hospital."""
        return {
            "name": self.name,
            "patients": len(self.patients),
            "images": sum(not look.file.is_mask for look in self.looks),
            "masks": sum(look.file.is_mask for look in self.looks),
            "may_join": self.may_join,
            "counts": self.counts(),
            "findings": [
                {
                    "check": finding.check,
                    "severity": finding.entry.severity,
                    "title": finding.entry.title,
                    "patients": list(finding.patients),
                    "detail": finding.detail,
                    "why": finding.entry.why,
                    "remedy": finding.entry.remedy,
                }
                for finding in self.findings
            ],
            "checks": sorted(CATALOGUE),
        }


def check_data(
    root: Path,
    *,
    name: str = "",
    split: tuple[str, float] | None = None,
    pictures: int = 12,
    changes: Sequence[str] = (),
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> Report:
    """Check a data set.

    Args:
        root: BIDS folder, only read.
        name: of the data set; empty: the folder's name.
        split: ``data.split_key`` and ``evaluation.validation_fraction`` of a study, for leaks between the sides.
        pictures: scans that are shown in the report, those with findings first; 0: none.
        changes: what changed since the data set was registered, in lines.
        progress: told of each scan.
        memory: what an earlier check in this process saw, by check sum; unchanged scans are not read again.

    Raises:
        DataError: no data set there at all.
    """
    patients = find_patients(root)
    data = find_files(root, patients)
    findings = list(data.findings)
    findings += _tables(data)
    findings += [Finding("changed-since-registration", (), line) for line in changes]
    findings += judge_names(patients)
    findings += judge_texts(root, data.texts)
    looks: list[Look] = []
    fits: list[Fit] = []
    memory = {} if memory is None else memory
    for number, scan in enumerate(data.scans, 1):
        seen = _scan(scan, memory)
        looks += seen[0]
        fits += seen[1]
        findings += seen[2]
        if progress:
            progress(number, len(data.scans))
    images = [look for look in looks if not look.file.is_mask]
    masks = [look for look in looks if look.file.is_mask]
    for what in sorted({look.file.what for look in images}):
        findings += judge_orientation([look for look in images if look.file.what == what])
    findings += judge_cohort(data, images, masks)
    findings += judge_masks(fits, _read)
    findings += judge_duplicates(data, images, masks, split)
    findings = _gathered(findings, len(patients))
    order = ["blocks", "warns", "notes"]
    findings.sort(key=lambda f: (order.index(f.entry.severity), f.check, f.patients, f.detail))
    report = Report(name or root.resolve().name, root, patients, looks, findings)
    report.pictures = _pictures(data, report, pictures)
    return report


_COMMON = ("units-missing", "header-orientation-unstated", "bids-name", "mask-empty", "mask-outside")
MANY = 0.2


def _gathered(findings: list[Finding], patients: int) -> list[Finding]:
    """One line for what concerns many patients, so that what concerns one is not lost among it."""
    kept = []
    for check in dict.fromkeys(finding.check for finding in findings):
        same = [finding for finding in findings if finding.check == check]
        who = tuple(sorted({patient for finding in same for patient in finding.patients}))
        if check in _COMMON and len(same) > 3 and len(who) > MANY * patients:
            kept.append(Finding(check, who, f"{len(who)} of {patients} patients, first {same[0].detail}"))
        else:
            kept += same
    return kept


def _scan(scan: Scan, memory: Memory) -> tuple[list[Look], list[Fit], list[Finding]]:
    files = [*scan.images, *scan.masks]
    try:
        key = tuple(str(part) for file in files for part in (file.path, digest_of(file.path)))
    except DataError:
        key = ()
    if key and key in memory:
        return memory[key]  # type: ignore[no-any-return]
    volumes: dict[File, Volume] = {}
    looks, findings = [], []
    for file in files:
        look, volume, found = look_at(file)
        findings += found
        if look is not None and volume is not None:
            looks.append(look)
            volumes[file] = volume
            findings += look.findings
    fits, found = judge_pairing(scan, volumes)
    result = looks, fits, [*findings, *found]
    if key:
        memory[key] = result
    return result


def _read(file: File) -> NDArray[np.float32] | None:
    try:
        return read_volume(file.path).data
    except DataError:
        return None


def _tables(data: DataSet) -> list[Finding]:
    findings = []
    description = data.root / "dataset_description.json"
    try:
        import json

        values = json.loads(description.read_text(encoding="utf-8"))
        if not (isinstance(values, dict) and values.get("Name") and values.get("BIDSVersion")):
            findings.append(Finding("bids-description", (), "Name or BIDSVersion is missing"))
    except (OSError, ValueError):
        findings.append(Finding("bids-description", (), "missing, or no JSON"))
    try:
        table = read_participants(data.root)
    except DataError as error:
        return [*findings, Finding("table-broken", (), str(error))]
    if table is not None:
        for words, ids in (
            ("a row but no folder", set(table) - set(data.patients)),
            ("a folder but no row", set(data.patients) - set(table)),
        ):
            if ids:
                findings.append(Finding("table-row", tuple(sorted(ids)), f"{len(ids)} patients have {words}"))
    return findings


def _pictures(data: DataSet, report: Report, limit: int) -> dict[str, bytes]:
    """Pictures of the scans with the gravest findings, then of others."""
    grave = {"blocks": 0, "warns": 1, "notes": 2}
    worst = dict.fromkeys(data.patients, 3)
    for finding in report.findings:
        if len(finding.patients) <= 3:  # what concerns everybody tells nothing about one
            for patient in finding.patients:
                worst[patient] = min(worst.get(patient, 3), grave[finding.entry.severity])
    shown = {}
    for scan in sorted(data.scans, key=lambda s: (worst[s.patient], s.patient, s.session))[:limit]:
        picture = views_of(scan)
        if picture:
            shown["/".join(filter(None, (scan.patient, scan.session)))] = picture
    return shown
