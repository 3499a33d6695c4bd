# SPDX-License-Identifier: Apache-2.0
"""Phantom patients, sites and federations as BIDS folders, the form in which a hospital holds its data.

A patient depends on the seed, the site's name and the patient's number, and on nothing else: a site can be
written alone or beside others, with one worker or many, and holds the same bytes.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...privacy.errors import BadInput, EnvironmentProblem, StateError
from .anatomy import Grid, draw_anatomy
from .scan import draw_lesions, scan
from .style import MODALITIES, SiteStyle, generator_of, style_of

__all__ = ["Progress", "write_federation", "write_site"]

Progress = Callable[[str, int, int], None]
"""Called after each patient with the site's name, patients done, patients in all."""

BIDS_VERSION: Final = "1.10.0"
SITE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def write_site(
    folder: Path,
    *,
    name: str,
    patients: int,
    seed: int,
    style: SiteStyle | None = None,
    modalities: Sequence[str] = ("FLAIR", "T1w"),
    progress: Progress | None = None,
) -> None:
    """Write one hospital as a BIDS data set with masks in ``derivatives/manual``.

    Args:
        folder: the data set; must be absent or empty.
        name: the site's name; with the seed it decides the style and every patient.
        patients: how many, 1 to 999.
        seed: seed of the federation.
        style: the scanner; by default the one of :func:`style_of`.
        modalities: what is scanned; the first is never missing.
        progress: told of each patient.

    Raises:
        BadInput: a name, number or modality that cannot be.
        StateError: the folder holds something already.
    """
    _check(name, patients, modalities)
    style = style or style_of(name, seed)
    with _writing(folder):
        _write_tables(folder, name, patients, seed, style, modalities)
        for number in range(1, patients + 1):
            _write_patient(folder, name, number, seed, style, modalities)
            if progress:
                progress(name, number, patients)


def write_federation(
    out: Path,
    *,
    sites: Mapping[str, int],
    seed: int,
    workers: int = 1,
    modalities: Sequence[str] = ("FLAIR", "T1w"),
    resolution_mm: float = 3.0,
    lesion_kind: str = "blob",
    progress: Progress | None = None,
) -> None:
    """Write one folder per site below ``out``.

    Args:
        out: parent of the sites' folders, each of which must be absent or empty.
        sites: number of patients by site name.
        seed: seed of the federation.
        workers: processes; the bytes do not depend on it.
        modalities: what is scanned.
        resolution_mm: voxel size that sites vary around, see :func:`style_of`.
        lesion_kind: as :class:`SiteStyle` has it.
        progress: told of each patient.

    Raises:
        BadInput: a name, number or modality that cannot be.
        StateError: a site's folder holds something already.
    """
    for name, patients in sites.items():
        _check(name, patients, modalities)
    jobs = []
    for name, patients in sites.items():
        style = replace(style_of(name, seed, resolution_mm=resolution_mm), lesion_kind=lesion_kind)
        with _writing(out / name):
            _write_tables(out / name, name, patients, seed, style, modalities)
        jobs += [(out / name, name, number, seed, style, tuple(modalities)) for number in range(1, patients + 1)]
    done = dict.fromkeys(sites, 0)
    for name in _run(jobs, workers):
        done[name] += 1
        if progress:
            progress(name, done[name], sites[name])


Job = tuple[Path, str, int, int, SiteStyle, tuple[str, ...]]


def _run(jobs: Sequence[Job], workers: int) -> Iterator[str]:
    """Write patients here or in worker processes; yields the site's name of each that is done."""
    if workers <= 1:
        for job in jobs:
            yield _write_job(job)
        return
    # Spawned, not forked: a parent with threads (a progress bar) may not be copied safely.
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_write_job, job) for job in jobs]):
            yield future.result()
    finally:
        # After an error or Ctrl-C: no patient more than those that are being written.
        pool.shutdown(cancel_futures=True)


def _write_job(job: Job) -> str:
    """One patient as a unit of work; returns the site's name."""
    folder, name, number, seed, style, modalities = job
    with _disk(folder):
        _write_patient(folder, name, number, seed, style, modalities)
    return name


def _age_and_sex(name: str, number: int, seed: int, style: SiteStyle) -> tuple[int, str]:
    """A patient's age in years and sex; drawn apart from the scans, for the table needs only these."""
    generator = generator_of("person", seed, name, number)
    return int(np.clip(generator.normal(style.mean_age, 13), 19, 89)), str(generator.choice(["F", "M"]))


def _write_patient(
    folder: Path, name: str, number: int, seed: int, style: SiteStyle, modalities: Sequence[str]
) -> None:
    """Scans and mask of one patient."""
    subject = f"sub-{number:03d}"
    generator = generator_of("patient", seed, name, number)
    age, _ = _age_and_sex(name, number, seed, style)
    grid = Grid.covering_head(style.voxel_mm)
    anatomy = draw_anatomy(generator, grid, age=age)
    lesions = draw_lesions(generator, anatomy, style)
    absent = generator.random() < style.missing
    affine = np.diag([*style.voxel_mm, 1.0])
    corner = (np.array(grid.shape) - 1) * np.array(style.voxel_mm) / 2
    affine[:3, 3] = np.round(generator.normal(0, 6, 3) - corner, 2)

    raw = folder / subject / "anat"
    for position, modality in enumerate(modalities):
        # A generator per scan: which modalities are asked for changes no other.
        values = scan(generator_of("scan", seed, name, number, modality), anatomy, lesions, style, modality)
        if position == 0 or not absent:
            _save(raw / f"{subject}_{modality}.nii.gz", values, affine, style.orientation)
    truth = (lesions > 0.5).astype(np.uint8)
    manual = folder / "derivatives" / "manual" / subject / "anat"
    _save(manual / f"{subject}_label-lesion_mask.nii.gz", truth, affine, style.orientation)


def _save(path: Path, values: NDArray[Any], affine: NDArray[np.float64], orientation: str) -> None:
    """Store an array of RAS axes as NIfTI in another orientation; the same input gives the same bytes."""
    import nibabel

    nib: Any = nibabel  # typed in part only
    codes = nib.orientations
    turn = codes.ornt_transform(codes.axcodes2ornt("RAS"), codes.axcodes2ornt(orientation))
    stored = np.ascontiguousarray(codes.apply_orientation(values, turn))
    image = nib.Nifti1Image(stored, affine @ codes.inv_ornt_aff(turn, values.shape))
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime 0: gzip would otherwise write the time of day into the file.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_tables(
    folder: Path, name: str, patients: int, seed: int, style: SiteStyle, modalities: Sequence[str]
) -> None:
    """The texts of a BIDS data set: descriptions, participants and a read-me."""
    made_by = [{"Name": "FedNeuro phantoms", "Version": _version(), "Description": f"site {name}, seed {seed}"}]
    description = {
        "Name": f"Phantom hospital {name}",
        "BIDSVersion": BIDS_VERSION,
        "License": "CC0",
        "GeneratedBy": made_by,
    }
    _json(folder / "dataset_description.json", {**description, "DatasetType": "raw"})
    manual = folder / "derivatives" / "manual"
    masks = {**description, "Name": f"Lesion masks of phantom hospital {name}", "DatasetType": "derivative"}
    _json(manual / "dataset_description.json", masks)
    rows = ["participant_id\tage\tsex\tscanner"]
    for number in range(1, patients + 1):
        age, sex = _age_and_sex(name, number, seed, style)
        rows.append(f"sub-{number:03d}\t{age}\t{sex}\t{style.scanner}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    _json(
        folder / "participants.json",
        {
            "age": {"Description": "age at the scan; ventricles widen with it", "Units": "years"},
            "sex": {"Description": "sex", "Levels": {"F": "female", "M": "male"}},
            "scanner": {"Description": "invented make and model"},
        },
    )
    (folder / "README").write_text(
        f"Phantom hospital {name}: {patients} invented patients, {', '.join(modalities)}. No person was scanned: "
        "each head is a random deformation of the ICBM152 average tissue maps, with invented lesions whose "
        "masks are exact. Made by FedNeuro for demonstrations and tests; of no clinical meaning.\n",
        encoding="utf-8",
    )


def _check(name: str, patients: int, modalities: Sequence[str]) -> None:
    """Refuse what cannot be written, before anything is."""
    if not SITE_NAME.fullmatch(name):
        raise BadInput(
            f'phantoms: site name "{name}" must be 1 to 64 letters, digits, "_", "." or "-", not punctuation first'
        )
    if not 1 <= patients <= 999:
        raise BadInput(f"phantoms: {patients} patients at site {name}; give 1 to 999")
    unknown = [modality for modality in modalities if modality not in MODALITIES]
    if unknown or not modalities or len(set(modalities)) != len(modalities):
        raise BadInput(f"phantoms: modalities {list(modalities)}; name each once, out of {', '.join(MODALITIES)}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a new folder for a site, and turn failures of the disk into one clear line."""
    with _disk(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StateError(f"phantoms: {folder} exists and is not an empty folder; remove it or choose another place")
        (folder / "derivatives" / "manual").mkdir(parents=True)
        yield


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"phantoms: cannot write below {folder}: {error.strerror or error}; free or choose another disk"
        ) from error


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _version() -> str:
    try:
        return version("fedneuro")
    except PackageNotFoundError:
        return "0"
