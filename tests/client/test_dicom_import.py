# SPDX-License-Identifier: Apache-2.0
"""The DICOM import on objects made here: regions, mapping, identity, and every refusal in words."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from fedneuro.client.data.bids import find_scans
from fedneuro.client.data.dicom import Summary, import_dicom
from fedneuro.client.data.dicom.identity import Pseudonyms
from fedneuro.privacy.errors import BadInput, DataError, FedNeuroError, StateError

pytestmark = pytest.mark.filterwarnings("ignore")
_NIB: Any = nibabel
MR, CT, SC, SEG, RT = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4", "2", "7", "66.4", "481.3"))
SHAPE = (16, 12, 6)  # columns, rows, slices
SPACING = (1.5, 2.0, 3.0)  # mm, along the same axes
ORIGIN = (-10.0, -20.0, 5.0)


def greys() -> NDArray[np.uint16]:
    x, y, z = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    return (100 * z + 8 * y + x).astype(np.uint16)


def write_series(
    folder: Path,
    *,
    patient: str = "HOSP-4711",
    description: str = "t2 flair",
    uid: str = "",
    change: Callable[[int, Dataset], object] = lambda _k, _d: None,
    slices: Sequence[int] = range(SHAPE[2]),
) -> list[FileDataset]:
    """A small MR series; returns its objects."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    objects: list[FileDataset] = []
    for k in slices:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = UID(MR)
        meta.MediaStorageSOPInstanceUID = generate_uid()
        item = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
        item.SOPClassUID, item.SOPInstanceUID = MR, meta.MediaStorageSOPInstanceUID
        item.PatientName, item.PatientID, item.PatientBirthDate = "Mustermann^Erika", patient, "19640812"
        item.PatientSex, item.StudyDate, item.StudyTime, item.StudyID = "F", "20240229", "101112", "1"
        item.AccessionNumber, item.ReferringPhysicianName = "ACC-998877", "Haus^Gregor"
        item.StudyInstanceUID = "1.2.3." + "".join(str(ord(c)) for c in patient)
        item.SeriesInstanceUID, item.FrameOfReferenceUID = uid, item.StudyInstanceUID + ".7"
        item.Modality, item.Manufacturer, item.SeriesDescription = "MR", "SIEMENS", description
        item.ManufacturerModelName, item.ImageType = "Skyra", ["ORIGINAL", "PRIMARY", "M"]
        item.SeriesNumber, item.InstanceNumber = 1, k + 1
        item.Rows, item.Columns = SHAPE[1], SHAPE[0]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 0
        item.PixelSpacing, item.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        item.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[2] * k]
        item.PositionReferenceIndicator, item.Laterality = "", ""
        item.PixelData = greys()[:, :, k].T.tobytes()
        change(k, item)
        item.save_as(folder / f"{uid[-6:]}_{99 - k}.dcm", enforce_file_format=True)
        objects.append(item)
    return objects


def run(tmp_path: Path, **options: Any) -> Summary:
    return import_dicom(tmp_path / "src", tmp_path / "bids", tmp_path / "state", **options)


def test_a_series_comes_out_whole(tmp_path: Path) -> None:
    write_series(tmp_path / "src")
    summary = run(tmp_path)
    (patient,) = [p.name for p in (tmp_path / "bids").glob("sub-*")]
    (scan,) = find_scans(tmp_path / "bids", patient, ["FLAIR"], None)
    assert scan.images[0] is not None and summary.patients == 1
    image = _NIB.as_closest_canonical(_NIB.load(scan.images[0]))
    assert np.array_equal(np.asarray(image.dataobj), greys()[::-1, ::-1])  # DICOM counts to the left and the back
    last = np.array(ORIGIN) + (np.array(SHAPE) - 1) * SPACING
    assert np.allclose(image.affine @ [0, 0, 0, 1], [-last[0], -last[1], ORIGIN[2], 1], atol=1e-4)


def test_nothing_identifying_is_written_and_names_are_keyed(tmp_path: Path) -> None:
    write_series(tmp_path / "src", description="flair Mustermann ACC-998877")
    run(tmp_path)
    text = b"".join(
        path.name.encode() + path.read_bytes() for path in (tmp_path / "bids").rglob("*") if path.suffix != ".gz"
        if path.is_file()
    ).lower()  # fmt: skip
    for word in (b"mustermann", b"erika", b"4711", b"1964", b"20240229", b"acc-9988", b"haus", b"1.2.3.", b"gregor"):
        assert word not in text
    assert b"[removed]" in text
    first, again = Pseudonyms(tmp_path / "state"), Pseudonyms(tmp_path / "state")
    other = Pseudonyms(tmp_path / "other")
    assert first.name("patient", "a") == again.name("patient", "a") != other.name("patient", "a")
    assert first.name("patient", "a", "b") != first.name("patient", "ab") != first.name("session", "ab")
    assert (tmp_path / "state" / "pseudonym.key").stat().st_mode & 0o777 == 0o600


def shifted(k: int, item: Dataset, by: float) -> None:
    item.ImagePositionPatient = [ORIGIN[0], ORIGIN[1] + by * k, ORIGIN[2] + SPACING[2] * k]


def uneven(k: int, item: Dataset) -> None:
    item.ImagePositionPatient = [*ORIGIN[:2], ORIGIN[2] + 3 * k + (1.2 if k > 3 else 0)]


def several(k: int, item: Dataset) -> None:
    item.ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if k < 3 else [0, 1, 0, 0, 0, -1]


def syntax(_: int, item: Any) -> None:
    item.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # HTJ2K
    item.PixelData = encapsulate([b"\xff\x4f"])
    item["PixelData"].is_undefined_length = True


def keys(**values: Any) -> Callable[[int, Dataset], object]:
    def change(_: int, item: Dataset) -> None:
        for key, value in values.items():
            setattr(item, key, value)

    return change


def without_place(_: int, item: Dataset) -> None:
    del item.ImagePositionPatient


def bomb(_: int, item: Dataset) -> None:
    item.Rows = item.Columns = 60_000


def tilted_ct(k: int, item: Dataset) -> None:
    """A head CT with the gantry leaned back: parallel slices whose stack is sheared."""
    item.SOPClassUID, item.Modality, item.GantryDetectorTilt = CT, "CT", -12.5
    item.RescaleSlope, item.RescaleIntercept = 1, -1024
    shifted(k, item, -SPACING[2] * np.tan(np.deg2rad(12.5)))


def straight_ct(k: int, item: Dataset) -> None:
    """The header tells of a tilt, but the positions are straight, as after correction at the console: they decide."""
    tilted_ct(k, item)
    shifted(k, item, 0.0)


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "tilt": ({"change": lambda k, d: shifted(k, d, 1.0)}, "refused", "gantry tilt of 18.4 degrees"),
    "tilted CT": ({"change": tilted_ct, "description": "head"}, "refused", "gantry tilt of 12.5 degrees"),
    "uneven": ({"change": uneven}, "refused", "slice distances from 3.00 to 4.20 mm"),
    "missing slice": ({"slices": [0, 1, 2, 4, 5]}, "refused", "missing slices: about 1"),
    "several orientations": ({"change": several}, "refused", "several orientations"),
    "no position": ({"change": without_place}, "refused", "expected ImagePositionPatient"),
    "unknown transfer syntax": ({"change": syntax}, "refused", "gdcmconv"),
    "localiser": ({"change": keys(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])}, "skip", "localiser"),
    "derived": ({"change": keys(ImageType=["DERIVED", "PRIMARY", "MPR"])}, "skip", "ImageType says DERIVED"),
    "screen shot": ({"change": keys(SOPClassUID=SC)}, "skip", "secondary capture"),
    "burned-in name": ({"change": keys(BurnedInAnnotation="YES")}, "skip", "burned-in text"),
    "no rule": ({"description": "xyz"}, "skip", "fill in datatype and suffix"),
}


def test_a_copy_that_was_cut_off_does_not_take_the_place_of_the_whole(tmp_path: Path) -> None:
    """It lies first in the walk; the series is whole without it, and is refused where there is no other copy."""
    write_series(tmp_path / "src" / "series")
    whole = sorted((tmp_path / "src" / "series").glob("*.dcm"))[2]
    content = whole.read_bytes()
    (tmp_path / "src" / "cut.dcm").write_bytes(content[: len(content) - 200])
    summary = run(tmp_path)
    assert len(summary.imported) == 1 and not summary.refused
    whole.unlink()
    assert len(run(tmp_path).refused) == 1


def test_a_tilted_ct_is_straightened_where_staff_ask_for_it(tmp_path: Path) -> None:
    """A ramp in space is the same ramp afterwards, wherever it was measured; the side-car says that it was done."""

    def ramp(k: int, item: Dataset) -> None:
        tilted_ct(k, item)
        y0 = float(item.ImagePositionPatient[1])
        x, y = np.arange(SHAPE[0]) * SPACING[0] + ORIGIN[0], np.arange(SHAPE[1]) * SPACING[1] + y0
        z = ORIGIN[2] + SPACING[2] * k
        hu = 5 * x[None, :] + 7 * y[:, None] + 3 * z
        item.PixelData = np.rint(hu + 1024).astype(np.uint16).tobytes()

    write_series(tmp_path / "src", change=ramp, description="head")
    (row,) = run(tmp_path, dry_run=True).rows
    assert (row.action, row.suffix) == ("refused", "CT") and "set action to straighten" in row.reason
    mapping = tmp_path / "bids" / "code" / "dicom_mapping.tsv"
    edited = tmp_path / "edited.tsv"
    edited.write_text(mapping.read_text().replace("\trefused\t", "\tstraighten\t"))
    summary = run(tmp_path, mapping=edited)
    assert not summary.refused
    image = _NIB.load(next((tmp_path / "bids").rglob("*_CT.nii.gz")))
    axes = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    assert np.allclose(np.abs(axes.T @ axes), np.eye(3), atol=1e-6)
    grey = np.asarray(image.dataobj, float)
    i, j, k = np.meshgrid(*map(np.arange, image.shape), indexing="ij")
    x, y, z = image.affine[:3, :3] @ np.stack([i.ravel(), j.ravel(), k.ravel()]) + image.affine[:3, 3:]
    wanted = (5 * -x + 7 * -y + 3 * z).reshape(image.shape)  # RAS to LPS
    inside = grey > grey.min()
    assert inside.sum() >= np.prod(SHAPE) - (SHAPE[0] * SHAPE[2] + 1) and image.shape[1] > SHAPE[1]
    assert np.abs(grey - wanted)[inside].max() <= 1.01, "rounding, once stored and once interpolated"
    side_car = next((tmp_path / "bids").rglob("*_CT.json")).read_text()
    assert "gantry tilt of 12.5 degrees" in side_car


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_reason_and_the_rest_goes_on(name: str, tmp_path: Path) -> None:
    options, action, words = REFUSALS[name]
    write_series(tmp_path / "src" / "bad", **options)
    write_series(tmp_path / "src" / "good", patient="OTHER-1")
    summary = run(tmp_path)
    (bad,) = [row for row in summary.rows if row.action != "import"]
    assert bad.action == action and words in bad.reason
    assert len(summary.imported) == 1 and not list((tmp_path / "bids").glob(".import-*"))


def test_a_ct_whose_positions_are_straight_is_imported_in_hounsfield_units(tmp_path: Path) -> None:
    write_series(tmp_path / "src", change=straight_ct, description="head")
    summary = run(tmp_path)
    assert len(summary.imported) == 1, summary.refused
    (path,) = (tmp_path / "bids").rglob("*_CT.nii.gz")
    assert np.array_equal(np.sort(_NIB.load(path).get_fdata().ravel()), np.sort(greys().astype(float).ravel() - 1024))


def test_bad_files_are_listed_and_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "src"
    good = write_series(source)
    (source / "notes.txt").write_text("x" * 200)
    (source / "empty").touch()
    (source / "export.zip").write_bytes(b"PK\x03\x04" + bytes(300))
    (source / "cut.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x01")
    (tmp_path / "out.dcm").write_bytes(b"x")
    (source / "link.dcm").symlink_to(tmp_path / "out.dcm")
    (source / "größe.dcm").write_bytes((source / next(source.glob("*.dcm")).name).read_bytes())  # a copy: counts once
    bombed = good[0]
    bomb(0, bombed)
    bombed.save_as(source / "bomb.dcm", enforce_file_format=True)
    summary = run(tmp_path)
    said = {name: why.split(";")[0].split("(")[0].strip() for name, why in summary.passed.items()}
    assert said.pop("bomb.dcm").startswith("promises 6866 MiB")
    assert said == {
        "notes.txt": "not a DICOM file", "empty": "empty file", "export.zip": "an archive",
        "cut.dcm": said["cut.dcm"], "link.dcm": "a link that leads out of the folder",
    }  # fmt: skip
    assert len(summary.imported) == 1


def test_the_mapping_file_decides_and_old_files_go(tmp_path: Path) -> None:
    write_series(tmp_path / "src")
    run(tmp_path)
    mapping = tmp_path / "bids" / "code" / "dicom_mapping.tsv"
    edited = tmp_path / "edited.tsv"
    edited.write_text(mapping.read_text().replace("\tanat\t\tFLAIR\t", "\tanat\tacq-ax_ce-gadolinium\tT1w\t"))
    (tmp_path / "bids" / "participants.tsv").write_text(
        (tmp_path / "bids" / "participants.tsv").read_text().replace("participant_id", "participant_id\tgrade").rstrip()
        + "\t3\n"
    )
    run(tmp_path, mapping=edited)
    (path,) = (tmp_path / "bids").glob("sub-*/ses-*/anat/*.nii.gz")
    assert path.name.endswith("_acq-ax_ce-gadolinium_T1w.nii.gz")
    assert "grade" in (tmp_path / "bids" / "participants.tsv").read_text()
    edited.write_text(mapping.read_text().replace("\timport\t", "\tskip\t"))
    run(tmp_path, mapping=edited)
    assert not list((tmp_path / "bids").glob("sub-*"))
    for text, words in (
        (edited.read_text().replace("\tskip\t", "\tmaybe\t"), "action = 'maybe'"),
        (mapping.read_text().replace("\tskip\tanat\t", "\timport\tbrain\t"), "datatype = 'brain'"),
        ("series\taction\n", "no column"),
    ):
        edited.write_text(text)
        with pytest.raises(DataError, match=words):
            run(tmp_path, mapping=edited)


def test_the_same_import_twice_gives_the_same_bytes_and_a_later_one_takes_no_name(tmp_path: Path) -> None:
    write_series(tmp_path / "src", uid="1.2.3.111111")
    run(tmp_path)
    first = {p.name: p.read_bytes() for p in (tmp_path / "bids").rglob("*.nii.gz")}
    run(tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "bids").rglob("*.nii.gz")} == first
    write_series(tmp_path / "later", uid="1.2.3.222222")
    import_dicom(tmp_path / "later", tmp_path / "bids", tmp_path / "state")
    names = sorted(p.name.split("_", 2)[2] for p in (tmp_path / "bids").rglob("*.nii.gz"))
    assert names == ["FLAIR.nii.gz", "run-2_FLAIR.nii.gz"]


def test_places_that_cannot_be(tmp_path: Path) -> None:
    write_series(tmp_path / "src")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    cases: list[tuple[type[FedNeuroError], str, dict[str, Any]]] = [
        (BadInput, "lies in SRC", {"out": tmp_path / "src" / "bids"}),
        (BadInput, "lies in --out", {"keys": tmp_path / "bids" / "state"}),
        (StateError, "no import wrote", {"out": tmp_path / "full"}),
        (DataError, "does not exist", {"source": tmp_path / "nowhere"}),
        (DataError, "no DICOM object", {"source": tmp_path / "full"}),
        (BadInput, "expected a command with", {"deface": "pydeface"}),
    ]
    for error, words, options in cases:
        places: dict[str, Any] = {"source": tmp_path / "src", "out": tmp_path / "bids", "keys": tmp_path / "state"}
        with pytest.raises(error, match=words):
            import_dicom(**places | options)


def test_defacing_hook(tmp_path: Path) -> None:
    write_series(tmp_path / "src")
    summary = run(tmp_path, deface="cp {in} {out}")
    assert len(summary.imported) == 1
    assert "ended with code" in next(iter(run(tmp_path, deface="false {in} {out}").refused.values()))


def test_segmentation_object_becomes_masks(tmp_path: Path) -> None:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    objects = write_series(tmp_path / "src")
    drawn = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0], 2), np.uint8)
    drawn[2:4, 3:6, 4:9, 0] = 1
    drawn[1, 8:, 10:, 1] = 1
    segments = [
        hd.seg.SegmentDescription(
            number, label, codes.SCT.Tissue, codes.SCT.Tissue, hd.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, label in ((1, "Tumour core"), (2, "Oedema"))
    ]
    seg = hd.seg.Segmentation(
        objects, drawn, hd.seg.SegmentationTypeValues.BINARY, segments, generate_uid(), 2, generate_uid(), 1,
        "maker", "model", "1", "serial-123",
    )  # fmt: skip
    seg.save_as(tmp_path / "src" / "seg.dcm")
    summary = run(tmp_path)
    assert summary.refused == {}
    masks = {p.name.split("label-")[1]: p for p in (tmp_path / "bids" / "derivatives").rglob("*.nii.gz")}
    assert set(masks) == {"tumourcore_mask.nii.gz", "oedema_mask.nii.gz"}
    (image,) = (tmp_path / "bids").glob("sub-*/ses-*/anat/*.nii.gz")
    for number, name in ((0, "tumourcore_mask.nii.gz"), (1, "oedema_mask.nii.gz")):
        mask = _NIB.load(masks[name])
        assert np.array_equal(mask.affine, _NIB.load(image).affine)
        found = np.asarray(_NIB.as_closest_canonical(mask).dataobj)
        assert np.array_equal(found, drawn[..., number].transpose(2, 1, 0)[::-1, ::-1])


def test_structure_set_becomes_a_mask_with_a_hole(tmp_path: Path) -> None:
    objects = write_series(tmp_path / "src")
    write_structures(tmp_path / "src", objects[0], [_square(1.5, 9.5), _square(4.5, 6.5)], slice_number=2)
    run(tmp_path)
    (path,) = (tmp_path / "bids" / "derivatives").rglob("*_label-gtv_mask.nii.gz")
    found = np.asarray(_NIB.as_closest_canonical(_NIB.load(path)).dataobj)
    expected = np.zeros(SHAPE, np.uint8)
    expected[2:10, 2:10, 2] = 1
    expected[5:7, 5:7, 2] = 0
    assert np.array_equal(found, expected[::-1, ::-1])


def _square(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (high, low), (high, high), (low, high)]


def test_structures_without_their_image_or_off_its_slices_are_refused(tmp_path: Path) -> None:
    objects = write_series(tmp_path / "src")
    write_structures(tmp_path / "src", objects[0], [[(1, 1), (5, 1), (5, 5)]], slice_number=2.5)
    assert "between the slices" in next(iter(run(tmp_path).refused.values()))
    write_structures(tmp_path / "alone", objects[0], [[(1, 1), (5, 1), (5, 5)]], slice_number=2)
    alone = import_dicom(tmp_path / "alone", tmp_path / "other", tmp_path / "state")
    assert "was not imported" in next(iter(alone.refused.values()))


def write_structures(folder: Path, image: Dataset, shapes: list[Any], slice_number: float) -> None:
    """A structure set with one region; shapes in columns and rows of one slice."""
    folder.mkdir(exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, UID(RT)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    item = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))  # type: ignore[arg-type]
    item.SOPClassUID, item.SOPInstanceUID, item.Modality = RT, meta.MediaStorageSOPInstanceUID, "RTSTRUCT"
    item.PatientID, item.PatientName, item.StudyInstanceUID = image.PatientID, image.PatientName, image.StudyInstanceUID
    item.SeriesInstanceUID = generate_uid()
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = image.SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.RTReferencedStudySequence = [study]
    item.ReferencedFrameOfReferenceSequence = [frame]
    roi, contours = Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = 3, "GTV"
    contours.ReferencedROINumber, contours.ContourSequence = 3, []
    for shape in shapes:
        contour = Dataset()
        contour.ContourGeometricType = "CLOSED_PLANAR"
        points = [np.array(ORIGIN) + np.array([c, r, slice_number]) * SPACING for c, r in shape]
        contour.ContourData = [round(float(v), 6) for point in points for v in point]
        contour.NumberOfContourPoints = len(points)
        contours.ContourSequence.append(contour)
    item.StructureSetROISequence, item.ROIContourSequence = [roi], [contours]
    item.save_as(folder / "rtstruct.dcm", enforce_file_format=True)
