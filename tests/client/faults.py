# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - a table: one fault a line
"""Plants one fault each in a phantom data set, as real data sets have shown them."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

__all__ = ["FAULTS", "PATIENTS"]

_NIB: Any = nibabel
PATIENTS = 10
Array = NDArray[Any]


def image(root: Path, number: int = 3, what: str = "FLAIR") -> Path:
    return root / f"sub-{number:03d}" / "anat" / f"sub-{number:03d}_{what}.nii.gz"


def mask(root: Path, number: int = 3) -> Path:
    return root / "derivatives/manual" / f"sub-{number:03d}" / "anat" / f"sub-{number:03d}_label-lesion_mask.nii.gz"


def rewrite(
    path: Path | list[Path], change: Callable[[Array], Array] = lambda data: data, *, affine: Callable[[Array], Array] | None = None,
    dtype: Any = None, header: Callable[[Any], object] = lambda _: None,
) -> None:  # fmt: skip
    for each in path[1:] if isinstance(path, list) else []:
        rewrite(each, change, affine=affine, dtype=dtype, header=header)
    path = path[0] if isinstance(path, list) else path
    old = _NIB.load(path)
    data = change(np.asarray(old.dataobj))
    place = affine(old.affine.copy()) if affine else old.affine
    new = _NIB.Nifti1Image(data if dtype is None else data.astype(dtype), place)
    new.header.set_xyzt_units("mm", "sec")
    header(new)
    _NIB.save(new, path)


def both(root: Path, change: Callable[[Array], Array], number: int = 3) -> None:
    """Image, second modality and mask alike: nothing inside the patient disagrees."""
    for path in (image(root, number), image(root, number, "T1w"), mask(root, number)):
        rewrite(path, change)


def put(value: float, where: Any) -> Callable[[Array], Array]:
    def change(data: Array) -> Array:
        data = data.astype(np.float32)
        data[where] = value
        return data

    return change


def copy_patient(root: Path, change: Callable[[Array], Array], number: int = 3, name: str = "sub-777") -> None:
    for path in (image(root, number), image(root, number, "T1w"), mask(root, number)):
        target = Path(str(path).replace(f"sub-{number:03d}", name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        if "mask" not in path.name:
            rewrite(target, change)
    with (root / "participants.tsv").open("a") as table:
        columns = (root / "participants.tsv").read_text().splitlines()[0].split("\t")
        table.write("\t".join([name, *["n/a"] * (len(columns) - 1)]) + "\n")


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def swap_masks(root: Path) -> None:
    first, second = (np.asarray(_NIB.load(mask(root, number)).dataobj) for number in (3, 5))
    rewrite(mask(root, 3), lambda _: second)
    rewrite(mask(root, 5), lambda _: first)


def flat(root: Path) -> None:
    raw = bytearray(gzip.decompress(image(root).read_bytes()))
    raw[312:328] = bytes(16)  # srow_z
    image(root).write_bytes(gzip.compress(raw))


def overflow(data: Array) -> Array:
    scaled = np.asarray(data, np.float64) * (40_000 / np.percentile(data, 95))
    return np.asarray(scaled.astype(np.int64).astype(np.int16))


def noisy(data: Array) -> Array:
    return data + np.random.default_rng(0).normal(0, 0.25 * np.percentile(data, 99), data.shape)


def blurred(data: Array) -> Array:
    """Ghosts of motion along the second axis."""
    return np.asarray(
        np.mean([np.roll(data.astype(np.float32), shift, 1) for shift in (-15, -10, -5, 0, 5, 10, 15)], axis=0)
    )


def table(root: Path, column: str, values: Callable[[int], str]) -> None:
    rows = (root / "participants.tsv").read_text().splitlines()
    lines = [f"{rows[0]}\t{column}", *(f"{row}\t{values(i)}" for i, row in enumerate(rows[1:]))]
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")


def two(root: Path) -> list[Path]:
    return [image(root), image(root, 3, "T1w")]


def persons(root: Path) -> None:
    table(root, "person_id", lambda i: f"P{i % (PATIENTS - 1)}")
    table(root, "split", lambda i: "test" if i == PATIENTS - 1 else "train")


def split_of(root: Path) -> None:
    copy_patient(root, lambda data: data)
    table(root, "split", lambda i: "test" if i == PATIENTS else "train")


def text_field(key: str, text: str) -> Callable[[Any], object]:
    def change(new: Any) -> None:
        new.header[key] = text.encode()

    return change


def codes(sform: int, qform: int, turn: Array | None = None) -> Callable[[Any], object]:
    def change(new: Any) -> None:
        new.set_sform(new.affine, code=sform)
        new.set_qform(new.affine if turn is None else turn @ new.affine, code=qform)

    return change


def extension(new: Any) -> None:
    new.header.extensions.append(_NIB.nifti1.Nifti1Extension("comment", b"PatientName: Doe^Jane, born 19540312"))


def gzip_name(root: Path) -> None:
    path = image(root)
    raw = gzip.decompress(path.read_bytes())
    with path.open("wb") as file, gzip.GzipFile("DOE_JANE_T2_FLAIR.nii", "wb", fileobj=file) as packed:
        packed.write(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))


def link_outside(root: Path) -> None:
    path = image(root)
    target = root.parent / "elsewhere.nii.gz"
    shutil.move(path, target)
    path.symlink_to(target)


def side_car(root: Path) -> None:
    values = {"EchoTime": 0.09, "PatientName": "Doe^Jane", "InstitutionName": "General Hospital"}
    image(root).with_suffix("").with_suffix(".json").write_text(json.dumps(values))


def doubled(data: Array) -> Array:
    data = data.copy()
    middle = data.shape[2] // 2
    data[:, :, middle] = data[:, :, middle - 1]
    return data


def units(code: int) -> Callable[[Any], object]:
    def change(new: Any) -> None:
        new.header["xyzt_units"] = code

    return change


def overlapping(root: Path) -> None:
    other = Path(str(mask(root)).replace("label-lesion", "label-oedema"))
    shutil.copy(mask(root), other)


SCALE = np.diag([1e-3, 1e-3, 1e-3, 1])
SHIFT = np.eye(4) + np.array([[0, 0, 0, 5.0], *[[0] * 4] * 3])
MIRROR = np.diag([-1.0, 1, 1, 1])
TURN = np.array([[0, -1.0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

FAULTS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    # name: how it is planted, the findings of which one must come
    "sideways image": (lambda r: both(r, lambda d: np.rot90(d, axes=(0, 1)).copy()), {"orientation-odd"}),
    "image lying on its back": (lambda r: both(r, lambda d: np.rot90(d, axes=(1, 2)).copy()), {"orientation-odd"}),
    "upside down": (lambda r: both(r, lambda d: d[:, :, ::-1]), {"orientation-odd"}),
    "front to back": (lambda r: both(r, lambda d: d[:, ::-1]), {"orientation-odd"}),
    "left-right flip of the image, not of mask and header": (
        lambda r: rewrite(two(r), lambda d: d[::-1]), {"mask-mirrored"}),
    "left-right flip of image and mask without header": (lambda r: both(r, lambda d: d[::-1]), {"orientation-odd"}),
    "left-right flip of the header alone": (
        lambda r: rewrite([*two(r), mask(r)], affine=lambda a: MIRROR @ a),
        {"axes-odd", "orientation-odd"}),
    "left-right flip of one header": (lambda r: rewrite(mask(r), affine=lambda a: MIRROR @ a), {"grid-differs"}),
    "masks of two patients exchanged": (swap_masks, {"mask-swapped"}),
    "mask files of two patients exchanged": (lambda r: swap(mask(r, 3), mask(r, 5)), {"grid-differs", "mask-swapped"}),
    "mask one voxel short": (lambda r: rewrite(mask(r), lambda d: d[:-1]), {"grid-differs"}),
    "mask resampled off by one": (lambda r: rewrite(mask(r), lambda d: np.roll(d, 1, 0)), {"mask-shifted"}),
    "mask in another place": (lambda r: rewrite(mask(r), affine=lambda a: SHIFT @ a), {"grid-differs"}),
    "duplicate patient under a new name": (lambda r: copy_patient(r, lambda d: d), {"duplicate-patient"}),
    "duplicate, stored in another order and type": (
        lambda r: copy_patient(r, lambda d: d.astype(np.float64)), {"duplicate-patient"}),
    "duplicate, rescaled and noised": (
        lambda r: copy_patient(r, lambda d: d * 1.7 + np.random.default_rng(1).normal(0, 0.01 * d.max(), d.shape)),
        {"duplicate-patient"}),
    "duplicate, resampled": (lambda r: copy_patient(r, lambda d: np.repeat(d, 2, 2)), {"duplicate-patient"}),
    "leaking split": (split_of, {"duplicate-split"}),
    "one person in two rows on two sides": (
        persons,
        {"duplicate-split"}),
    "one mask for two patients": (lambda r: shutil.copy(mask(r, 3), mask(r, 5)), {"duplicate-mask"}),
    "millimetres as micrometres": (lambda r: rewrite(image(r), header=units(3)), {"units-wrong"}),
    "micrometres as millimetres": (lambda r: rewrite(image(r), affine=lambda a: a @ np.diag([1e3, 1e3, 1e3, 1])), {"units-wrong"}),
    "metres as millimetres": (lambda r: rewrite(image(r), affine=lambda a: SCALE @ a), {"units-wrong"}),
    "voxel size lost": (
        lambda r: rewrite([*two(r), mask(r)], affine=lambda a: np.diag([*np.sign(np.diag(a)[:3]), 1.0])),
        {"spacing-odd"}),
    "4D file": (lambda r: rewrite(image(r), lambda d: np.stack([d] * 3, -1)), {"file-not-3d"}),
    "truncated gzip": (lambda r: cut(image(r)), {"file-broken"}),
    "a flipped byte": (lambda r: flip_byte(image(r)), {"file-broken"}),
    "no NIfTI file": (lambda r: image(r).write_bytes(b"GIF89a" * 100), {"file-broken"}),
    "integer overflow": (lambda r: rewrite(image(r), overflow, dtype=np.int16), {"voxels-overflow"}),
    "NaN slice": (lambda r: rewrite(image(r), put(np.nan, (slice(None), slice(None), 9))), {"voxels-not-finite"}),
    "infinite voxel": (lambda r: rewrite(image(r), put(np.inf, (5, 5, 5))), {"voxels-not-finite"}),
    "constant image": (lambda r: rewrite(image(r), np.ones_like), {"voxels-constant"}),
    "clipped greys": (lambda r: rewrite(image(r), lambda d: np.minimum(d, np.percentile(d, 90))), {"voxels-clipped"}),
    "few grey values": (lambda r: rewrite(image(r), lambda d: (d // (d.max() / 6)).astype(np.uint8), dtype=np.uint8), {"voxels-few-greys"}),
    "empty slices": (lambda r: rewrite(image(r), put(0, (slice(None), slice(None), slice(9, 12)))), {"slices-empty"}),
    "repeated slice": (lambda r: rewrite(image(r), doubled), {"slices-repeated"}),
    "noise": (lambda r: rewrite(image(r), noisy), {"quality-outlier"}),
    "motion ghosts": (lambda r: rewrite(image(r), blurred), {"quality-outlier"}),
    "identity in the header": (lambda r: rewrite(image(r), header=text_field("descrip", "Doe^Jane 1954-03-12")), {"identity-header"}),
    "identity in a header extension": (lambda r: rewrite(image(r), header=extension), {"identity-header"}),
    "identity in the gzip name": (gzip_name, {"identity-header"}),
    "identity in a side-car": (side_car, {"identity-text"}),
    "dates of birth in the table": (lambda r: table(r, "birth_date", lambda i: f"19{50 + i}-01-02"), {"identity-text"}),
    "a date as patient id": (lambda r: copy_patient(r, lambda d: np.sqrt(np.abs(d)), name="sub-19540312"), {"identity-name"}),
    "empty mask": (lambda r: rewrite(mask(r), np.zeros_like), {"mask-empty"}),
    "inverted mask": (lambda r: rewrite(mask(r), lambda d: 1 - d), {"mask-full"}),
    "mask of 255": (lambda r: rewrite(mask(r), lambda d: d * 255), {"mask-values"}),
    "interpolated mask": (lambda r: rewrite(mask(r), lambda d: (d + np.roll(d, 1, 0)) / 2, dtype=np.float32), {"mask-not-whole"}),
    "missing mask": (lambda r: mask(r).unlink(), {"mask-missing"}),
    "overlapping masks": (overlapping, {"mask-overlap"}),
    "mask outside the head": (lambda r: rewrite(mask(r), lambda d: np.roll(d, d.shape[0] // 2, 0)), {"mask-outside", "mask-unlike-image"}),
    "missing modality": (lambda r: image(r, 3, "T1w").unlink(), {"modality-missing"}),
    "modalities exchanged": (lambda r: swap(image(r), image(r, 3, "T1w")), {"modality-swapped"}),
    "one modality saved twice": (lambda r: shutil.copy(image(r), image(r, 3, "T1w")), {"modality-copied"}),
    "no orientation": (lambda r: rewrite(image(r), header=codes(0, 0)), {"header-orientation-unstated"}),
    "sform and qform differ": (lambda r: rewrite(image(r), header=codes(1, 1, TURN)), {"header-forms-differ"}),
    "flat affine": (flat, {"header-affine"}),
    "origin far away": (lambda r: rewrite(image(r), affine=lambda a: a + np.array([[0, 0, 0, 1e5]] + [[0] * 4] * 3)), {"position-far"}),
    "another patient's file in the folder": (
        lambda r: shutil.copy(image(r, 5), image(r).with_name("sub-005_T2w.nii.gz")), {"bids-place"}),
    "a name that BIDS does not know": (lambda r: image(r).rename(image(r).with_name("flair axial.nii.gz")), {"bids-name"}),
    "a row without a folder": (lambda r: shutil.rmtree(r / "sub-003"), {"table-row"}),
    "a link that leads out": (link_outside, {"link-outside"}),
}  # fmt: skip
