# SPDX-License-Identifier: Apache-2.0
"""Sorts DICOM objects into series by content, and says of each what it is: an image, drawn regions, or to be skipped.

Skipped with a reason: reports, presentation states and other objects without pictures; localisers; derived pictures
(reformats, maps, screen shots), because a study should see what the scanner measured; pictures with burned-in text.
The geometry of images is read here too, so that a stack that cannot be an even NIfTI volume is refused before
conversion, in words that staff understand.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from pydicom import Dataset, dcmread

from ....privacy.errors import DataError
from ..words import said
from .geometry import Plane, Stack, stack_planes
from .headers import Instance

__all__ = ["Kind", "Series", "group", "reference_stack"]

Kind = Literal["image", "segmentation", "structures", "skip"]

_SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.4"
_STRUCTURES: Final = "1.2.840.10008.5.1.4.1.1.481.3"
_IMAGES: Final = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "enhanced CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "enhanced MR",
    "1.2.840.10008.5.1.4.1.1.128": "PET",
}
_OTHERS: Final = {
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture (a screen shot or scan of paper)",
    "1.2.840.10008.5.1.4.1.1.4.2": "MR spectroscopy",
    "1.2.840.10008.5.1.4.1.1.66": "raw data",
    "1.2.840.10008.5.1.4.1.1.66.1": "spatial registration",
    "1.2.840.10008.5.1.4.1.1.104.1": "encapsulated PDF",
    "1.2.840.10008.5.1.4.1.1.481.2": "radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.481.5": "radiotherapy plan",
}
_OTHER_FAMILIES: Final = {
    "1.2.840.10008.5.1.4.1.1.88.": "structured report (SR)",
    "1.2.840.10008.5.1.4.1.1.11.": "presentation state",
    "1.2.840.10008.5.1.4.1.1.9.": "waveform",
    "1.3.12.2.1107.5.9.1": "Siemens private object (CSA)",
}
_DERIVED: Final = {"DERIVED": "derived pictures", "SECONDARY": "secondary pictures"}
_DECODED: Final = {
    "1.2.840.10008.1.2": "",
    "1.2.840.10008.1.2.1": "",
    "1.2.840.10008.1.2.1.99": "",
    "1.2.840.10008.1.2.2": "",
    "1.2.840.10008.1.2.5": "",
    "1.2.840.10008.1.2.4.50": "",
    "1.2.840.10008.1.2.4.57": "",
    "1.2.840.10008.1.2.4.70": "",
    "1.2.840.10008.1.2.4.80": "",
    "1.2.840.10008.1.2.4.90": "",
}
"""Transfer syntaxes whose decoding loses nothing in dcm2niix's wheel: plain, RLE, JPEG, JPEG-LS, JPEG 2000."""


@dataclass(frozen=True, slots=True)
class Series:
    """Objects that belong together."""

    instances: tuple[Instance, ...]
    kind: Kind
    reason: str
    """Why it is skipped; empty otherwise."""

    @property
    def first(self) -> Instance:
        """The object that speaks for the series."""
        return self.instances[0]

    @property
    def uid(self) -> str:
        """What tells the series from all others: its UID and, where one UID holds several matrices, the matrix."""
        return f"{self.first.text('SeriesInstanceUID')}/{self.first.text('Rows')}x{self.first.text('Columns')}"

    @property
    def patient(self) -> tuple[str, str]:
        """Issuer and number of the patient; the study stands in where the export has no number."""
        number = self.first.text("PatientID") or self.first.text("PatientName") or self.first.text("StudyInstanceUID")
        return self.first.text("IssuerOfPatientID"), number


def group(instances: Sequence[Instance]) -> list[Series]:
    """Series in the order of patient, study and series number; copies of one object count once."""
    by_series: dict[tuple[str, ...], dict[str, Instance]] = defaultdict(dict)
    for instance in instances:
        key = tuple(instance.text(word) for word in ("SeriesInstanceUID", "SOPClassUID", "Rows", "Columns"))
        name = instance.text("SOPInstanceUID") or str(instance.path)
        copy = by_series[key].get(name)
        if copy is None or instance.path.stat().st_size > copy.path.stat().st_size:  # one may have been cut off
            by_series[key][name] = instance
    found = []
    for members in by_series.values():
        ordered = tuple(sorted(members.values(), key=lambda i: (i.number("InstanceNumber") or 0, str(i.path))))
        kind, reason = _judge(ordered)
        found.append(Series(ordered, kind, reason))
    return sorted(
        found, key=lambda s: (s.patient, s.first.text("StudyInstanceUID"), s.first.number("SeriesNumber") or 0, s.uid)
    )


def _judge(members: Sequence[Instance]) -> tuple[Kind, str]:
    first = members[0]
    sop = first.text("SOPClassUID")
    if sop == _SEGMENTATION:
        return "segmentation", ""
    if sop == _STRUCTURES:
        return "structures", ""
    if sop not in _IMAGES:
        family = next((name for start, name in _OTHER_FAMILIES.items() if sop.startswith(start)), "")
        return "skip", f"{_OTHERS.get(sop) or family or 'object of a kind'} that is no scan"
    types = {part.upper() for part in first.text("ImageType").split("\\")}
    description = first.text("SeriesDescription").lower()
    if "LOCALIZER" in types or any(word in description for word in ("localizer", "localiser", "scout", "survey")):
        return "skip", "localiser"
    for word, what in _DERIVED.items():
        if word in types:
            return "skip", f"{what} (ImageType says {word}): not what the scanner measured"
    if first.text("BurnedInAnnotation").upper() == "YES":
        return "skip", "burned-in text, which may name the patient"
    if (first.number("SamplesPerPixel") or 1) > 1:
        return "skip", "colour pictures"
    return "image", ""


def reference_stack(series: Series, *, tilted: bool = False) -> tuple[Stack, tuple[int, int]]:
    """Geometry of an image series from its headers, and its columns and rows.

    Args:
        series: of kind ``image``.
        tilted: a stack that gantry tilt has sheared is no fault.

    Raises:
        Tilted: gantry tilt is all that is wrong.
        DataError: a transfer syntax that cannot be decoded, or pictures that make no even stack.
    """
    lossy = next((i for i in series.instances if i.syntax and i.syntax not in _DECODED), None)
    if lossy is not None:
        from pydicom.uid import UID

        raise DataError(
            f"transfer syntax {UID(lossy.syntax).name} ({lossy.syntax}) is not decoded here; let the PACS send it "
            "uncompressed, or convert it first with gdcmconv --raw (package gdcm) or dcmdjpeg/dcmdjpls (package dcmtk)"
        )
    try:
        return _read_stack(series, tilted)
    except DataError:
        raise
    except Exception as error:  # whatever damaged headers raise inside pydicom
        raise DataError(f"damaged headers ({said(error)}); export the series again from the PACS") from error


def _read_stack(series: Series, tilted: bool) -> tuple[Stack, tuple[int, int]]:
    first = series.first
    columns, rows = int(first.number("Columns") or 0), int(first.number("Rows") or 0)
    if "MOSAIC" in first.text("ImageType").upper().split("\\"):
        return _mosaic(series)
    if first.text("NumberOfFrames") and "Enhanced" in _class_name(first):
        planes = [plane for instance in series.instances for plane in _frames(instance)]
    else:
        planes = [_plane(instance.header) for instance in series.instances]
    return stack_planes(planes, tilted=tilted), (columns, rows)


def _class_name(instance: Instance) -> str:
    return _IMAGES.get(instance.text("SOPClassUID"), "").replace("enhanced", "Enhanced")


def _plane(header: Any) -> Plane:
    try:
        position = np.array([float(v) for v in header.ImagePositionPatient])
        orientation = np.array([float(v) for v in header.ImageOrientationPatient])
        rows, columns = (float(v) for v in header.PixelSpacing)
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            "no position, orientation or pixel size in a header; expected ImagePositionPatient, "
            "ImageOrientationPatient and PixelSpacing; export the original series"
        ) from error
    sound = position.shape == (3,) and orientation.shape == (6,) and rows > 0 and columns > 0
    if not (sound and np.isfinite([*position, *orientation, rows, columns]).all()):
        raise DataError("position, orientation or pixel size in a header is no sound number; export the series again")
    return Plane(position, orientation, (rows, columns))


def _frames(instance: Instance) -> list[Plane]:
    """Planes of an enhanced multi-frame object, from its functional groups."""
    whole = dcmread(instance.path, stop_before_pixels=True)
    shared = next(iter(whole.get("SharedFunctionalGroupsSequence", [])), Dataset())
    planes = []
    for frame in whole.get("PerFrameFunctionalGroupsSequence", []):
        merged = Dataset()
        for group_name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"):
            items = frame.get(group_name) or shared.get(group_name) or []
            for item in list(items)[:1]:
                merged.update(item)
        planes.append(_plane(merged))
    if not planes:
        raise DataError("enhanced object without per-frame groups; export the series as classic (single-frame) DICOM")
    return planes


def _mosaic(series: Series) -> tuple[Stack, tuple[int, int]]:
    """Geometry of a Siemens mosaic: several slices tiled in one picture, told apart by the CSA header."""
    from nibabel.nicom.dicomwrappers import WrapperError, wrapper_from_data

    try:
        wrapper: Any = wrapper_from_data(dcmread(series.first.path, stop_before_pixels=True))  # type: ignore[no-untyped-call]
        rows, columns, slices = (int(n) for n in wrapper.image_shape[:3])
        affine = np.asarray(wrapper.affine, dtype=np.float64)[:, [1, 0, 2, 3]]  # nibabel counts rows first
    except (WrapperError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise DataError(
            "Siemens mosaic without a readable CSA header (private tags were removed?); export the original series"
        ) from error
    affine[:2] *= -1  # LPS to RAS
    here = tuple(range(len(series.instances)))
    return Stack(affine, slices, len(series.instances), tuple(here for _ in range(slices))), (columns, rows)
