# SPDX-License-Identifier: Apache-2.0
"""Writes tiny BIDS sites for tests, and breaks them in the ways that real data sets are broken.

The images are noise with a bright block where the mask is 1 (and a brighter one where it is 2, …), so that even a few
training steps have something to learn.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedneuro.privacy.study import Study

__all__ = ["FAULTS", "make_study", "mask_path", "write_nifti", "write_site"]

_NIB: Any = nibabel
RAS = np.diag([1.0, 1.0, 1.0, 1.0])


def make_study(**sections: Any) -> Study:
    """A valid small study without privacy: 2D, 16×16 patches; sections are merged key by key."""
    values: dict[str, Any] = {
        "study": {"name": "toy"},
        "task": {},
        "data": {"patch": [16, 16], "augment": "none"},
        "model": {"channels": [4, 8]},
        "training": {"rounds": 2, "local_epochs": 1},
        "privacy": {"mode": "none"},
        "evaluation": {"worst": 0},  # the site's own report has tests of its own
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Study.parse(values)


def write_nifti(
    path: Path,
    data: NDArray[Any],
    *,
    affine: NDArray[np.float64] = RAS,
    units: str = "mm",
    codes: int = 1,
) -> Path:
    """Write one NIfTI file; ``codes=0`` leaves its orientation unstated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = _NIB.Nifti1Image(data, affine)
    image.header.set_xyzt_units(units, "sec")
    image.set_sform(affine, code=codes)
    image.set_qform(affine, code=codes)
    _NIB.save(image, path)
    return path


def write_site(
    root: Path,
    *,
    patients: int | Sequence[str] = 4,
    shape: tuple[int, ...] = (20, 18, 6),
    modalities: Sequence[str] = ("FLAIR",),
    mask: str | None = "label-lesion_mask",
    labels: int = 1,
    sessions: Sequence[str] = ("",),
    classes: Sequence[str] = (),
    target: str = "kind",
    affine: NDArray[np.float64] = RAS,
    units: str = "mm",
    seed: int = 0,
) -> Path:
    """Write a BIDS site and return its folder.

    Args:
        root: folder of the site.
        patients: how many (``sub-P001`` …), or their ids.
        shape: of every image; two numbers give 2D images.
        modalities: one image each.
        mask: its BIDS name below ``derivatives/manual``; None: no masks.
        labels: label values 1 to this, each a small block.
        sessions: such as ``("ses-1", "ses-2")``.
        classes: dealt to the patients in turn, in column ``target`` of participants.tsv.
        affine: voxel to world.
        units: of the header.
        seed: another seed, other images.
    """
    ids = [f"sub-P{i:03d}" for i in range(1, patients + 1)] if isinstance(patients, int) else list(patients)
    rows = ["\t".join(["participant_id", *([target] if classes else [])])]
    for number, patient in enumerate(ids):
        rows.append("\t".join([patient, *([classes[number % len(classes)]] if classes else [])]))
        rng = np.random.default_rng([seed, *patient.encode()])
        for session in sessions:
            drawn = _blocks(shape, labels, rng)
            stem = "_".join(filter(None, (patient, session)))
            for modality in modalities:
                grey = rng.normal(100, 10, shape) + 100 * drawn
                write_nifti(
                    root / patient / session / "anat" / f"{stem}_{modality}.nii.gz",
                    grey.astype(np.float32),
                    affine=affine,
                    units=units,
                )
            if mask:
                write_nifti(mask_path(root, patient, session=session, mask=mask), drawn, affine=affine, units=units)
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    (root / "dataset_description.json").write_text('{"Name": "test", "BIDSVersion": "1.10.0"}\n')
    return root


def _blocks(shape: tuple[int, ...], labels: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    drawn = np.zeros(shape, np.uint8)
    for label in range(1, labels + 1):
        corner = [int(rng.integers(0, max(n - 4, 1))) for n in shape]
        drawn[tuple(slice(c, c + 4) for c in corner)] = label
    return drawn


def image_path(root: Path, patient: str = "sub-P001", modality: str = "FLAIR") -> Path:
    """Where :func:`write_site` put an image (without sessions)."""
    return root / patient / "anat" / f"{patient}_{modality}.nii.gz"


def mask_path(root: Path, patient: str = "sub-P001", *, session: str = "", mask: str = "label-lesion_mask") -> Path:
    """Where :func:`write_site` put a mask."""
    stem = "_".join(filter(None, (patient, session)))
    return root / "derivatives" / "manual" / patient / session / "anat" / f"{stem}_{mask}.nii.gz"


def _change(path: Path, change: Callable[[NDArray[Any]], NDArray[Any]], affine: NDArray[np.float64] = RAS) -> None:
    write_nifti(path, change(np.asarray(_NIB.load(path).dataobj)), affine=affine)


def _corner(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(data: NDArray[Any]) -> NDArray[Any]:
        data = data.copy()
        data[0, 0, 0] = value
        return data

    return change


def _cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))


SHIFTED = RAS + np.array([[0, 0, 0, 5.0]] + [[0] * 4] * 3)

FAULTS: Mapping[str, Callable[[Path], object]] = {
    "mask-shape": lambda root: _change(mask_path(root), lambda data: data[:-1]),
    "mask-affine": lambda root: _change(mask_path(root), lambda data: data, SHIFTED),
    "mask-value": lambda root: _change(mask_path(root), _corner(7)),
    "mask-nan": lambda root: _change(mask_path(root), lambda data: _corner(np.nan)(data.astype(np.float32))),
    "mask-empty": lambda root: _change(mask_path(root), np.zeros_like),
    "mask-missing": lambda root: mask_path(root).unlink(),
    "image-nan": lambda root: _change(image_path(root), _corner(np.nan)),
    "image-inf": lambda root: _change(image_path(root), _corner(np.inf)),
    "image-4d": lambda root: _change(image_path(root), lambda data: np.stack([data] * 3, axis=-1)),
    "image-truncated": lambda root: _cut(image_path(root), 0.5),
    "image-corrupt": lambda root: _flip_byte(image_path(root)),
    "image-not-nifti": lambda root: image_path(root).write_bytes(b"GIF89a" * 100),
    "image-missing": lambda root: image_path(root).unlink(),
}
"""Each breaks the first patient of a site of a site as :func:`write_site` makes it by default: one FLAIR, one mask."""
