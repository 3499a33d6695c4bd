# SPDX-License-Identifier: Apache-2.0
"""Lesion by lesion: which were found, which were missed, what was seen where nothing is.

A lesion is a 26-connected component of a mask. What counts as found differs between challenges, so it is a named
:class:`LesionRule`:

    isles-2022      a lesion is found where the prediction shares a voxel with it; a predicted component that shares
                    none with the reference is a false positive (Hernandez Petzsche et al. 2022, and the challenge's
                    code, github.com/ezequieldlrosa/isles22)
    brats-2023-…    components of the reference that touch once each is grown by ``margin`` voxels (18 neighbours) are
                    one lesion; it is found where a predicted component reaches into the lesion grown by ``margin``;
                    lesions of at most ``least`` mm³ do not count, false positives of any size do; a missed lesion and
                    a false positive have Dice 0 and HD95 374 mm (github.com/rachitsaluja/BraTS-2023-Metrics). There
                    ``gli`` stands for glioma, also in sub-Saharan Africa and in children, ``men`` for meningioma,
                    ``met`` for metastases

References: https://doi.org/10.1038/s41597-022-01875-5; Moawad et al. 2023, arXiv 2306.00838; LaBella et al. 2023,
arXiv 2305.07642.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .overlap import MM3_PER_ML, box_of, check_spacing, same_shape
from .surfaces import quietly

__all__ = ["LESION_RULES", "PENALTY_MM", "SIZES", "LesionRule", "Lesions", "find_lesions", "lesion_scores"]

PENALTY_MM: Final = 374.0
"""HD95 of a missed lesion and of a false positive: the diagonal of BraTS' images, rounded."""
SIZES: Final = ("small", "medium", "large")

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionRule:
    """What is one lesion, what is found, what counts.

    Attributes:
        margin: voxels by which the reference is grown; 0: not at all.
        least: volume in mm³; lesions up to it do not count. 0: all count. One voxel is taken for 1 mm³ where its size
            is unknown.
    """

    margin: int
    least: float


LESION_RULES: Final[Mapping[str, LesionRule]] = {
    "isles-2022": LesionRule(margin=0, least=0.0),
    "brats-2023-gli": LesionRule(margin=3, least=50.0),
    "brats-2023-men": LesionRule(margin=1, least=50.0),
    "brats-2023-met": LesionRule(margin=1, least=2.0),
}
"""By the name that a study gives in ``evaluation.lesions``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesions:
    """Prediction against reference, lesion by lesion, for one label of one scan.

    Attributes:
        millilitres: volume of each lesion of the reference that counts; empty where the voxel size is unknown.
        found: for each lesion of the reference that counts, whether it was found.
        false: predicted components that belong to no lesion of the reference, not even to one that does not count.
        predicted: predicted components.
        dice: of each lesion that counts, with the predicted components that reach it; 0 where it was missed.
        hd95: the same in mm; empty where it was not asked for.
    """

    millilitres: tuple[float, ...]
    found: tuple[bool, ...]
    false: int
    predicted: int
    dice: tuple[float, ...]
    hd95: tuple[float, ...]


def find_lesions(
    prediction: Mask, reference: Mask, spacing: Sequence[float] | None, rule: LesionRule, *, distances: bool = False
) -> Lesions:
    """Lay the components of two masks over each other.

    Args:
        prediction: mask of the whole volume, three axes.
        reference: the truth, same shape.
        spacing: voxel spacing in mm, one number per axis; None: unknown.
        rule: what counts.
        distances: also the HD95 of each lesion; needs ``spacing``.
    """
    from scipy import ndimage

    same_shape(prediction, reference)
    if spacing is not None:
        check_spacing(spacing, prediction.ndim)
    either = prediction | reference
    if not either.any():
        return Lesions(millilitres=(), found=(), false=0, predicted=0, dice=(), hd95=())
    box = box_of(either, rule.margin + 1)
    prediction, reference = prediction[box], reference[box]
    every = ndimage.generate_binary_structure(prediction.ndim, prediction.ndim)
    labelled: Any = ndimage.label(prediction, every)
    parts, predicted = labelled
    lesions, count = _lesions(reference, rule, every)
    sizes = np.bincount(parts.ravel(), minlength=predicted + 1)
    voxel = float(np.prod(spacing)) if spacing is not None else 1.0
    touched = np.zeros(predicted + 1, np.bool_)
    touched[0] = True
    found = list[bool]()
    volumes, dices, hd95s = list[float](), list[float](), list[float]()
    for number, place in enumerate(ndimage.find_objects(lesions, max_label=count), start=1):
        if place is None:
            continue
        place = _wider(place, rule.margin + 1, lesions.shape)
        own = lesions[place] == number
        reach = _grown(own, rule.margin)
        reaching = np.unique(parts[place][reach])
        reaching = reaching[reaching > 0]
        touched[reaching] = True
        voxels = int(np.count_nonzero(own))
        if voxels * voxel <= rule.least:
            continue
        found.append(bool(reaching.size))
        volumes.append(voxels * voxel / MM3_PER_ML)
        shared = int(np.count_nonzero(np.isin(parts[place][own], reaching)))
        dices.append(2.0 * shared / (voxels + int(sizes[reaching].sum())) if reaching.size else 0.0)
        if distances and spacing is not None:
            hd95s.append(
                _robust_hausdorff(np.isin(parts, reaching), lesions == number, spacing) if reaching.size else PENALTY_MM
            )
    return Lesions(
        millilitres=tuple(volumes) if spacing is not None else (),
        found=tuple(found),
        false=predicted + 1 - int(touched.sum()),
        predicted=predicted,
        dice=tuple(dices),
        hd95=tuple(hd95s),
    )


def lesion_scores(lesions: Lesions, names: Sequence[str], cuts: Sequence[float]) -> dict[str, float]:
    """The metrics of one label of one scan; those that are undefined are left out.

    Args:
        lesions: of :func:`find_lesions`.
        names: metrics that are wanted, out of those below.
        cuts: two volumes in ml that part small, medium and large lesions.

    Returns:
        ``lesion_f1``
            2 TP / (2 TP + FP + FN); 1 where there is nothing to find and nothing was seen.
        ``lesion_sensitivity``
            TP / (TP + FN); undefined without a lesion; ``lesion_sensitivity:small``, ``:medium`` and ``:large`` for
            lesions below the first cut, below the second, and all others.
        ``false_positives``
            FP.
        ``lesion_count_difference``
            |lesions of the reference - predicted components|.
        ``lesion_dice``, ``lesion_hd95``
            mean over lesions of the reference and false positives; 1 and 0 mm where there is neither.
    """
    total, hits, false = len(lesions.found), sum(lesions.found), lesions.false
    values = {
        "lesion_f1": 2 * hits / (hits + total + false) if total + false else 1.0,
        "false_positives": float(false),
        "lesion_count_difference": float(abs(total - lesions.predicted)),
        "lesion_dice": sum(lesions.dice) / (total + false) if total + false else 1.0,
    }
    if len(lesions.hd95) == total:
        penalties = false * PENALTY_MM
        values["lesion_hd95"] = (sum(lesions.hd95) + penalties) / (total + false) if total + false else 0.0
    if total:
        values["lesion_sensitivity"] = hits / total
        values |= _by_size(lesions, cuts)
    return {name: value for name, value in values.items() if name.partition(":")[0] in names}


def _by_size(lesions: Lesions, cuts: Sequence[float]) -> dict[str, float]:
    size = np.searchsorted(cuts, lesions.millilitres, side="right")
    found = np.array(lesions.found)[: len(size)]
    return {
        f"lesion_sensitivity:{name}": float(found[size == place].mean())
        for place, name in enumerate(SIZES)
        if (size == place).any()
    }


def _lesions(reference: Mask, rule: LesionRule, every: Mask) -> tuple[NDArray[np.int32], int]:
    """Number of the lesion that each voxel of the reference belongs to, and how many there are."""
    from scipy import ndimage

    labelled: Any = ndimage.label(_grown(reference, rule.margin), every)
    together, count = labelled
    return together * reference, count


def _grown(mask: Mask, margin: int) -> Mask:
    if not margin:
        return mask
    from scipy import ndimage

    structure = ndimage.generate_binary_structure(mask.ndim, min(2, mask.ndim))
    grown: Mask = np.asarray(ndimage.binary_dilation(mask, structure, iterations=margin), np.bool_)
    return grown


def _wider(place: tuple[slice, ...], margin: int, shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(max(part.start - margin, 0), min(part.stop + margin, side))
        for part, side in zip(place, shape, strict=True)
    )


def _robust_hausdorff(mine: Mask, truth: Mask, spacing: Sequence[float]) -> float:
    """95th percentile of the distance between two surfaces, each surface element weighted by its area.

    As in github.com/google-deepmind/surface-distance, which BraTS uses; MONAI finds elements, areas and distances.
    Neither mask is empty.
    """
    import torch
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    box = box_of(mine | truth, 1)
    pair = tuple(torch.from_numpy(np.ascontiguousarray(mask[box])) for mask in (mine, truth))
    steps = [float(mm) for mm in spacing]
    parts: Any = quietly(lambda: get_mask_edges(*pair, spacing=steps))
    edges, areas = parts[:2], parts[2:]
    worst = []
    for ours, other, area in ((edges[0], edges[1], areas[0]), (edges[1], edges[0], areas[1])):
        distance = np.asarray(get_surface_distance(ours, other, spacing=steps), np.float64)
        weight = np.asarray(area[ours], np.float64)
        order = np.lexsort((weight, distance))
        share = np.cumsum(weight[order]) / weight.sum()
        worst.append(float(distance[order][min(int(np.searchsorted(share, 0.95)), len(order) - 1)]))
    return max(worst)
