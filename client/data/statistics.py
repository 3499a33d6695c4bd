# SPDX-License-Identifier: Apache-2.0
"""``data stats``: what a data set holds, in numbers: counts, label frequencies, volumes, grey values, geometry.

:func:`measure` reads every file once; its numbers are of single patients and stay here. :func:`summary` shows
percentiles over patients to the hospital's own staff. :func:`release` makes the little that may be handed over
(:mod:`fedneuro.privacy.data_statistics`).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...privacy.data_statistics import LEAST, Group, LabelGroup, Released, quantiles, rounded_count
from ...privacy.errors import BadInput, DataError, Refused
from ...privacy.study import Study
from .bids import find_patients
from .foreground import head_of
from .nifti import Volume, read_volume
from .quality.files import find_files

__all__ = ["Measured", "measure", "release", "summary"]

GREYS: Final = (5.0, 25.0, 50.0, 75.0, 95.0)
"""Percentiles of each image's grey values, in the head."""
SHOWN: Final = ("p5", "p25", "p50", "p75", "p95")
MOST_LABELS: Final = 64
Progress = Callable[[int, int], None]


@dataclass
class Measured:
    """One value per patient, of a patient's first image or mask of each kind. Stays at the hospital."""

    patients: int
    sessions: int
    images: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # modality: greys, voxel, extent
    labels: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)  # mask: value: volume, share
    faults: dict[str, str] = field(default_factory=dict)  # files that could not be read


def measure(root: Path, progress: Progress | None = None) -> Measured:
    """Read a data set.

    Args:
        root: BIDS folder, only read.
        progress: told of each scan.

    Raises:
        DataError: no data set there at all.
    """
    data = find_files(root, find_patients(root))
    found = Measured(len(data.patients), len(data.scans))
    seen: set[tuple[str, str]] = set()
    for number, scan in enumerate(data.scans, 1):
        for file in (*scan.images, *scan.masks):
            if (file.patient, file.what) in seen:
                continue  # a patient counts once, however often it was scanned
            try:
                volume = read_volume(file.path)
            except DataError as error:
                found.faults[file.path.name] = str(error)
                continue
            seen.add((file.patient, file.what))
            if file.is_mask:
                _labels(found.labels.setdefault(file.what, {}), volume)
            else:
                _image(found.images.setdefault(file.what, defaultdict(list)), volume)
        if progress:
            progress(number, len(data.scans))
    return found


def _image(group: dict[str, list[Any]], volume: Volume) -> None:
    body = volume.data[head_of(np.nan_to_num(volume.data))]
    body = body[np.isfinite(body)]
    group["greys"].append([float(v) for v in np.percentile(body, GREYS)] if body.size else [0.0] * len(GREYS))
    group["shape"].append([int(n) for n in volume.data.shape])
    if volume.spacing is not None:
        group["voxel"].append(list(volume.spacing))
        group["extent"].append([n * s for n, s in zip(volume.data.shape, volume.spacing, strict=True)])


def _labels(group: dict[str, dict[str, list[float]]], volume: Volume) -> None:
    whole = np.rint(np.nan_to_num(volume.data)).astype(np.int64)
    values, counts = np.unique(whole[whole > 0], return_counts=True)
    for value, count in list(zip(values.tolist(), counts.tolist(), strict=True))[:MOST_LABELS]:
        entry = group.setdefault(str(value), {"ml": [], "share": []})
        entry["share"].append(count / whole.size)
        if volume.spacing is not None:
            entry["ml"].append(count * float(np.prod(volume.spacing)) / 1000)


def summary(found: Measured) -> dict[str, Any]:
    """Percentiles over patients, for the hospital's own staff: 5th to 95th, never the extremes."""
    return {
        "patients": found.patients,
        "sessions": found.sessions,
        "modalities": {
            what: {
                "patients": len(group["greys"]),
                "grey_values": {name: _percentiles([g[i] for g in group["greys"]]) for i, name in enumerate(SHOWN)},
                "shape": _by_axis(group["shape"]),
                "voxel_mm": _by_axis(group["voxel"]),
                "extent_mm": _by_axis(group["extent"]),
            }
            for what, group in sorted(found.images.items())
        },
        "labels": {
            what: {
                value: {
                    "patients": len(entry["share"]),
                    "share_of_voxels": _percentiles(entry["share"]),
                    "volume_ml": _percentiles(entry["ml"]),
                }
                for value, entry in sorted(values.items(), key=lambda item: int(item[0]))
            }
            for what, values in sorted(found.labels.items())
        },
        "unreadable": dict(sorted(found.faults.items())),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {name: float(f"{np.percentile(values, int(name[1:])):.4g}") for name in SHOWN}


def _by_axis(values: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    return [_percentiles([v[axis] for v in values]) for axis in range(3)] if values else []


def release(found: Measured, site: str, study: Study | None, threshold: int = LEAST) -> Released:
    """What may be handed over, by the rules of :mod:`fedneuro.privacy.data_statistics`.

    Args:
        found: of one data set.
        site: name under which it takes part.
        study: that it is for; None: none yet.
        threshold: patients that a group must have, at least 5.

    Raises:
        Refused: the study is private, or the data set has fewer patients than the threshold.
        BadInput: the threshold is too small.
    """
    if threshold < LEAST:
        raise BadInput(f"threshold {threshold}: expected at least {LEAST} patients")
    if study is not None:
        threshold = max(threshold, study.evaluation.min_patients)
        if study.privacy.mode != "none":
            raise Refused(
                f'study {study.study.name} has privacy.mode = "{study.privacy.mode}": statistics without noise would '
                "void what it promises to patients; nothing is released"
            )
    if found.patients < threshold:
        raise Refused(f"{found.patients} patients, and the threshold is {threshold}: nothing is released")

    def three(values: Sequence[Sequence[float]]) -> Any:
        return tuple(quantiles([v[axis] for v in values], threshold) for axis in range(3))

    modalities = {
        what: Group(
            patients=rounded_count(len(group["greys"])),
            grey_p5=quantiles([g[0] for g in group["greys"]], threshold),
            grey_p50=quantiles([g[2] for g in group["greys"]], threshold),
            grey_p95=quantiles([g[4] for g in group["greys"]], threshold),
            voxel_mm=three(group["voxel"]),
            extent_mm=three(group["extent"]),
        )
        for what, group in sorted(found.images.items())
        if len(group["greys"]) >= threshold
    }
    labels = {
        what: {
            value: LabelGroup(
                patients=rounded_count(len(entry["share"])),
                volume_ml=quantiles(entry["ml"], threshold),
                share_of_voxels=quantiles(entry["share"], threshold),
            )
            for value, entry in sorted(values.items(), key=lambda item: int(item[0]))
            if len(entry["share"]) >= threshold and int(value) < 1000
        }
        for what, values in sorted(found.labels.items())
    }
    return Released(
        site=site,
        study=study.hash if study else "",
        threshold=threshold,
        patients=rounded_count(found.patients),
        modalities=modalities,
        labels={what: values for what, values in labels.items() if values},
    )
