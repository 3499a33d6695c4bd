# SPDX-License-Identifier: Apache-2.0
"""Bad data: every fault is a DataError whose lines name the site, the patient, the file and the remedy."""

from pathlib import Path

import numpy as np
import pytest

from fedneuro.client.data import open_site
from fedneuro.privacy.errors import DataError, Reason
from tests.bids import FAULTS, RAS, image_path, make_study, mask_path, write_nifti, write_site

CLASSES = {
    "task": {"kind": "classification", "target": "kind", "labels": ["glioma", "meningioma"]},
    "model": {"name": "resnet", "norm": "group", "channels": [4, 8, 8, 8]},
    "training": {"loss": "cross_entropy"},
}

# fault: words that its line must hold, beside site, patient and file
EXPECTED = {
    "mask-shape": ("19×18×6", "expected 20×18×6", "resample"),
    "mask-affine": ("affine", "5 units", "resample"),
    "mask-value": ("mask holds 7", "0 background, 1 lesion", "task.labels"),
    "mask-nan": ("NaN", "expected finite"),
    "mask-empty": ("empty mask", '--set data.empty_masks="keep"'),
    "mask-missing": ("no mask", "label-lesion_mask.nii.gz", "task.mask"),
    "image-nan": ("1 of 2160 voxels are NaN or infinite",),
    "image-inf": ("1 of 2160 voxels are NaN or infinite",),
    "image-4d": ("4D image of shape 20×18×6×3", "expected one 3D volume", "split it"),
    "image-truncated": ("cannot be read", "expected a NIfTI file"),
    "image-corrupt": ("cannot be read", "expected a NIfTI file"),
    "image-not-nifti": ("cannot be read", "expected a NIfTI file"),
    "image-missing": ("no FLAIR image", '--set data.missing_modality="exclude"', '"zero"'),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "after-a-sound-opening"])
def test_each_fault_is_one_line_that_names_the_thing(fault: str, warm: bool, tmp_path: Path) -> None:
    root, study = write_site(tmp_path / "HT", patients=6), make_study()
    if warm:
        open_site(root, study, cache=tmp_path / "cache")
    FAULTS[fault](root)
    with pytest.raises(DataError) as caught:
        open_site(root, study, cache=tmp_path / "cache")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("HT: sub-P001") and "sub-P001: sub-P001:" not in line
    for words in EXPECTED[fault]:
        assert words in line
    assert caught.value.exit_code == 2
    assert caught.value.reason is Reason.DATA_INVALID


def test_all_faults_are_told_at_once_and_capped_at_ten(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=14)
    for patient in range(1, 13):
        mask_path(root, f"sub-P{patient:03d}").unlink()
    write_nifti(image_path(root, "sub-P013"), np.full((20, 18, 6), np.nan, np.float32))
    with pytest.raises(DataError) as caught:
        open_site(root, make_study())
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 3 more"
    assert all(f"sub-P{i:03d}" in line for i, line in enumerate(lines[:10], 1))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: path.parent.mkdir(exist_ok=True), "does not exist"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: path.mkdir(), "zero patients (it holds nothing)"),
        (lambda path: (path / "patient1").mkdir(parents=True), "zero patients (it holds patient1)"),
        (lambda path: (path / "sub-01 copy").mkdir(parents=True), "not a BIDS patient folder"),
    ],
    ids=["absent", "file", "empty", "not-bids", "odd-name"],
)
def test_not_a_data_set(prepare: object, words: str, tmp_path: Path) -> None:
    prepare(tmp_path / "HT")  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        open_site(tmp_path / "HT", make_study())
    assert words in str(caught.value)
    assert "HT" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_modalities_of_a_patient_must_lie_at_one_place(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", modalities=("FLAIR", "T1w"))
    shifted = RAS.copy()
    shifted[0, 3] = 0.5
    write_nifti(image_path(root, modality="T1w"), np.ones((20, 18, 6), np.float32), affine=shifted)
    with pytest.raises(DataError, match=r"sub-P001_T1w\.nii\.gz: its affine .* sub-P001_FLAIR\.nii\.gz"):
        open_site(root, make_study(data={"modalities": ["FLAIR", "T1w"]}))


def test_affines_may_differ_by_rounding(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", modalities=("FLAIR", "T1w"))
    nearly = RAS.copy()
    nearly[:3, 3] += 1e-3
    write_nifti(image_path(root, modality="T1w"), np.ones((20, 18, 6), np.float32), affine=nearly)
    assert len(open_site(root, make_study(data={"modalities": ["FLAIR", "T1w"]})).patients) == 4


def test_a_file_in_another_patients_folder_is_refused(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    image_path(root).rename(root / "sub-P001" / "anat" / "sub-P002_FLAIR.nii.gz")
    with pytest.raises(DataError, match="named after another patient"):
        open_site(root, make_study())


def test_two_masks_for_one_scan_are_refused(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    other = root / "derivatives" / "second" / "sub-P001" / "anat" / mask_path(root).name
    write_nifti(other, np.ones((20, 18, 6), np.uint8))
    with pytest.raises(DataError, match="2 files for one place"):
        open_site(root, make_study())


def test_resampling_needs_a_known_voxel_size(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=1, units="unknown")
    study = make_study(data={"spacing": [2.0, 2.0, 2.0]}, evaluation={"heldout": ["HT"]})
    with pytest.raises(DataError, match=r"voxel size unknown .* --set 'data\.spacing=\[\]'"):
        open_site(root, study)


def test_slices_must_be_pictures(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", shape=(1, 18, 20))
    with pytest.raises(DataError, match=r'--set data\.slice_axis="sagittal"'):
        open_site(root, make_study())
    assert open_site(root, make_study(data={"slice_axis": "sagittal"})).patients


def test_empty_masks_are_kept_on_demand(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    FAULTS["mask-empty"](root)
    site = open_site(root, make_study(data={"empty_masks": "keep"}))
    assert not site.scans("sub-P001")[0].label.any()


def test_float_and_scaled_masks_are_read(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    drawn = np.zeros((20, 18, 6), np.float32)
    drawn[3, 4, 5] = 1.0000001
    write_nifti(mask_path(root), drawn)
    assert open_site(root, make_study()).scans("sub-P001")[0].label.sum() == 1


def test_missing_modality_excludes_or_feeds_zeros(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=8, modalities=("FLAIR", "T1w"))
    image_path(root, modality="FLAIR").unlink()
    wanted = {"modalities": ["FLAIR", "T1w"]}
    excluding = open_site(root, make_study(data=wanted | {"missing_modality": "exclude"}))
    assert excluding.excluded == {"sub-P001": "no FLAIR"}
    assert "sub-P001" not in excluding.patients
    assert any("1 patients left out: sub-P001 (no FLAIR)" in text for text in excluding.warnings)
    filling = open_site(root, make_study(data=wanted | {"missing_modality": "zero"}))
    image = filling.scans("sub-P001")[0].image
    assert not image[0].any()
    assert image[1].std() > 0.9
    assert not filling.excluded


@pytest.mark.parametrize("policy", ["exclude", "zero"])
def test_a_patient_without_any_image_is_left_out(policy: str, tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=6)
    image_path(root).unlink()
    assert open_site(root, make_study(data={"missing_modality": policy})).excluded == {"sub-P001": "no FLAIR"}


def test_all_patients_left_out(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    with pytest.raises(DataError, match=r"HT: all 4 patients are left out \(sub-P001: no T2w\)"):
        open_site(root, make_study(data={"modalities": ["T2w"], "missing_modality": "exclude"}))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "no participants.tsv"),
        ("participant_id\tage\nsub-P001\t3\n", "no column kind (it has participant_id, age)"),
        ("participant_id\tkind\nsub-P001\tglioma\n", "sub-P002 has no row"),
        (
            "participant_id\tkind\nsub-P001\tglioma\nsub-P002\tcyst\n",
            "kind = 'cyst'; expected one of glioma, meningioma",
        ),
        ("participant_id\tkind\nsub-P001\tglioma\nsub-P002\t\n", "kind = 'nothing'"),
        ("participant_id\tkind\nsub-P001\tglioma\nsub-P001\tglioma\n", "sub-P001 stands there more than once"),
        ("id\tkind\nsub-P001\tglioma\n", "row without participant_id"),
        ("participant_id\tkind\nsub-P001\tgliöma\n".encode("latin-1"), "UTF-8"),
    ],
    ids=["no-table", "no-column", "no-row", "other-value", "no-value", "twice", "no-id", "latin-1"],
)
def test_classes_come_from_a_sound_table(table: str | bytes | None, words: str, tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=2, mask=None)
    file = root / "participants.tsv"
    file.unlink()
    if table is not None:
        file.write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(DataError) as caught:
        open_site(root, make_study(**CLASSES))
    assert words in str(caught.value)
    assert str(caught.value).startswith("HT: ")
    assert "\n" not in str(caught.value)


def test_double_rows_are_refused_for_segmentation_too(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    with (root / "participants.tsv").open("a") as file:
        file.write("sub-P002\n")
    with pytest.raises(DataError, match="sub-P002 stands there more than once"):
        open_site(root, make_study())


def test_a_site_without_training_patients(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=1)
    study = {"evaluation": {"validation_fraction": 0.999}}
    with pytest.raises(DataError, match=r"HT: no training patients: all 1 .* lower evaluation\.validation_fraction"):
        open_site(root, make_study(**study))
    held_out = {"evaluation": {"validation_fraction": 0.999, "heldout": ["HT"]}}
    assert open_site(root, make_study(**held_out)).patients == ("sub-P001",)
    # The name in the study counts, not the folder's.
    named = {"evaluation": {"validation_fraction": 0.999, "heldout": ["berlin"]}}
    assert open_site(root, make_study(**named), site="berlin").name == "berlin"


def test_a_site_without_validation_patients_is_warned(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=2)
    site = open_site(root, make_study(evaluation={"validation_fraction": 0.001}))
    assert any("none of 2 patients validates" in text for text in site.warnings)


def test_warnings_tell_what_a_person_should_know(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=6, units="unknown")
    (root / "participants.tsv").write_text("participant_id\nsub-P001\nsub-P099\n")
    data = np.random.default_rng(0).normal(size=(20, 18, 6)).astype(np.float32)
    for patient in ("sub-P001", "sub-P002"):
        write_nifti(image_path(root, patient), data, codes=0)
        write_nifti(mask_path(root, patient), (data > 2).astype(np.uint8), codes=0)
    warnings = " | ".join(open_site(root, make_study()).warnings)
    assert "voxel size unknown for 4 of 6 patients" in warnings
    assert "orientation not stated for 2 of 6 patients" in warnings
    assert "sub-P001 and sub-P002 hold the same files" in warnings
    assert "1 patients have a row in participants.tsv but no folder: sub-P099" in warnings
    assert "5 patients have a folder but no row" in warnings


@pytest.mark.parametrize("seed", range(25))
def test_a_damaged_file_never_gives_a_foreign_error(seed: int, tmp_path: Path) -> None:
    """Random bytes of an uncompressed NIfTI header are overwritten: the site opens, or says so in one line."""
    root = write_site(tmp_path / "HT", patients=1)
    path = image_path(root)
    plain = path.with_suffix("")
    write_nifti(plain, np.random.default_rng(seed).normal(size=(20, 18, 6)).astype(np.float32))
    path.unlink()
    raw, rng = bytearray(plain.read_bytes()), np.random.default_rng(seed)
    for place in rng.integers(0, 348, size=12):
        raw[place] = int(rng.integers(256))
    plain.write_bytes(bytes(raw))
    study = make_study(evaluation={"heldout": ["HT"]})
    try:
        scan = open_site(root, study).scans("sub-P001")[0]
    except DataError as error:
        assert "sub-P001" in str(error)
        assert "\n" not in str(error)
    else:
        assert scan.image.isfinite().all()
