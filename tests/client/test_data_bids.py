# SPDX-License-Identifier: Apache-2.0
"""Which files make a scan: modalities by entities and suffix, sessions, runs, shared images, masks."""

from pathlib import Path

import pytest

from fedneuro.client.data.bids import ScanFiles, find_scans, read_participants
from fedneuro.privacy.errors import DataError


def scans_of(root: Path, files: list[str], modalities: list[str], mask: str | None = None) -> list[ScanFiles]:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return find_scans(root, "sub-1", modalities, mask)


def names(scans: list[ScanFiles]) -> list[tuple[str, list[str | None], str | None]]:
    return [(s.name, [p.name if p else None for p in s.images], s.mask.name if s.mask else None) for s in scans]


@pytest.mark.parametrize(
    ("modality", "file"),
    [
        ("T1w", "sub-1_T1w.nii.gz"),
        ("ce-gadolinium_T1w", "sub-1_ce-gadolinium_T1w.nii.gz"),
        ("FLAIR", "sub-1_acq-tse_FLAIR.nii"),
        ("T2w", None),
        ("ce-other_T1w", None),
        ("1w", None),
    ],
)
def test_a_modality_matches_its_entities_exactly(modality: str, file: str | None, tmp_path: Path) -> None:
    files = ["sub-1_T1w.nii.gz", "sub-1_ce-gadolinium_T1w.nii.gz", "sub-1_acq-tse_FLAIR.nii", "sub-1_T1w.json"]
    scans = scans_of(tmp_path, [f"sub-1/anat/{f}" for f in files], [modality])
    assert [images for _, images, _ in names(scans)] == ([[file]] if file else [])


def test_entities_may_come_in_any_order(tmp_path: Path) -> None:
    scans = scans_of(tmp_path, ["sub-1/anat/sub-1_ce-gd_rec-norm_T1w.nii.gz"], ["rec-norm_ce-gd_T1w"])
    assert scans[0].images[0] is not None


def test_sessions_and_runs_are_scans_with_their_own_masks(tmp_path: Path) -> None:
    files = [
        "sub-1/ses-b/anat/sub-1_ses-b_FLAIR.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_run-1_FLAIR.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_run-2_FLAIR.nii.gz",
        "derivatives/x/sub-1/ses-a/anat/sub-1_ses-a_run-2_dseg.nii.gz",
        "derivatives/y/sub-1/ses-b/anat/sub-1_ses-b_dseg.nii.gz",
    ]
    assert names(scans_of(tmp_path, files, ["FLAIR"], "dseg")) == [
        ("sub-1_ses-a_run-1", ["sub-1_ses-a_run-1_FLAIR.nii.gz"], None),
        ("sub-1_ses-a_run-2", ["sub-1_ses-a_run-2_FLAIR.nii.gz"], "sub-1_ses-a_run-2_dseg.nii.gz"),
        ("sub-1_ses-b", ["sub-1_ses-b_FLAIR.nii.gz"], "sub-1_ses-b_dseg.nii.gz"),
    ]


def test_a_mask_is_never_shared_between_runs(tmp_path: Path) -> None:
    """A mask without run was drawn on one of the two runs; nobody knows which."""
    files = ["sub-1/anat/sub-1_run-1_FLAIR.nii.gz", "sub-1/anat/sub-1_run-2_FLAIR.nii.gz"]
    files.append("derivatives/x/sub-1/anat/sub-1_dseg.nii.gz")
    assert [s.mask for s in scans_of(tmp_path, files, ["FLAIR"], "dseg")] == [None, None]


def test_the_only_image_of_a_modality_serves_the_session(tmp_path: Path) -> None:
    files = ["sub-1/anat/sub-1_acq-tse_FLAIR.nii.gz", "sub-1/anat/sub-1_acq-mprage_T1w.nii.gz"]
    files.append("derivatives/x/sub-1/anat/sub-1_dseg.nii.gz")
    assert names(scans_of(tmp_path, files, ["FLAIR", "T1w"], "dseg")) == [
        (
            "sub-1_acq-tse",
            ["sub-1_acq-tse_FLAIR.nii.gz", "sub-1_acq-mprage_T1w.nii.gz"],
            "sub-1_dseg.nii.gz",
        )
    ]


def test_two_candidates_are_refused(tmp_path: Path) -> None:
    files = ["sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_acq-a_T1w.nii.gz", "sub-1/anat/sub-1_acq-b_T1w.nii.gz"]
    with pytest.raises(DataError, match="2 files for one place"):
        scans_of(tmp_path, files, ["FLAIR", "T1w"])


def test_plain_and_packed_copies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 files for one place"):
        scans_of(tmp_path, ["sub-1/anat/sub-1_FLAIR.nii.gz", "sub-1/anat/sub-1_FLAIR.nii"], ["FLAIR"])


def test_other_folders_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    files = ["sub-1/func/sub-1_FLAIR.nii.gz", "sub-1/anat/._sub-1_FLAIR.nii.gz", "sub-10/anat/sub-10_FLAIR.nii.gz"]
    assert scans_of(tmp_path, files, ["FLAIR"]) == []


def test_participants_may_come_from_a_spreadsheet(tmp_path: Path) -> None:
    """Byte order mark, Windows line ends, blanks and a short row."""
    (tmp_path / "participants.tsv").write_bytes("\ufeffparticipant_id\tage\r\nsub-1\t 7 \r\nsub-2\r\n".encode())
    assert read_participants(tmp_path) == {
        "sub-1": {"participant_id": "sub-1", "age": "7"},
        "sub-2": {"participant_id": "sub-2", "age": ""},
    }
    assert read_participants(tmp_path / "elsewhere") is None
