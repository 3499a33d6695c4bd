# SPDX-License-Identifier: Apache-2.0
"""Reads one NIfTI file whole: bytes, check sums, header and voxels, turned to RAS+.

The file is unpacked in one go, so gzip's own check sum is tested (nibabel alone stops reading before it) and
a truncated file is told apart from a wrong header. Foreign errors become one :class:`DataError` line.

Reference: NIfTI-1, https://nifti.nimh.nih.gov; nibabel's ``as_closest_canonical``.
"""

import gzip
import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from ...privacy.errors import DataError
from .words import said

__all__ = ["Stored", "Volume", "digest_of", "read_stored", "read_volume"]

_NIB: Any = nibabel  # its own annotations are partial
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what is wrong is told in one line, by us
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes of metre, millimetre and micrometre
MAX_BYTES = 1 << 30
"""Unpacked size of a file that is read; a small file that unfolds to more is a bomb, or no scan."""
MAX_VOXELS = 1 << 27
"""512×512×512: with the bytes above, reading takes less than 2 GiB of memory."""
_GZIP_MAGIC = b"\x1f\x8b"
_NIFTI2_HEADER_BYTES = (540).to_bytes(4, "little"), (540).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Volume:
    """One image in RAS+ order: the axes run to the patient's right, front and top, as near as the affine allows."""

    name: str
    data: NDArray[np.float32]  # (X, Y, Z)
    affine: NDArray[np.float64]  # (4, 4), voxel to world
    spacing: tuple[float, float, float] | None  # mm; None: the header gives no unit
    oriented: bool  # the header says how the image lies (sform or qform)


@dataclass(frozen=True, slots=True)
class Stored:
    """One image as its file holds it: grey value = slope × voxel + intercept."""

    voxels: NDArray[Any]  # (X, Y, Z), in the file's order and type
    affine: NDArray[np.float64]  # (4, 4), voxel to world
    slope: float
    intercept: float


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_volume(path: Path) -> Volume:
    """Read a 3D image (or 2D: a volume of one slice) and turn it to RAS+, scale factors applied.

    Raises:
        DataError: the file is corrupt or truncated, or holds no plain 3D image.
    """
    try:
        image = _opened(path)
        unit = int(image.header["xyzt_units"]) & 0b111  # the other bits are the unit of time
        shape = tuple(int(n) for n in image.shape)
        # Trailing axes of length 1 carry nothing; a 2D image becomes one slice.
        with np.errstate(all="ignore"):  # a scale factor beyond float32 gives infinity, which the checks tell
            data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape((*shape, 1)[:3])
        oriented = bool(image.header["sform_code"] or image.header["qform_code"])
        image = _NIB.as_closest_canonical(_NIB.Nifti1Image(data, image.affine))
        data = np.ascontiguousarray(image.dataobj)
    except DataError:
        raise
    except Exception as error:  # a broken header may raise anything inside nibabel
        raise _unreadable(path, error) from error
    return Volume(path.name, data, np.asarray(image.affine), _spacing(image.affine, unit), oriented)


def read_stored(path: Path) -> Stored:
    """Voxels of a 3D image as the file holds them.

    Raises:
        DataError: as :func:`read_volume`.
    """
    try:
        image = _opened(path)
        voxels = np.asarray(image.dataobj.get_unscaled())
        scale = float(image.dataobj.slope), float(image.dataobj.inter)
        return Stored(voxels, np.asarray(image.affine, np.float64), *scale)
    except DataError:
        raise
    except Exception as error:  # a broken header may raise anything inside nibabel
        raise _unreadable(path, error) from error


def _opened(path: Path) -> Any:
    """The image, unpacked, its header checked; its voxels are all there and not yet read."""
    raw = _unpacked(path)
    kind = _NIB.Nifti2Image if raw[:4] in _NIFTI2_HEADER_BYTES else _NIB.Nifti1Image
    image = kind.from_bytes(raw)
    shape, dtype = tuple(int(n) for n in image.shape), image.get_data_dtype()
    _check_layout(path, shape, dtype)
    _check_affine(path, np.asarray(image.affine, dtype=np.float64))
    need = int(image.dataobj.offset) + dtype.itemsize * int(np.prod(shape, dtype=object))
    if need > len(raw):
        raise EOFError(f"header promises {need} bytes, file holds {len(raw)}")
    return image


def _unpacked(path: Path) -> bytes:
    """The file's bytes, unpacked; gzip's check sum is tested, and a bomb is not let unfold."""
    if path.stat().st_size > MAX_BYTES:
        raise _too_large(path, f"{path.stat().st_size} bytes")
    raw = path.read_bytes()
    if raw.startswith(_GZIP_MAGIC):
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _too_large(path, f"more than {MAX_BYTES} bytes when unpacked")
    return raw


def _too_large(path: Path, found: str) -> DataError:
    return DataError(
        f"{path.name}: {found}; expected at most {MAX_BYTES >> 20} MiB and {MAX_VOXELS} voxels; crop the image, or "
        "store it with fewer bits"
    )


def _check_layout(path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    extra = [n for n in shape[3:] if n != 1]
    if extra or len(shape) < 2 or 0 in shape:
        raise DataError(
            f"{path.name}: {len(shape)}D image of shape {_by(shape)}; expected one 3D volume (or a 2D slice); "
            "split it into one file per volume"
        )
    if np.prod(shape, dtype=object) > MAX_VOXELS:
        raise _too_large(path, f"{_by(shape)} voxels")
    if dtype.kind not in "iufb":
        raise DataError(
            f"{path.name}: voxels of type {dtype}; expected one real number per voxel; convert the image to grey values"
        )


def _check_affine(path: Path, affine: NDArray[np.float64]) -> None:
    if not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3):
        raise DataError(
            f"{path.name}: the header's affine maps voxels onto a plane or to no place; expected three "
            "independent axes; correct sform or qform, or export the image again"
        )


def _spacing(affine: NDArray[np.float64], unit: int) -> tuple[float, float, float] | None:
    sizes = np.sqrt((np.asarray(affine)[:3, :3] ** 2).sum(axis=0)) * _MM_PER_UNIT.get(unit, np.nan)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        return None
    x, y, z = (float(s) for s in sizes)
    return x, y, z


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _unreadable(path: Path, error: BaseException) -> DataError:
    detail = said(error, 160)
    return DataError(f"{path.name}: cannot be read ({detail}); expected a NIfTI file; copy or export it again")
