# SPDX-License-Identifier: Apache-2.0
"""Finds the DICOM objects below a folder, by what the files hold and never by their names, and reads their headers.

Only the tags that the import needs are kept, so that a PACS export of many thousand files fits into memory; pixels
are not read here. A file that cannot be read, an archive, and a link that leads out of the folder are listed with the
reason, and the others go on.

Reference: DICOM PS3.3 and PS3.10, https://www.dicomstandard.org/current.
"""

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydicom import Dataset, dcmread
from pydicom.datadict import keyword_dict
from pydicom.multival import MultiValue

from ....privacy.errors import DataError
from ..words import said

__all__ = ["IDENTIFYING", "Instance", "find_instances", "identifying_values"]

IDENTIFYING: Final = [
    "PatientID",
    "PatientName",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientBirthDate",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "IssuerOfPatientID",
    "AccessionNumber",
    "StudyID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "StudyDate",
    "SeriesDate",
    "AcquisitionDate",
    "ContentDate",
    "AcquisitionDateTime",
    "InstanceCreationDate",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "RequestingPhysician",
    "OperatorsName",
    "NameOfPhysiciansReadingStudy",
    "PhysiciansOfRecord",
    "StationName",
    "DeviceSerialNumber",
    "RequestedProcedureID",
    "PerformedProcedureStepID",
]
"""Keywords whose values say who, where or when. None of them is ever written."""

_USED: Final = [
    "SOPClassUID",
    "TransferSyntaxUID",
    "Modality",
    "ImageType",
    "SeriesNumber",
    "SeriesDescription",
    "ProtocolName",
    "InstanceNumber",
    "Manufacturer",
    "ManufacturerModelName",
    "MagneticFieldStrength",
    "ScanningSequence",
    "SequenceName",
    "SequenceVariant",
    "ScanOptions",
    "EchoTime",
    "RepetitionTime",
    "InversionTime",
    "FlipAngle",
    "SliceThickness",
    "EchoNumbers",
    "DiffusionBValue",
    "ContrastBolusAgent",
    "MRAcquisitionType",
    "AcquisitionContrast",
    "BurnedInAnnotation",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsAllocated",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "GantryDetectorTilt",
    "RescaleSlope",
    "RescaleIntercept",
    "ReferencedSeriesSequence",
    "SegmentSequence",
    "SegmentationType",
    "ReferencedFrameOfReferenceSequence",
]
_TAGS: Final = [keyword_dict[word] for word in (*IDENTIFYING, *_USED)]
_PREAMBLE_BYTES: Final = 132
_ARCHIVES: Final = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")
_PLAIN: Final = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_DIRECTORY_CLASS: Final = "1.2.840.10008.1.3.10"
MAX_DECODED_BYTES: Final = 2 << 30
"""A file that promises more than this, or much more than its bytes can hold, is not opened."""
MAX_RATIO: Final = 200
"""Decoded bytes per stored byte; medical images reach 10, a bomb thousands."""


MIN_LETTERS: Final = 4


@dataclass(frozen=True, slots=True)
class Instance:
    """One DICOM object: where it lies and the tags that the import needs."""

    path: Path
    header: Dataset

    def text(self, keyword: str) -> str:
        """A tag as text, several values joined by backslashes; empty where it is absent."""
        value = self.header.get(keyword)
        if value is None:
            return ""
        if isinstance(value, MultiValue | list | tuple):  # a PersonName can be iterated over too, letter by letter
            return "\\".join(str(part) for part in value)
        return str(value).strip()

    def number(self, keyword: str) -> float | None:
        """A tag as a number (the first, if there are several), or None where it is absent or no number."""
        try:
            return float(self.text(keyword).split("\\")[0])
        except ValueError:
            return None

    @property
    def syntax(self) -> str:
        """UID of the transfer syntax; empty where the file does not say."""
        meta = getattr(self.header, "file_meta", None)
        return str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""


def find_instances(source: Path) -> tuple[list[Instance], dict[str, str]]:
    """All DICOM objects below a folder, in the order of their paths.

    Returns:
        The objects, and the files that were passed over with the reason, by path relative to ``source``.

    Raises:
        DataError: no such folder, it cannot be read, or it holds no DICOM object at all.
    """
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise DataError(f"{source} {what}; expected a folder of DICOM files; give the folder of the PACS export")
    found: list[Instance] = []
    passed: dict[str, str] = {}
    root = source.resolve()
    for path in _walk(source, passed):
        name = os.fsencode(path.relative_to(source)).decode("utf-8", "replace")
        if not path.resolve().is_relative_to(root):
            passed[name] = "a link that leads out of the folder; copy the file itself"
            continue
        outcome = _read(path)
        if isinstance(outcome, Instance):
            found.append(outcome)
        elif outcome:
            passed[name] = outcome
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(passed.items())[:3])
        raise DataError(
            f"{source}: no DICOM object in it{f' ({why})' if why else ''}; expected a PACS export; check the path"
        )
    return found, passed


def _walk(source: Path, passed: dict[str, str]) -> Iterator[Path]:
    """Regular files in sorted order; folders that cannot be listed are passed over."""

    def complain(error: OSError) -> None:
        name = os.fsencode(os.path.relpath(error.filename, source)).decode("utf-8", "replace")
        passed[name] = f"cannot be read ({error.strerror}); give the node's account the right to read"

    for folder, below, files in os.walk(source, onerror=complain):
        below.sort()
        for name in below:
            if Path(folder, name).is_symlink():
                passed[str(Path(folder, name).relative_to(source))] = "a linked folder; copy the folder itself"
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file():
                yield path


def _read(path: Path) -> Instance | str | None:
    """The object, or why the file is passed over, or None for a file that is silently none of ours."""
    try:
        with path.open("rb") as file:
            head = file.read(_PREAMBLE_BYTES)
        if head.startswith(_ARCHIVES):
            return "an archive; unpack it first"
        if head[128:132] != b"DICM":
            return "not a DICOM file" if head else "empty file"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom tells of every odd value; what matters is judged below
            header = dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
            header.walk(lambda _dataset, _element: None)  # reads every value now: a broken one shows here, not later
            instance = Instance(path, header)
            if not instance.text("SOPClassUID"):
                media = str(getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID", ""))
                return None if media == _DIRECTORY_CLASS else "damaged DICOM file (no SOPClassUID); export it again"
            return _bomb(instance) or _cut(instance) or instance
    except Exception as error:  # a broken file may raise anything inside pydicom; the others go on
        if isinstance(error, OSError) and error.strerror:  # without it, pydicom's own word for a broken sequence
            return f"cannot be read ({error.strerror}); copy or export it again"
        return f"damaged DICOM file ({said(error)}); export it again"


def _pixels(instance: Instance) -> float:
    """Grey values that the header promises."""
    sides = [instance.number(word) or 1 for word in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
    return sides[0] * sides[1] * sides[2] * sides[3]


def _cut(instance: Instance) -> str | None:
    """Why an object of grey values without compression cannot be whole."""
    promised, stored = _pixels(instance) * (instance.number("BitsAllocated") or 8) / 8, instance.path.stat().st_size
    grey = instance.number("Rows") and (instance.number("SamplesPerPixel") or 1) == 1
    if instance.syntax in _PLAIN and grey and promised > stored:
        return f"cut off: {promised:.0f} bytes of pixels promised, the file has {stored}; copy or export it again"
    return None


def _bomb(instance: Instance) -> str | None:
    promised = _pixels(instance) * max((instance.number("BitsAllocated") or 8) / 8, 1)
    stored = instance.path.stat().st_size
    if promised > MAX_DECODED_BYTES or promised > MAX_RATIO * max(stored, 4096):
        return (
            f"promises {promised / 2**20:.0f} MiB of pixels in a file of {stored / 2**20:.2f} MiB; at most "
            f"{MAX_DECODED_BYTES >> 20} MiB and {MAX_RATIO} times the file are opened; export it again"
        )
    return None


def identifying_values(instance: Instance, *, parts: bool) -> set[str]:
    """What must not appear in any output: the values of :data:`IDENTIFYING`, at least four characters long.

    Args:
        instance: the object.
        parts: also the single words of names and addresses, which free text may hold.
    """
    values: set[str] = set()
    for keyword in IDENTIFYING:
        for value in instance.text(keyword).split("\\"):
            values.add(value.strip())
            if parts and keyword.endswith(("Name", "Names", "PatientID", "Physician", "Address")):
                values.update(re.findall(r"[^\W\d_]+", value))
    # Shorter ones are found in any text by chance.
    return {value for value in values if len(value) >= MIN_LETTERS}
