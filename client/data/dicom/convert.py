# SPDX-License-Identifier: Apache-2.0
"""Turns one series into NIfTI volumes with dcm2niix, and holds the result against the headers' geometry.

Why dcm2niix (its wheel on PyPI), compared on the fourteen series of six vendors in ``shared/data/dicom``:

==============================  ==========  ============  ===========
series                          dcm2niix    dicom2nifti   SimpleITK
==============================  ==========  ============  ===========
classic MR, CT, DTI, PGBM       right       right         right (time
                                                          points mixed)
Siemens mosaic                  right       right         left tiled
enhanced, Siemens XA            right       crashes       right
enhanced, Philips B0 and map    right, two  one 4D mix    one mix
JPEG lossless                   right       needs GDCM    left tiled
gantry tilt, uneven slices      two files   refuses       wrong (even)
==============================  ==========  ============  ===========

SimpleITK stacks mosaics, time points and uneven slices without a word, and dicom2nifti reads what pydicom can decode
only; both stay useful as judges: the tests hold voxels and places of every imported series against SimpleITK.
dcm2niix is C++ that reads foreign bytes, so it runs as a process of its own, in an empty folder, with limits on time
and memory; nothing that it names or writes is taken over but voxels and diffusion tables. Geometry is taken from the
headers (:mod:`.geometry`), and a series where the converter differs by more than 1e-3 mm is refused. Gantry tilt and
uneven slices are refused before: what dcm2niix resamples there are no longer the scanner's voxels. Where staff ask for
it, :mod:`.straighten` takes the place of the converter for a tilted CT.

Reference: Li et al., The first step for neuroimaging data analysis: DICOM to NIfTI conversion, J Neurosci Methods
2016;264:47-56.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel
import numpy as np
from numpy.typing import NDArray

from ....privacy.errors import DataError, EnvironmentProblem
from .geometry import align
from .series import Series, reference_stack
from .straighten import straightened

__all__ = ["Converted", "convert", "write_clean"]

TIMEOUT_S: Final = 600
MEMORY_BYTES: Final = 4 << 30
_OUTPUT: Final = re.compile(r"out(?P<parts>(?:_[A-Za-z0-9]+)*)\.nii")
_PARTS: Final = {"ph": "part-phase", "real": "part-real", "imaginary": "part-imag"}

_NIB: Any = nibabel


@dataclass(frozen=True, slots=True)
class Converted:
    """One volume (or time series) of a series."""

    voxels: NDArray[Any]  # as stored, (X, Y, Z) or (X, Y, Z, T)
    slope: float  # grey value = slope × voxel + intercept
    intercept: float
    affine: NDArray[np.float64]  # (4, 4), RAS, mm
    entities: str  # "echo-1", "part-phase"; empty for the only one
    map_hz: bool  # a field map in Hz
    error_mm: float  # how far the converter was from the headers
    bval: str = ""
    bvec: str = ""
    tilt: float = 0.0  # degrees of gantry tilt that were straightened


def convert(series: Series, folder: Path, *, straighten: bool = False) -> list[Converted]:
    """All volumes of an image series.

    Args:
        series: of kind ``image``.
        folder: empty folder for the converter's use, on a disk with room for the series.
        straighten: resample a stack that gantry tilt has sheared.

    Raises:
        DataError: the series cannot be a NIfTI volume, or the converter fails on it or differs from the headers.
        EnvironmentProblem: dcm2niix is not installed, or the disk is full.
    """
    stack, (columns, rows) = reference_stack(series, tilted=straighten)
    if stack.tilt:
        voxels, affine = straightened(series, stack)
        return [Converted(voxels, 1.0, 0.0, affine, "", False, 0.0, tilt=stack.tilt)]
    source, out = folder / "in", folder / "out"
    source.mkdir()
    out.mkdir()
    for number, instance in enumerate(series.instances):
        (source / f"{number:06d}.dcm").symlink_to(instance.path.resolve())
    _run(source, out)
    shape = (columns, rows, stack.slices)
    results = [_result(path, stack.affine, shape) for path in sorted(out.glob("*.nii"))]
    if not results:
        raise DataError("dcm2niix wrote no volume; open the series in a viewer, and export it again")
    volumes = sum(r.voxels.shape[3] if r.voxels.ndim == 4 else 1 for r in results)
    if volumes != stack.volumes:
        raise DataError(
            f"{stack.volumes} volumes in the headers, {volumes} after conversion; export the series again from the PACS"
        )
    return results


def _run(source: Path, out: Path) -> None:
    try:
        from dcm2niix import bin as program
    except ImportError as error:
        raise EnvironmentProblem("dcm2niix is not installed; run: pip install dcm2niix") from error
    # -b n: no side-car, ours is written from a list of permitted tags; -p n: the scaling that DICOM states.
    command = [program, "-b", "n", "-z", "n", "-p", "n", "-f", "out", "-w", "0", "-o", str(out), str(source)]
    try:
        done = subprocess.run(  # noqa: S603 - the program of the installed package, our own arguments
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT_S,
            preexec_fn=_limit if sys.platform == "linux" else None,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"conversion took over {TIMEOUT_S} s and was stopped; export the series again") from error
    except OSError as error:
        raise EnvironmentProblem(f"dcm2niix cannot be started ({error.strerror}); install the package again") from error
    if done.returncode < 0:
        raise DataError(f"the converter crashed (signal {-done.returncode}) on the series; export it again")
    if done.returncode and not any(out.glob("*.nii")):
        said = [line for line in done.stdout.splitlines() if "rror" in line or "nable" in line or "upport" in line]
        hint = re.sub(r"(/[^\s/]+)+", "…", said[0])[:150] if said else f"code {done.returncode}"
        raise DataError(f"dcm2niix cannot convert the series ({hint.strip()}); export it again, uncompressed")


def _limit() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # where the machine permits less, it stays
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _result(path: Path, reference: NDArray[np.float64], shape: tuple[int, int, int]) -> Converted:
    match = _OUTPUT.fullmatch(path.name)
    parts = (match["parts"] if match else "").strip("_").split("_")
    try:
        image = _NIB.load(path)
        voxels = np.asarray(image.dataobj.get_unscaled())
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
        affine, apart = align(np.asarray(image.affine, np.float64), reference, shape)
    except (OSError, ValueError, np.linalg.LinAlgError) as error:
        raise DataError(f"dcm2niix wrote a volume that cannot be read ({error}); export the series again") from error
    if sorted(voxels.shape[:3]) != sorted(shape):
        raise DataError(
            f"the headers promise {'×'.join(map(str, shape))} voxels, the converter gives "
            f"{'×'.join(map(str, voxels.shape[:3]))}; export the series again"
        )
    echo = next((f"echo-{part[1:]}" for part in parts if re.fullmatch(r"e\d+", part)), "")
    entities = "_".join(filter(None, (echo, next((_PARTS[part] for part in parts if part in _PARTS), ""))))
    tables = [path.with_suffix(end) for end in (".bval", ".bvec")]
    bval, bvec = (table.read_text() if table.exists() else "" for table in tables)
    return Converted(voxels, slope, intercept, affine, entities, "fieldmaphz" in parts, apart, bval, bvec)


def write_clean(path: Path, volume: Converted) -> None:
    """Write a NIfTI file whose header holds geometry and scaling and nothing else; the same bytes every time.

    Raises:
        OSError: the disk does not take it.
    """
    image = _NIB.Nifti1Image(volume.voxels, volume.affine)
    image.header.set_slope_inter(volume.slope, volume.intercept)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    save_nifti(path, image)


def save_nifti(path: Path, image: Any) -> None:
    """Write an image packed, without name or time in the packing."""
    import gzip

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        packed.write(image.to_bytes())
