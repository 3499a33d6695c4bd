# SPDX-License-Identifier: Apache-2.0
"""What one NIfTI header says about place, unit and identity, judged without reading the voxels."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ..words import said
from .catalogue import Finding
from .files import File
from .identity import suspicious

__all__ = ["HeaderFacts", "judge_header"]

_NIB: Any = nibabel
SMALLEST_MM, LARGEST_MM = 0.05, 20.0
FARTHEST_MM = 2000.0
_MM = {0: None, 1: 1000.0, 2: 1.0, 3: 0.001}
_FAULTS = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    WrapStructError,
    np.linalg.LinAlgError,
)
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What other checks need."""

    shape: tuple[int, ...]
    sizes: tuple[float, float, float]  # as stored, in whatever unit
    axes: str  # such as "LPS"
    dtype: np.dtype[Any]
    scaled: bool


def judge_header(file: File) -> tuple[HeaderFacts | None, list[Finding]]:
    """Facts of a header (None: the file cannot be used) and findings."""
    try:
        return _judge(file)
    except _FAULTS as error:
        detail = said(error)
        return None, [Finding("file-broken", (file.patient,), f"{file.path.name}: {detail}")]


def _judge(file: File) -> tuple[HeaderFacts | None, list[Finding]]:
    patient, name = (file.patient,), file.path.name
    with file.path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    findings = [Finding("identity-header", patient, f"{name}: {text}") for text in _gzip_name(head, file.path)]
    # The header and its extensions only, however large the file claims to be.
    raw = zlib.decompressobj(31).decompress(head, _HEAD_BYTES) if head[:2] == b"\x1f\x8b" else head
    two = raw[:4] in ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
    header = (_NIB.Nifti2Header if two else _NIB.Nifti1Header)(raw[: 540 if two else 348])
    shape = tuple(int(n) for n in header.get_data_shape())
    affine = np.asarray(header.get_best_affine(), np.float64)
    dtype = header.get_data_dtype()
    findings += [Finding("identity-header", patient, f"{name}: {text}") for text in _texts(header, raw)]
    if any(n != 1 for n in shape[3:]) or len(shape) < 2 or 0 in shape or dtype.kind not in "iufb":
        words = f"shape {'×'.join(map(str, shape))}, voxels of type {dtype}"
        return None, [*findings, Finding("file-not-3d", patient, f"{name}: {words}")]
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        return None, [*findings, Finding("header-affine", patient, f"{name}: no three independent axes")]
    findings += _places(file, header, affine)
    sizes = tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    axes = "".join(_NIB.aff2axcodes(affine))
    scaled = bool(np.nan_to_num(float(header["scl_slope"])) not in (0.0, 1.0))
    return HeaderFacts(shape, (sizes[0], sizes[1], sizes[2]), axes, dtype, scaled), findings


def _places(file: File, header: Any, affine: np.ndarray[Any, np.dtype[np.float64]]) -> Iterator[Finding]:
    patient, name = (file.patient,), file.path.name
    factor = _MM.get(int(header["xyzt_units"]) & 7)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if factor is None:
        yield Finding("units-missing", patient, name)
    elif not all(SMALLEST_MM <= size * factor <= LARGEST_MM for size in sizes):
        yield Finding("units-wrong", patient, f"{name}: {_by(sizes * factor)} mm")
    if not (int(header["sform_code"]) or int(header["qform_code"])):
        yield Finding("header-orientation-unstated", patient, name)
    elif int(header["sform_code"]) and int(header["qform_code"]):
        other = np.asarray(header.get_qform(), np.float64)
        ends = np.array([*header.get_data_shape(), 1, 1, 1][:3]) - 1.0
        corners = np.array(np.meshgrid(*([0, n] for n in ends), [1], indexing="ij")).reshape(4, -1)
        if np.abs((other - affine) @ corners).max() > 0.5 * sizes.min():
            yield Finding("header-forms-differ", patient, name)
    middle = affine @ [*(np.array([*header.get_data_shape(), 1, 1][:3]) / 2), 1]
    if np.linalg.norm(middle[:3]) * (factor or 1.0) > FARTHEST_MM:
        yield Finding("position-far", patient, f"{name}: centre {np.linalg.norm(middle[:3]):.0f} from the origin")


def _texts(header: Any, raw: bytes) -> Iterator[str]:
    """Header fields and extensions that say who or when."""
    for key in ("descrip", "aux_file", "db_name", "intent_name", "data_type"):
        if key in header.structarr.dtype.names:
            text = bytes(header[key].tobytes()).split(b"\0")[0].decode("latin-1").strip()
            if text and (key == "db_name" or suspicious(text)):
                yield f"{key} holds {text[:40]!r}"
    start = 352 if len(header.structarr.tobytes()) == 348 else 544
    end = int(header["vox_offset"])
    if end > start and len(raw) > start and raw[start - 4 : start - 3] == b"\1":
        text = raw[start:end].decode("latin-1")
        if suspicious(text) or b"DICM" in raw[start:end]:
            yield "a header extension holds patient data"


def _gzip_name(head: bytes, path: Path) -> Iterator[str]:
    """The name of the original file that gzip keeps, where it is not the file's own name."""
    if head[:2] != b"\x1f\x8b" or not head[3] & 8 or head[3] & 4:
        return
    name = head[10:].split(b"\0", 1)[0].decode("latin-1")
    plain = path.name.removesuffix(".gz")
    # Python's tempfile and most tools store the bare name; only another one can tell anything.
    if Path(name).name != plain and re.search(r"[A-Za-z]{3}", name) and not Path(name).name.startswith(("tmp", "sub-")):
        yield f"the gzip file remembers its old name {name[:60]!r}"


def _by(sizes: Any) -> str:
    return "×".join(f"{size:.3g}" for size in sizes)
