# SPDX-License-Identifier: Apache-2.0
"""Files for :mod:`.fuzz`: small sound ones of every kind that the readers take, and what is done to them.

Bits are flipped, numbers of the header replaced by extreme ones, parts cut, doubled or exchanged with another file's;
what was packed is changed inside and packed again, or as it is.
"""

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import numpy as np

__all__ = ["MAX_INPUT", "changed", "changed_inside", "sound_files"]

MAX_INPUT: Final = 1 << 16
"""Bytes of a changed file, unpacked."""


def sound_files(reader: str) -> list[bytes]:
    """Small files that the reader takes."""
    return _niftis() if reader == "nifti" else _dicoms()


def _niftis() -> list[bytes]:
    import nibabel

    nib: Any = nibabel
    found = []
    for shape, dtype, kind in (
        ((6, 5, 4), np.int16, nib.Nifti1Image), ((6, 5, 4), np.float32, nib.Nifti1Image),
        ((5, 4), np.uint8, nib.Nifti1Image), ((4, 4, 3, 1), np.float64, nib.Nifti2Image),
    ):  # fmt: skip
        image = kind(np.arange(np.prod(shape)).reshape(shape).astype(dtype), np.diag([-1.0, -1.0, 2.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        raw = image.to_bytes()
        found += [raw, gzip.compress(raw, mtime=0)]
    return found


def _dicoms() -> list[bytes]:
    """A picture of MR and of CT, an enhanced one, drawn regions of both kinds, and one that names no regions."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    plain = _picture("4"), _picture("2", ImplicitVRLittleEndian), _picture("66.4")
    enhanced = _picture("4.1", ExplicitVRLittleEndian)
    enhanced.NumberOfFrames, enhanced.PixelData = 2, bytes(64)
    enhanced.SharedFunctionalGroupsSequence, enhanced.PerFrameFunctionalGroupsSequence = _groups(2)
    return [_stored(item) for item in (*plain, enhanced, _structures(), _segmentation())]


def _picture(sop: str, syntax: Any = None) -> Any:
    """One picture of 4 × 4 pixels of class 1.2.840.10008.5.1.4.1.1 ``sop``, uncompressed."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID(f"1.2.840.10008.5.1.4.1.1.{sop}")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    item: Any = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    item.PatientName, item.PatientID, item.StudyInstanceUID = "Muster^Erika", "4711", UID("1.2.3")
    item.PatientBirthDate, item.PatientSex, item.StudyDate = "19500101", "O", "20260101"
    item.StudyTime, item.AccessionNumber, item.ReferringPhysicianName, item.StudyID = "120000", "7", "Arzt", "1"
    item.SeriesInstanceUID, item.Modality, item.SeriesDescription = UID("1.2.3.5"), "MR", "t2 flair"
    item.FrameOfReferenceUID, item.SeriesNumber, item.InstanceNumber = UID("1.2.3.6"), 1, 1
    item.ImageType, item.Rows, item.Columns = ["ORIGINAL", "PRIMARY"], 4, 4
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
    item.PixelSpacing, item.ImagePositionPatient, item.SliceThickness = [1, 1], [0, 0, 0], 1
    item.ImageOrientationPatient, item.PixelData = [1, 0, 0, 0, 1, 0], bytes(32)
    return item


def _groups(frames: int) -> tuple[list[Any], list[Any]]:
    """Shared and per-frame functional groups of a stack."""
    from pydicom.dataset import Dataset

    measures, turn, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [1, 1], 1
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turn]
    each = []
    for number in range(frames):
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, number]
        frame.PlanePositionSequence = [place]
        each.append(frame)
    return [shared], each


def _structures() -> Any:
    """A structure set with one contour in the first slice."""
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

    item = _picture("481.3")
    del item.PixelData
    series, study, frame, roi, drawn, contour = (Dataset() for _ in range(6))
    series.SeriesInstanceUID = UID("1.2.3.5")
    study.RTReferencedSeriesSequence, frame.RTReferencedStudySequence = [series], [study]
    contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 3
    contour.ContourData = [-1, -1, 0, -3, -1, 0, -3, -3, 0]
    roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = 3, "GTV", 3, [contour]
    item.ReferencedFrameOfReferenceSequence, item.StructureSetROISequence = [frame], [roi]
    item.ROIContourSequence = [drawn]
    return item


def _segmentation() -> Any:
    """A segmentation of two slices, as highdicom writes it."""
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import UID

    pictures = [_picture("4"), _picture("4")]
    for number, picture in enumerate(pictures):
        picture.SOPInstanceUID, picture.ImagePositionPatient = UID(f"1.2.3.4.{number}"), [0, 0, number]
    segment = hd.seg.SegmentDescription(
        1, "Core", codes.SCT.Tissue, codes.SCT.Tissue, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    return hd.seg.Segmentation(
        pictures, np.ones((2, 4, 4), np.uint8), hd.seg.SegmentationTypeValues.BINARY, [segment], UID("1.2.3.7"), 2,
        UID("1.2.3.8"), 1, "maker", "model", "1", "serial",
    )  # fmt: skip


def _stored(item: Any) -> bytes:
    buffer = io.BytesIO()
    item.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


_EXTREMES: Final = (
    *(struct.pack("<h", n) for n in (0, -1, 1, 32767, -32768, 7, 8)),
    *(struct.pack("<i", n) for n in (0, -1, 2**31 - 1, -(2**31), 540, 348)),
    *(struct.pack("<f", n) for n in (float("nan"), float("inf"), -1e38, 1e-45, 0.0)),
    *(struct.pack("<q", n) for n in (2**62, -1)), b"\xff" * 8, bytes(16),
)  # fmt: skip


def changed(corpus: list[bytes], rng: random.Random) -> bytes:
    """A sound file with a few things wrong in it."""
    raw = rng.choice(corpus)
    packed = raw.startswith(b"\x1f\x8b")
    inner = packed and rng.random() < 0.7
    unpacked = _unpacked(raw) if inner else b""
    inner = bool(unpacked)
    data = bytearray(unpacked or raw)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 20))):
        _change(data, corpus, rng)
    result = bytes(data[:MAX_INPUT])
    return gzip.compress(result, 1, mtime=0) if inner else result


def changed_inside(raw: bytes, change: Callable[[bytes, int], bytes], size: int, seed: int) -> bytes:
    """``raw`` after ``change``, mostly of what is packed in it: a check sum that fails hides everything behind it.

    Args:
        raw: one input.
        change: of bytes, to at most so many.
        size: bytes that the result may have.
        seed: decides whether packed bytes are unpacked first.
    """
    packed = raw.startswith(b"\x1f\x8b") and random.Random(seed).random() < 0.8  # noqa: S311 - changes of test files
    if packed and (inner := _unpacked(raw)):
        result = gzip.compress(change(inner, MAX_INPUT), 1, mtime=0)
        if len(result) <= size:
            return result
    return change(raw, size)


def _unpacked(raw: bytes) -> bytes:
    """The first :data:`MAX_INPUT` bytes of what is packed; nothing where it cannot be unpacked."""
    with suppress(OSError, EOFError, zlib.error), gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        return file.read(MAX_INPUT)
    return b""


def _change(data: bytearray, corpus: list[bytes], rng: random.Random) -> None:
    at = rng.randrange(min(len(data), 400) if data and rng.random() < 0.6 else max(len(data), 1))  # headers count most
    kind = rng.randrange(7)
    if kind == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind in (1, 2):
        extreme = rng.choice(_EXTREMES)
        data[at : at + len(extreme)] = extreme
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + rng.randrange(1, 64)]
    elif kind == 5:
        data[at:at] = data[at : at + rng.randrange(1, 256)]
    else:
        other = rng.choice(corpus)
        start = rng.randrange(max(len(other), 1))
        part = other[start : start + rng.randrange(1, 400)]
        data[at : at + len(part)] = part
