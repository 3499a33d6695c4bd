# SPDX-License-Identifier: Apache-2.0
"""Looks at the voxels of one image: statistics, quality, a small comparable picture, and what is wrong by itself.

The *cube* is the head cut out at its bounding box, brought to 24×24×24 and standardised: images of one body part can
be compared by it whatever their voxel size, which many data sets have lost.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ....privacy.errors import DataError
from ..nifti import Volume, read_volume
from .catalogue import Finding
from .files import File
from .headers import HeaderFacts, judge_header
from .metrics import otsu, quality_metrics

__all__ = ["Look", "foreground_of", "look_at"]

SIDE: Final = 24
FEW_GREYS: Final = 16
CLIPPED_SHARE: Final = 0.02
OVERFLOW_SHARE: Final = 1e-4
HISTOGRAM_BINS: Final = 64

Cube = NDArray[np.float32]
Report = Callable[[str, str], None]


@dataclass
class Look:
    """What is kept of one image or mask after its voxels are let go."""

    file: File
    facts: HeaderFacts
    shape: tuple[int, int, int]  # in RAS order
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float] | None
    digest: str  # of the voxels in RAS order: the same image, however it is stored
    cube: Cube | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    quantiles: tuple[float, ...] = ()
    histogram: tuple[tuple[float, ...], tuple[int, ...]] = ((), ())
    values: tuple[float, ...] = ()  # of a mask
    findings: list[Finding] = field(default_factory=list)


def look_at(file: File) -> tuple[Look | None, Volume | None, list[Finding]]:
    """Read one file and judge it by itself.

    Returns:
        What is kept, the voxels (both None where the file cannot be used), and findings of the header.
    """
    facts, findings = judge_header(file)
    if facts is None:
        return None, None, findings
    try:
        volume = read_volume(file.path)
    except DataError as error:
        text = str(error).removeprefix(f"{file.path.name}: ")
        return None, None, [*findings, Finding("file-broken", (file.patient,), f"{file.path.name}: {text}")]
    x, y, z = (int(n) for n in volume.data.shape)
    digest = hashlib.sha256(f"{volume.data.shape}".encode() + volume.data.tobytes()).hexdigest()
    look = Look(file, facts, (x, y, z), volume.affine, volume.spacing, digest)
    (_judge_mask if file.is_mask else _judge_image)(look, volume.data)
    return look, volume, findings


def _judge_image(look: Look, data: NDArray[np.float32]) -> None:
    name, patient = look.file.path.name, (look.file.patient,)

    def found(check: str, detail: str) -> None:
        look.findings.append(Finding(check, patient, f"{name}: {detail}"))

    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        found("voxels-not-finite", f"{bad} of {data.size} voxels")
        data = np.nan_to_num(data, posinf=0, neginf=0)
    if data.max() <= data.min():
        found("voxels-constant", f"every voxel is {float(data.flat[0]):g}")
        return
    head = foreground_of(data)
    look.quantiles = tuple(float(q) for q in np.percentile(data[head], [1, 5, 25, 50, 75, 95, 99]))
    counts, edges = np.histogram(data[head], HISTOGRAM_BINS)
    look.histogram = tuple(float(e) for e in edges), tuple(int(n) for n in counts)
    look.metrics = quality_metrics(data, head)
    look.cube = cube_of(data, head)
    values, numbers = np.unique(data[head], return_counts=True)
    if len(values) < FEW_GREYS:
        found("voxels-few-greys", f"{len(values)} grey values in the head")
    elif numbers[-1] > CLIPPED_SHARE * head.sum() and numbers[-1] > 5 * np.median(numbers[-11:-1]):
        found("voxels-clipped", f"{numbers[-1] / head.sum():.0%} of the head is exactly {values[-1]:g}")
    _judge_overflow(look, data, found)
    _judge_slices(data, head, found)


def _judge_overflow(look: Look, data: NDArray[np.float32], found: Report) -> None:
    """Dark voxels among bright neighbours on all sides, in an image that uses all of its number type's range."""
    if look.facts.dtype.kind not in "iu" or look.facts.scaled or look.facts.dtype.itemsize > 2:
        return
    span = 2.0 ** (8 * look.facts.dtype.itemsize)
    if data.max() - data.min() < 0.9 * span or min(data.shape) < 3:
        return
    low, high = data < data.min() + 0.25 * span, data > data.max() - 0.25 * span
    inner = (slice(1, -1),) * 3
    bright = np.zeros(low[inner].shape, np.int8)
    for axis in range(3):
        for part in (slice(None, -2), slice(2, None)):
            bright += high[tuple(part if a == axis else slice(1, -1) for a in range(3))]
    lonely = int((low[inner] & (bright >= 3)).sum())
    if lonely > max(3, OVERFLOW_SHARE * data.size):
        found("voxels-overflow", f"{lonely} dark voxels among the brightest; stored as {look.facts.dtype}")


def _judge_slices(data: NDArray[np.float32], head: NDArray[np.bool_], found: Report) -> None:
    """Empty and repeated slices between slices that show the head."""
    for axis, plane in enumerate(("sagittal", "coronal", "axial")):
        shown = np.flatnonzero(head.any(axis=tuple(a for a in range(3) if a != axis)))
        if len(shown) < 4:
            continue
        slices = np.moveaxis(data, axis, 0)
        flat = [int(i) for i in range(shown[0] + 1, shown[-1]) if slices[i].max() <= slices[i].min()]
        if flat:
            found(
                "slices-empty", f"{len(flat)} {plane} slice{'s'[: len(flat) > 1]}, first {flat[0] + 1} of {len(slices)}"
            )
        same = [
            int(i) for i in range(shown[0], shown[-1]) if i not in flat and np.array_equal(slices[i], slices[i + 1])
        ]
        if same:
            found(
                "slices-repeated",
                f"{len(same)} {plane} slice{'s'[: len(same) > 1]}, first {same[0] + 2} of {len(slices)}",
            )


def _judge_mask(look: Look, data: NDArray[np.float32]) -> None:
    name, patient = look.file.path.name, (look.file.patient,)
    if not np.isfinite(data).all():
        look.findings.append(Finding("voxels-not-finite", patient, f"{name}: mask"))
        data = np.nan_to_num(data, posinf=0, neginf=0)
    values = np.unique(data)
    look.values = tuple(float(v) for v in values[:64])
    between = values[np.abs(values - np.rint(values)) > 1e-3]
    if between.size:
        look.findings.append(
            Finding("mask-not-whole", patient, f"{name}: {between.size} values such as {between[0]:.3g}")
        )
    share = float((data > 0.5).mean())
    if share == 0:
        look.findings.append(Finding("mask-empty", patient, name))
    elif share > 0.9:
        look.findings.append(Finding("mask-full", patient, f"{name}: {share:.0%} of all voxels"))


def foreground_of(data: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The head: above Otsu's threshold of the voxels that are not background, or all where nothing is."""
    background = float(np.median(np.concatenate([data[0].ravel(), data[-1].ravel(), data[:, 0].ravel()])))
    low, high = np.percentile(data, [0.5, 99.5])
    clipped = np.clip(data, low, high)
    head = clipped > min(otsu(clipped), background + 0.5 * (float(high) - background))
    return head if head.any() else np.ones(data.shape, bool)


def cube_of(data: NDArray[np.float32], head: NDArray[np.bool_]) -> Cube:
    """The head's bounding box, brought to 24 voxels a side by averaging or repeating, standardised."""
    low, high = np.percentile(data[head], [1, 99])
    part = np.clip(data, min(low, float(np.percentile(data, 5))), high)
    for axis in range(3):
        # Half a percent is left out at both ends, so that single bright voxels in the air do not move the box, which is
        # measured in parts of voxels, so that the cube of a resampled copy is the same.
        profile = np.cumsum(np.concatenate([[0], head.sum(axis=tuple(a for a in range(3) if a != axis))]))
        places = np.interp([0.005 * profile[-1], 0.995 * profile[-1]], profile, np.arange(len(profile)))
        part = _bring(part, axis, float(places[0]), float(places[1]))
    spread = float(part.std())
    return np.asarray((part - part.mean()) / (spread or 1.0), np.float32)


def _bring(part: NDArray[np.float32], axis: int, start: float, stop: float) -> NDArray[np.float32]:
    """Area-weighted resampling of one axis, from ``start`` to ``stop`` in voxels, to :data:`SIDE` voxels."""
    n = part.shape[axis]
    whole = np.concatenate([np.zeros_like(part.take([0], axis), np.float64), np.cumsum(part, axis, np.float64)], axis)
    edges = np.linspace(start, max(stop, start + 1e-3), SIDE + 1)
    below = np.clip(edges.astype(int), 0, n - 1)
    share = (edges - below).reshape([-1 if a == axis else 1 for a in range(3)])
    at = whole.take(below, axis) * (1 - share) + whole.take(below + 1, axis) * share
    return np.asarray(np.diff(at, axis=axis) / (edges[1] - edges[0]), np.float32)
