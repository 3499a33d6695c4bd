# SPDX-License-Identifier: Apache-2.0
"""Every metric equals its oracle to 1e-6 on random cases: MONAI, torchmetrics, scikit-learn, SciPy, scikit-image.

``FEDNEURO_METRIC_CASES`` is the number of cases (30; the project's claim is of 500, which takes about a minute). Every
kind of :data:`KINDS` comes in turn: empty, full, at the border, one voxel, thick slices.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fedneuro.models.metrics import (
    LESION_RULES,
    LesionRule,
    auprc,
    auroc,
    bootstrap,
    brier,
    c_index,
    c_index_interval,
    dice,
    ece,
    find_lesions,
    hausdorff95,
    lesion_scores,
    mean_absolute_error,
    root_mean_squared_error,
    sensitivity,
    specificity,
    surface_dice,
    volume_difference,
)

CASES = int(os.environ.get("FEDNEURO_METRIC_CASES", "30"))
KINDS = (
    "blobs",
    "both empty",
    "no prediction",
    "no reference",
    "full",
    "border",
    "one voxel",
    "noise",
    "same",
    "2 mm off",
)
TOLERANCE = 1e-6

Mask = NDArray[np.bool_]
Case = tuple[Mask, Mask, tuple[float, float, float]]

pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")


def blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> Mask:
    """One to four ellipsoids, which may touch each other and the border."""
    image = np.zeros(shape, np.bool_)
    grid = np.indices(shape)
    for _ in range(rng.integers(1, 5)):
        centre, radius = [rng.uniform(0, s) for s in shape], rng.uniform(1, 4, 3)
        image |= sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True)) < 1
    image[tuple(s // 2 for s in shape)] = True
    return image


def cases() -> Iterator[Case]:
    """Prediction, reference, spacing in mm."""
    for number in range(CASES):
        rng = np.random.default_rng(number)
        shape = tuple(int(s) for s in rng.integers(6, 22, 3))
        prediction, reference = blobs(rng, shape), blobs(rng, shape)
        match KINDS[number % len(KINDS)]:
            case "both empty":
                prediction, reference = np.zeros_like(prediction), np.zeros_like(reference)
            case "no prediction":
                prediction = np.zeros_like(prediction)
            case "no reference":
                reference = np.zeros_like(reference)
            case "full":
                reference = np.ones_like(reference)
            case "border":
                prediction[0] = reference[-1] = True
            case "one voxel":
                prediction, reference = np.zeros_like(prediction), np.zeros_like(reference)
                prediction[tuple(rng.integers(0, shape))] = reference[tuple(rng.integers(0, shape))] = True
            case "noise":
                prediction, reference = rng.random(shape) < 0.1, rng.random(shape) < 0.1
            case "same":
                reference = prediction.copy()
            case "2 mm off":
                prediction = np.roll(reference, 2, axis=0)
        spacing = (1.0, 1.0, 1.0) if number % 3 == 0 else tuple(round(float(s), 3) for s in rng.uniform(0.4, 6, 3))
        yield prediction, reference, spacing  # type: ignore[misc]


def surface(mask: Mask) -> Mask:
    edge: Mask = mask & ~np.asarray(ndimage.binary_erosion(mask), np.bool_)
    return edge


def to_surface(mask: Mask, other: Mask, spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Distance of each surface voxel of ``mask`` to the surface of ``other``, by SciPy's exact distance transform."""
    everywhere: Any = ndimage.distance_transform_edt(~surface(other), sampling=spacing)
    distances: NDArray[np.float64] = everywhere[surface(mask)]
    return distances


def test_dice_equals_monai_and_torchmetrics() -> None:
    from monai.metrics.meandice import compute_dice
    from torchmetrics.functional.segmentation import dice_score

    for prediction, reference, _ in cases():
        found = dice(prediction.astype(np.int64), reference.astype(np.int64), ("lesion",))["dice"]
        pair = torch.from_numpy(prediction)[None, None].float(), torch.from_numpy(reference)[None, None].float()
        assert found == pytest.approx(
            compute_dice(*pair, include_background=True, ignore_empty=False).item(), abs=TOLERANCE
        )
        if prediction.any() or reference.any():  # torchmetrics calls two empty masks 0, or NaN
            both = torch.from_numpy(prediction)[None].long(), torch.from_numpy(reference)[None].long()
            theirs = dice_score(*both, num_classes=2, include_background=False, average="macro", input_format="index")
            assert found == pytest.approx(theirs.item(), abs=TOLERANCE)


def test_distances_equal_monai_and_scipy() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    for prediction, reference, spacing in cases():
        maps = prediction.astype(np.int64), reference.astype(np.int64)
        hd95 = hausdorff95(*maps, ("lesion",), spacing)["hd95"]
        nsd = surface_dice(*maps, ("lesion",), spacing, 2.0)["nsd"]
        if not (prediction.any() and reference.any()):
            both = not (prediction.any() or reference.any())
            diagonal = np.linalg.norm(np.array(prediction.shape) * spacing)
            assert (hd95, nsd) == ((0.0, 1.0) if both else (pytest.approx(diagonal), 0.0))
            continue
        pair = torch.from_numpy(prediction)[None, None], torch.from_numpy(reference)[None, None]
        theirs = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing)).item()
        assert hd95 == pytest.approx(theirs, abs=TOLERANCE)
        theirs = compute_surface_dice(*pair, [2.0], include_background=True, spacing=list(spacing)).item()
        assert nsd == pytest.approx(theirs, abs=TOLERANCE)
        there, back = to_surface(prediction, reference, spacing), to_surface(reference, prediction, spacing)
        worst = max(np.percentile(there, 95), np.percentile(back, 95))
        assert hd95 == pytest.approx(worst, rel=TOLERANCE)
        both_ways = np.concatenate([there, back])
        if not np.isclose(both_ways, 2.0, atol=1e-4).any():  # where single precision may fall on either side
            assert nsd == pytest.approx((both_ways <= 2.0).mean(), abs=TOLERANCE)


def test_volumes_equal_counting() -> None:
    for prediction, reference, spacing in cases():
        found = volume_difference(prediction.astype(int), reference.astype(int), ("lesion",), spacing)
        expected = abs(prediction.sum() * np.prod(spacing) - reference.sum() * np.prod(spacing)) / 1000
        assert found == {"volume_difference": pytest.approx(expected, abs=TOLERANCE)}


def components(mask: Mask) -> list[Mask]:
    """26-connected components, by scikit-image."""
    label = pytest.importorskip("skimage.measure").label
    parts = label(mask, connectivity=3)
    return [parts == number for number in range(1, int(parts.max()) + 1)]


def area_weighted_hd95(mine: Mask, truth: Mask, spacing: tuple[float, ...]) -> float:
    """As DeepMind's surface-distance: elements between eight voxels each, distances by SciPy's distance transform."""
    from monai.metrics.utils import get_code_to_measure_table

    table, _ = get_code_to_measure_table(list(spacing))  # type: ignore[no-untyped-call]
    powers = 2 ** np.arange(7, -1, -1).reshape(2, 2, 2)
    # Each element lies between eight voxels; a correlation on an image that is one voxel wider sees all of them.
    codes: list[Any] = [
        ndimage.correlate(np.pad(mask.astype(int), 1), powers, mode="constant") for mask in (mine, truth)
    ]
    borders = [(code > 0) & (code < 255) for code in codes]
    percentiles = []
    for own, other in ((0, 1), (1, 0)):
        everywhere: Any = ndimage.distance_transform_edt(~borders[other], sampling=spacing)
        distance = everywhere[borders[own]]
        area = np.asarray(table)[codes[own][borders[own]]].astype(np.float64)
        order = np.lexsort((area, distance))
        share = np.cumsum(area[order]) / area.sum()
        percentiles.append(distance[order][min(int(np.searchsorted(share, 0.95)), len(order) - 1)])
    return float(max(percentiles))


def isles(prediction: Mask, reference: Mask) -> dict[str, float]:
    """The challenge's definition, component by component over the whole image."""
    true, seen = components(reference), components(prediction)
    found = sum(bool((part & prediction).any()) for part in true)
    false = sum(not (part & reference).any() for part in seen)
    missed = len(true) - found
    f1 = found / (found + (false + missed) / 2) if true or seen else 1.0
    values = {"lesion_f1": f1, "false_positives": false, "lesion_count_difference": abs(len(true) - len(seen))}
    return values | ({"lesion_sensitivity": found / len(true)} if true else {})


def brats(prediction: Mask, reference: Mask, spacing: tuple[float, ...], rule: LesionRule) -> dict[str, float]:
    """The challenge's definition, lesion by lesion over the whole image."""
    near = ndimage.generate_binary_structure(3, 2)

    def grown(mask: Mask) -> Mask:
        wide: Mask = np.asarray(ndimage.binary_dilation(mask, near, iterations=rule.margin), np.bool_)
        return wide

    seen, taken = components(prediction), set[int]()
    dices, distances, hits = [], [], 0
    for region in components(grown(reference)):
        lesion = region & reference
        reached = [i for i, part in enumerate(seen) if (part & grown(lesion)).any()]
        taken |= set(reached)
        if lesion.sum() * np.prod(spacing) <= rule.least:
            continue
        mine = np.logical_or.reduce([seen[i] for i in reached]) if reached else np.zeros_like(lesion)
        hits += bool(reached)
        dices.append(2 * (mine & lesion).sum() / (mine.sum() + lesion.sum()))
        distances.append(area_weighted_hd95(mine, lesion, spacing) if reached else 374.0)
    false, total = len(seen) - len(taken), len(dices)
    every = total + false
    values = {
        "lesion_dice": sum(dices) / every if every else 1.0,
        "lesion_hd95": (sum(distances) + 374 * false) / every if every else 0.0,
        "lesion_f1": 2 * hits / (2 * hits + (total - hits) + false) if every else 1.0,
        "false_positives": false,
    }
    return values | ({"lesion_sensitivity": hits / total} if total else {})


def test_lesions_equal_the_isles_definition() -> None:
    names = ("lesion_f1", "lesion_sensitivity", "false_positives", "lesion_count_difference")
    for prediction, reference, spacing in cases():
        lesions = find_lesions(prediction, reference, spacing, LESION_RULES["isles-2022"])
        found = {k: v for k, v in lesion_scores(lesions, names, (0.1, 1.0)).items() if ":" not in k}
        assert found == pytest.approx(isles(prediction, reference), abs=TOLERANCE)


@pytest.mark.parametrize("preset", ["brats-2023-gli", "brats-2023-met"])
def test_lesions_equal_the_brats_definition(preset: str) -> None:
    rule = LESION_RULES[preset]
    names = ("lesion_f1", "lesion_sensitivity", "false_positives", "lesion_dice", "lesion_hd95")
    for prediction, reference, spacing in cases():
        if prediction.mean() > 0.05 and (spacing == (1.0, 1.0, 1.0)) is (preset == "brats-2023-met"):
            continue  # half of the crowded cases for each preset: the plain definition is slow
        lesions = find_lesions(prediction, reference, spacing, rule, distances=True)
        found = {k: v for k, v in lesion_scores(lesions, names, (0.1, 1.0)).items() if ":" not in k}
        expected = brats(prediction, reference, spacing, rule)
        assert found == pytest.approx(expected, rel=2e-6, abs=TOLERANCE)


# -- cohorts --------------------------------------------------------------------------------------------------


def cohorts() -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Probabilities and classes of two to four classes, with ties, constant and certain predictions, few positives."""
    for number in range(CASES):
        rng = np.random.default_rng(number)
        classes, n = 2 + number % 3, int(rng.integers(8, 60))
        targets = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
        scores = rng.random((n, classes)) + 0.7 * np.eye(classes)[targets]
        match number % 5:
            case 1:
                scores = np.round(scores, 1) + 0.05
            case 2:
                scores = np.ones_like(scores)
            case 3:
                targets[classes:] = 0
            case 4:
                scores = scores**6
        yield scores / scores.sum(1, keepdims=True), targets


def test_ranking_equals_scikit_learn_and_torchmetrics() -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    from torchmetrics.functional.classification import binary_average_precision

    for p, t in cohorts():
        classes = p.shape[1]
        truth, called = np.eye(classes)[t], p.argmax(1)
        if classes == 2:
            called = (p[:, 1] >= 0.4).astype(int)
            assert auroc(p, t) == pytest.approx(oracle.roc_auc_score(t, p[:, 1]), abs=TOLERANCE)
            assert auprc(p, t) == pytest.approx(oracle.average_precision_score(t, p[:, 1]), abs=TOLERANCE)
            theirs = binary_average_precision(torch.from_numpy(p[:, 1]), torch.from_numpy(t))
            assert auprc(p, t) == pytest.approx(theirs.item(), abs=TOLERANCE)
            assert sensitivity(p, t, 0.4) == pytest.approx(oracle.recall_score(t, called), abs=TOLERANCE)
            assert specificity(p, t, 0.4) == pytest.approx(oracle.recall_score(1 - t, 1 - called), abs=TOLERANCE)
            continue
        assert auroc(p, t) == pytest.approx(oracle.roc_auc_score(truth, p, average="macro"), abs=TOLERANCE)
        assert auprc(p, t) == pytest.approx(oracle.average_precision_score(truth, p, average="macro"), abs=TOLERANCE)
        assert sensitivity(p, t) == pytest.approx(oracle.balanced_accuracy_score(t, called), abs=TOLERANCE)
        rest = [oracle.recall_score(t != k, called != k) for k in range(classes)]
        assert specificity(p, t) == pytest.approx(np.mean(rest), abs=TOLERANCE)


def test_calibration_equals_scikit_learn_and_torchmetrics() -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    for p, t in cohorts():
        bins = 5 + len(t) % 11
        rows, classes = torch.from_numpy(p), p.shape[1]
        judged = p[:, 1] if classes == 2 else p.max(1)
        if not np.isclose(
            judged * bins, np.round(judged * bins), atol=1e-4
        ).any():  # their edges are in single precision
            if classes == 2:
                theirs = binary_calibration_error(rows[:, 1], torch.from_numpy(t), n_bins=bins, norm="l1")
            else:
                theirs = multiclass_calibration_error(rows, torch.from_numpy(t), classes, n_bins=bins, norm="l1")
            assert ece(p, t, bins) == pytest.approx(theirs.item(), abs=TOLERANCE)
        expected = np.mean((p[:, 1] - t) ** 2) if classes == 2 else np.mean(((p - np.eye(classes)[t]) ** 2).sum(1))
        assert brier(p, t) == pytest.approx(expected, abs=TOLERANCE)
        if classes == 2:
            assert brier(p, t) == pytest.approx(oracle.brier_score_loss(t, p[:, 1]), abs=TOLERANCE)


def test_outcomes_equal_all_pairs_and_scipy() -> None:
    from scipy.stats import somersd

    oracle = pytest.importorskip("sklearn.metrics")

    for number in range(CASES):
        rng = np.random.default_rng(number)
        n = int(rng.integers(5, 40))
        time, event = rng.integers(1, 15, n).astype(float), rng.random(n) < (1.0 if number % 4 == 0 else 0.6)
        risk = np.round(rng.normal(-time / 8, 1), 1 if number % 2 else 6)
        good = pairs = 0.0
        for i in range(n):
            for j in range(n):
                if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                    pairs += 1
                    good += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
        assert c_index(risk, time, event) == pytest.approx(good / pairs if pairs else None, abs=TOLERANCE)
        if event.all():  # without censoring it is Somers' D of the risks, given the times
            assert c_index(risk, time, event) == pytest.approx((1 - somersd(time, risk).statistic) / 2, abs=TOLERANCE)
        assert mean_absolute_error(risk, time) == pytest.approx(np.abs(risk - time).mean(), abs=TOLERANCE)
        theirs = oracle.root_mean_squared_error(time, risk)
        assert root_mean_squared_error(risk, time) == pytest.approx(theirs, abs=TOLERANCE)


def test_the_interval_of_the_concordance_index_is_that_of_drawn_patients() -> None:
    """Equal to drawing patients one resample after the other, as all other metrics do."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        time, event = rng.integers(1, 15, 30).astype(float), rng.random(30) < 0.5
        risk = np.round(rng.normal(-time / 8, 1), 1)
        slow = bootstrap(lambda rows: c_index(risk[rows], time[rows], event[rows]), 30, resamples=200, seed=seed)  # noqa: B023
        assert c_index_interval(risk, time, event, resamples=200, seed=seed) == pytest.approx(slow)
    nobody = np.zeros(3, bool)
    assert c_index_interval(np.arange(3.0), np.arange(3.0), nobody, resamples=100, seed=0) is None


def test_a_wrong_definition_would_be_noticed() -> None:
    """The cases tell 6- from 26-connectivity, and BraTS' margin from none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        six = ndimage.generate_binary_structure(3, 1)
        label: Any = ndimage.label
        differ = sum(
            label(prediction, six)[1] != find_lesions(prediction, reference, None, LESION_RULES["isles-2022"]).predicted
            for prediction, reference, _ in cases()
        )
        margins = sum(
            find_lesions(prediction, reference, None, LESION_RULES["brats-2023-gli"]).found
            != find_lesions(prediction, reference, None, LESION_RULES["isles-2022"]).found
            for prediction, reference, _ in cases()
        )
    assert differ > CASES // 20 and margins > CASES // 10
