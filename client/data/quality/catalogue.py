# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - a table of sentences
"""The catalogue of checks: what each may find, how grave it is, why it matters and what to do about it.

``blocks``: the data set may not join before this is settled. ``warns``: somebody should look; it may be right.
``notes``: good to know. A check that is not in the catalogue cannot report anything.
"""

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["CATALOGUE", "Check", "Finding", "Severity"]

Severity = Literal["blocks", "warns", "notes"]


@dataclass(frozen=True, slots=True)
class Check:
    """One entry: what the finding is called, and what staff should know."""

    severity: Severity
    title: str
    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    check: str  # key of the catalogue
    patients: tuple[str, ...]
    detail: str

    @property
    def entry(self) -> Check:
        """Its entry in the catalogue."""
        return CATALOGUE[self.check]


def _blocks(title: str, why: str, remedy: str) -> Check:
    return Check("blocks", title, why, remedy)


def _warns(title: str, why: str, remedy: str) -> Check:
    return Check("warns", title, why, remedy)


def _notes(title: str, why: str, remedy: str) -> Check:
    return Check("notes", title, why, remedy)


_AGAIN: Final = "Copy or export the file again."
_LOOK: Final = "Look at the image; correct it, or take the patient out."

CATALOGUE: Final[dict[str, Check]] = {
    # -- the folder
    "changed-since-registration": _warns(
        "The folder changed since it was registered", "Results would no longer belong to the registered fingerprint.",
        "If the change is wanted: fedneuro-node data register NAME PATH --update."),
    "bids-description": _notes(
        "No sound dataset_description.json", "BIDS tools refuse the folder without it.",
        'Add the file with "Name" and "BIDSVersion".'),
    "bids-name": _warns(
        "File names that BIDS does not know", "Files with such names are passed over in training.",
        "Rename to sub-X_[ses-Y_][entities_]SUFFIX.nii.gz, for example sub-01_ce-gadolinium_T1w.nii.gz."),
    "bids-place": _blocks(
        "A file in another patient's folder", "One person's scan would count for another.", "Move or rename the file."),
    "bids-case": _blocks(
        "Patient ids that differ in upper and lower case only", "Some disks take them for one folder.",
        "Rename one of them."),
    "bids-no-images": _blocks(
        "A patient without any image", "The patient is counted but cannot train.", "Add the images, or remove the folder."),
    "table-row": _warns(
        "participants.tsv and folders differ", "A patient without a row has no class; a row without a folder is no patient.",
        "Add or remove the row."),
    "table-broken": _blocks(
        "participants.tsv cannot be used", "Classes, splits and cohort tables are read from it.",
        "Save it as tab-separated UTF-8 with one row per patient and a column participant_id."),
    "link-outside": _blocks(
        "A link that leads out of the data set", "What it points to can change or vanish without notice.",
        "Copy the file itself into the folder."),
    # -- the file
    "file-broken": _blocks(
        "A file that cannot be read", "Training would stop at it.", _AGAIN),
    "file-not-3d": _blocks(
        "A file that is no plain 3D image", "Time series and colour images have no place in the model's input.",
        "Split it into one file per volume, or move it to func/ or dwi/."),
    "header-affine": _blocks(
        "An affine that maps voxels nowhere", "Nobody can say where the voxels lie.", "Correct sform or qform, or export again."),
    "header-orientation-unstated": _warns(
        "Orientation is not stated", "Left and right are a guess (sform and qform codes are 0).",
        "Convert again from DICOM, with a converter that fills in the header."),
    "header-forms-differ": _warns(
        "sform and qform contradict each other", "Programs that read one or the other place the head differently.",
        "Set both to the right one (nibabel: set_qform, set_sform)."),
    "units-missing": _notes(
        "No unit of length in the header", "Distances in mm cannot be reported.", "Set the unit to mm if the sizes are mm."),
    "units-wrong": _blocks(
        "Voxel sizes that no scanner makes", "Sizes below 0.05 or above 20 mm come from metres or micrometres taken for mm.",
        "Correct unit and voxel size in the header."),
    "spacing-odd": _warns(
        "Voxel size unlike the rest", "Another protocol, or a conversion that lost the size.", _LOOK),
    "extent-odd": _warns(
        "Field of view unlike the rest", "Another body part, a crop, or a wrong voxel size.", _LOOK),
    "position-far": _warns(
        "An image that lies far from the scanner's centre", "More than 2 m: the origin in the header is wrong.",
        "Correct the affine."),
    "identity-header": _blocks(
        "Identity in an image header", "The file tells who or when to anybody who opens it.",
        "Clear descrip, aux_file, db_name, intent_name, header extensions and the name inside the gzip file; or import again."),
    "identity-text": _blocks(
        "Identity in a text file", "Names, dates of birth or numbers stand in a side-car or table.",
        "Remove the fields; keep technical values only."),
    "identity-name": _warns(
        "A date or number like an identity in a file name", "File names appear in logs and reports.",
        "Rename patients to pseudonyms, as data import dicom does."),
    # -- the image
    "voxels-not-finite": _blocks(
        "Voxels that are NaN or infinite", "One of them ruins a training step.", "Export again, or set them to 0."),
    "voxels-constant": _blocks(
        "An image of one grey value", "It shows nothing.", _AGAIN),
    "voxels-few-greys": _warns(
        "Very few grey values", "The image was stored with too few bits, or is a mask.", "Export with 12 or 16 bits."),
    "voxels-overflow": _blocks(
        "Grey values that ran over", "Bright tissue turned dark (or negative) because the number type was too small.",
        "Export again with a wider type."),
    "voxels-clipped": _warns(
        "Clipped grey values", "Many of the brightest voxels hold the same value: bright tissue cannot be told apart.",
        "Export again without a display window."),
    "slices-empty": _warns(
        "Empty slices inside the head", "Slices were lost in transfer or conversion.", "Send the series again."),
    "slices-repeated": _warns(
        "Slices that repeat their neighbour", "Slices were doubled in transfer, or the volume was stretched.",
        "Send the series again."),
    "quality-outlier": _warns(
        "Image quality far from the rest", "Motion, noise or another protocol (SNR, CNR, FBER, EFC after MRIQC).", _LOOK),
    "orientation-odd": _blocks(
        "Lies differently from the rest", "The image fits the others best when turned or mirrored: the voxels were turned "
        "without the header.", "Convert again from DICOM, or turn the voxels back."),
    "orientation-cohort": _blocks(
        "The whole data set lies wrong", "The mean image fits the template best when turned: a systematic conversion fault.",
        "Convert again from DICOM."),
    "orientation-unjudged": _notes(
        "Slices too unlike to say how each lies", "Single slices of several planes or levels have no common picture.",
        "Look at the pictures: are noses and eyes where they should be?"),
    "axes-odd": _notes(
        "Stored in another order of axes than the rest", "Harmless if the header is right; a sign of a second converter.",
        "Compare one of these images with the viewer of the PACS, left and right above all."),
    "modality-swapped": _blocks(
        "Two modalities look exchanged", "Each of the two images is more like the other's name.", "Rename the files."),
    "modality-unlike": _warns(
        "Looks like another modality", "The file may be named after the wrong sequence, or the contrast agent missed.",
        "Look at the image; rename it if it is another sequence."),
    "modality-copied": _blocks(
        "Two modalities hold the same image", "One was saved in place of the other.", "Export the missing one again."),
    "modality-missing": _warns(
        "A modality is missing", "The study leaves such patients out, or feeds zeros.", "Add it if it exists."),
    "grid-differs": _blocks(
        "Images or masks of one scan on different grids", "Voxels of one do not meet those of the other.",
        "Resample onto one grid; masks with nearest neighbour."),
    # -- the mask
    "mask-missing": _blocks("No mask", "Nothing to learn from.", "Draw it, or take the patient out."),
    "mask-empty": _warns("An empty mask", "Right only if the patient has no lesion.", 'Draw it, or set data.empty_masks="keep".'),
    "mask-full": _blocks(
        "A mask that covers almost everything", "Inverted, or saved as the head mask.", "Invert or redraw it."),
    "mask-values": _blocks(
        "Mask values unlike the rest", "A label is coded in another way (255 in place of 1).", "Recode the mask."),
    "mask-not-whole": _blocks(
        "Mask values between the labels", "The mask was resampled with interpolation.", "Resample with nearest neighbour."),
    "mask-overlap": _warns(
        "Masks that overlap", "A voxel would have two labels.", "Decide which one holds."),
    "mask-outside": _blocks(
        "A mask outside the head", "Shifted, flipped, or of another patient.", "Compare image and mask; draw it again."),
    "mask-unlike-image": _warns(
        "The mask does not fit its image", "Inside and outside do not differ as in other patients: of another patient, "
        "flipped, or shifted.", "Open both in a viewer; exchange or redraw the mask."),
    "mask-swapped": _blocks(
        "Masks of two patients exchanged", "Each fits the other's image better than its own.", "Exchange them."),
    "mask-mirrored": _blocks(
        "The mask fits the mirrored image better", "Image or mask was flipped without the other.", "Convert both again."),
    "mask-shifted": _warns(
        "The mask lies beside its structure", "Shifted by about a voxel: resampled with another convention of voxel centres.",
        "Resample again, with one program for both."),
    # -- the cohort
    "duplicate-patient": _blocks(
        "One patient under two names", "The model is tested on what it has seen, and the privacy of one person is spent "
        "twice.", "Remove one of the two."),
    "duplicate-split": _blocks(
        "One patient in training and test", "Scores would be too good.", "Put both on one side, or remove one."),
    "duplicate-scan": _warns(
        "The same scan twice for one patient", "It counts double.", "Remove one."),
    "duplicate-mask": _warns(
        "Two patients share one mask", "A mask was copied in place of another.", "Restore the right mask."),
    "cohort-small": _notes(
        "Few patients", "Below 6 patients nothing can be compared with the rest: outliers go unseen.", "Add patients."),
}  # fmt: skip
