# SPDX-License-Identifier: Apache-2.0
"""What only shows against the other patients: odd voxel sizes, odd quality, missing and exchanged modalities.

An outlier lies further from the median than a multiple of the spread (the median absolute deviation, at least a share
of the median), so that one wild value does not hide itself and an even cohort does not report noise.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .catalogue import Finding
from .files import DataSet, File
from .look import Look

__all__ = ["judge_cohort", "outliers"]

FEWEST: Final = 6
FAR: Final = 8.0
"""Multiples of the spread; with a normal distribution one in 10^15, with real ones a few in 10,000."""
ONE_WAY: Final = 0.12
"""An image is taken for another modality if it is this much more like it, and no other image is."""
Sum = tuple[NDArray[np.float64], int]
EACH_WAY: Final = 0.02
BOTH_WAYS: Final = 0.12
"""Two images of one scan are taken for exchanged if each is more like the other's modality, and by this much together
more so than is usual in the cohort."""
USUAL_SHARE: Final = 0.5
"""A modality that this share of the scans has is expected of all."""


def outliers(values: Sequence[float], *, least: float, far: float = FAR) -> list[int]:
    """Places of values that lie far from the rest.

    Args:
        values: at least :data:`FEWEST`, or nothing is an outlier.
        least: smallest spread, as a share of the median's size.
        far: multiples of the spread.
    """
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    if finite.size < FEWEST:
        return []
    middle = float(np.median(finite))
    spread = max(1.4826 * float(np.median(np.abs(finite - middle))), least * abs(middle), 1e-12)
    return [int(i) for i in np.flatnonzero(np.abs(array - middle) > far * spread)]


def judge_cohort(data: DataSet, images: list[Look], masks: list[Look]) -> list[Finding]:
    """Findings over all patients."""
    findings = list(_missing(data))
    by_what: dict[str, list[Look]] = defaultdict(list)
    for look in [*images, *masks]:
        by_what[look.file.what].append(look)
    for what, looks in sorted(by_what.items()):
        if looks[0].file.is_mask:
            findings += _mask_values(looks)
            continue
        findings += _geometry(what, looks)
        findings += _quality(looks)
    findings += _modalities(images)
    if len(data.patients) < FEWEST:
        findings.append(Finding("cohort-small", data.patients, f"{len(data.patients)} patients"))
    return findings


def _missing(data: DataSet) -> Iterator[Finding]:
    scans = [scan for scan in data.scans if scan.images]
    for kind, check in (("images", "modality-missing"), ("masks", "mask-missing")):
        counts = Counter(what for scan in scans for what in {file.what for file in getattr(scan, kind)})
        for what, count in sorted(counts.items()):
            if count < USUAL_SHARE * len(scans) or count == len(scans):
                continue
            lacking = [s for s in scans if what not in {file.what for file in getattr(s, kind)}]
            patients = tuple(sorted({scan.patient for scan in lacking}))
            yield Finding(check, patients, f"{what}: {len(lacking)} of {len(scans)} scans lack it")


def _geometry(what: str, looks: list[Look]) -> Iterator[Finding]:
    for name, check, values in (
        ("voxel", "spacing-odd", [sorted(look.facts.sizes) for look in looks]),
        (
            "extent",
            "extent-odd",
            [sorted(n * s for n, s in zip(look.shape, _ras(look), strict=True)) for look in looks],
        ),
    ):
        table = np.array(values)
        odd = sorted({i for axis in range(3) for i in outliers(table[:, axis].tolist(), least=0.03)})
        # Several protocols in one hospital are no outliers: those are few.
        if odd and len(odd) <= max(1, len(looks) // 10):
            usual = "×".join(f"{v:.3g}" for v in np.median(table, axis=0))
            for i in odd:
                mine = "×".join(f"{v:.3g}" for v in table[i])
                yield Finding(
                    check, (looks[i].file.patient,), f"{looks[i].file.path.name}: {name} {mine}, usual {usual}"
                )
    axes = Counter(look.facts.axes for look in looks)
    usual_axes, count = axes.most_common(1)[0]
    if len(axes) > 1 and count >= 0.8 * len(looks):
        others = [look for look in looks if look.facts.axes != usual_axes]
        patients = tuple(sorted({look.file.patient for look in others}))
        yield Finding(
            "axes-odd", patients, f"{what}: {', '.join(sorted(set(axes) - {usual_axes}))} where {usual_axes} is usual"
        )


def _ras(look: Look) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in np.linalg.norm(look.affine[:3, :3], axis=0))
    return x, y, z


_METRICS: Final = {"likeness": 0.03, "snr": 0.2, "cnr": 0.2, "fber": 0.3, "efc": 0.05}
"""Smallest spread of each metric, as a share of its median."""
ODD: Final = 4.5
"""Multiples of the spread by which an image is worse than usual; better than usual is odd at twice as many."""


def _quality(looks: list[Look]) -> Iterator[Finding]:
    measured = [look for look in looks if look.metrics and look.cube is not None]
    if len(measured) >= FEWEST:
        cubes = np.stack([np.asarray(look.cube, np.float64).ravel() for look in measured])
        for look, cube, rest in zip(measured, cubes, (cubes.sum(axis=0) - cubes) / (len(cubes) - 1), strict=True):
            look.metrics["likeness"] = float(np.corrcoef(cube, rest)[0, 1])  # with the mean of the others
    odd: dict[int, list[str]] = defaultdict(list)
    for metric, least in _METRICS.items():
        values = [look.metrics.get(metric, float("nan")) for look in measured]
        worse, better = 1 if metric == "efc" else -1, set(outliers(values, least=least, far=2 * ODD))
        for i in outliers(values, least=least, far=ODD):
            middle = float(np.nanmedian(values))
            if (values[i] - middle) * worse > 0 or i in better:
                odd[i].append(f"{metric.upper()} {values[i]:.3g}, usual {middle:.3g}")
    for i, words in sorted(odd.items()):
        look = measured[i]
        yield Finding("quality-outlier", (look.file.patient,), f"{look.file.path.name}: {'; '.join(words)}")


def _mask_values(looks: list[Look]) -> Iterator[Finding]:
    """Values that hardly any other mask holds."""
    counts = Counter(value for look in looks for value in look.values)
    usual = {value for value, count in counts.items() if count > max(1, 0.1 * len(looks))}
    if len(looks) < FEWEST:
        return
    for look in looks:
        odd = [value for value in look.values if value not in usual and abs(value - round(value)) < 1e-3]
        if (odd and max(look.values) > max(usual, default=0)) or any(value < 0 for value in odd):
            shown = ", ".join(f"{v:g}" for v in odd[:5])
            yield Finding("mask-values", (look.file.patient,), f"{look.file.path.name}: holds {shown}")


def _modalities(images: list[Look]) -> Iterator[Finding]:
    """Copies of one modality under another's name, and images that look like another modality of the cohort."""
    by_scan: dict[tuple[str, str, str], list[Look]] = defaultdict(list)
    by_what: dict[str, list[Look]] = defaultdict(list)
    for look in images:
        by_scan[look.file.patient, look.file.session, look.digest].append(look)
        if look.cube is not None:
            by_what[look.file.what].append(look)
    for (patient, _, _), same in sorted(by_scan.items()):
        if len({look.file.what for look in same}) > 1:
            yield Finding("modality-copied", (patient,), " and ".join(sorted(look.file.path.name for look in same)))
    sums: dict[str, Sum] = {
        what: (np.stack([np.asarray(look.cube, np.float64) for look in looks]).sum(axis=0), len(looks))
        for what, looks in by_what.items()
        if len(looks) >= FEWEST
    }
    like: dict[tuple[str, str, str], dict[tuple[str, str], tuple[float, float, Look]]] = defaultdict(dict)
    told: set[File] = set()
    for what, other in permutations(sums, 2):
        gains = [_gain(look, sums[what], sums[other]) for look in by_what[what]]
        odd = outliers(gains, least=0.0, far=5.0)
        for i, (look, gain) in enumerate(zip(by_what[what], gains, strict=True)):
            file = look.file
            like[file.patient, file.session, file.variant][what, other] = gain, gain - float(np.median(gains)), look
            if gain > ONE_WAY and i in odd and file not in told:
                told.add(file)
                words = f"{file.path.name}: like {other} rather than {what} (correlation {gain:.2f} higher)"
                yield Finding("modality-unlike", (file.patient,), words)
    for (patient, _, _), found in sorted(like.items()):
        for (what, other), (gain, above, look) in found.items():
            back = found.get((other, what))
            if what < other and back is not None and min(gain, back[0]) > EACH_WAY and above + back[1] > BOTH_WAYS:
                words = f"{look.file.path.name} and {back[2].file.path.name}: each like the other"
                yield Finding("modality-swapped", (patient,), words)


def _gain(look: Look, own: Sum, other: Sum) -> float:
    """By how much an image is more like the mean of another modality than of its own, itself left out."""
    cube = np.asarray(look.cube, np.float64)
    mean = (own[0] - cube) / (own[1] - 1)
    score = np.atleast_2d(np.corrcoef([cube.ravel(), mean.ravel(), other[0].ravel()]))
    return float(score[0, 2] - score[0, 1])
