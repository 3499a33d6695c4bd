# SPDX-License-Identifier: Apache-2.0
"""Metrics against MONAI, scikit-learn, SciPy, brute force and numbers by hand."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedneuro.models.metrics import (
    LESION_RULES,
    METRICS,
    ScanRules,
    accuracy,
    auprc,
    auroc,
    bootstrap,
    brier,
    c_index,
    dice,
    ece,
    failed_scores,
    hausdorff95,
    higher_is_better,
    mean_absolute_error,
    mean_interval,
    reliability,
    scan_scores,
    sensitivity,
    specificity,
    youden_threshold,
)
from fedneuro.privacy.study_evaluation import SUITED_METRICS, Metric

LABELS = ("oedema", "core")


def blobs(seed: int, shape: tuple[int, ...] = (20, 24, 12)) -> NDArray[np.int64]:
    """Two ellipsoids of labels 1 and 2, which may touch the image's border."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.int64)
    grid = np.indices(shape)
    for label in (1, 2):
        centre = [rng.uniform(0, s) for s in shape]
        radius = [rng.uniform(2, s / 3) for s in shape]
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True)) < 1
        image[inside] = label
    image[tuple(s // 2 for s in shape)] = 1
    image[tuple(s // 3 for s in shape)] = 2
    return image


@pytest.mark.parametrize("seed", range(4))
def test_dice_equals_monai(seed: int) -> None:
    from monai.metrics.meandice import DiceMetric

    prediction, reference = blobs(seed), blobs(seed + 100)
    oracle = DiceMetric(include_background=False, num_classes=3)
    scores = oracle(torch.from_numpy(prediction)[None, None], torch.from_numpy(reference)[None, None])
    expected = torch.as_tensor(scores)[0].tolist()
    found = dice(prediction, reference, LABELS)
    assert [found["dice_oedema"], found["dice_core"]] == pytest.approx(expected)
    assert found["dice"] == pytest.approx(np.mean(expected))


def test_dice_by_hand_and_of_empty_masks() -> None:
    """|P| = 2, |R| = 4, |P ∩ R| = 1: Dice = 2/6."""
    prediction, reference = np.array([1, 1, 0, 0, 0]), np.array([1, 0, 1, 1, 1])
    empty = np.zeros(5, int)
    assert dice(prediction, reference, ("lesion",)) == {"dice": pytest.approx(1 / 3)}
    assert dice(empty, empty, ("lesion",)) == {"dice": 1.0}
    assert dice(empty, reference, ("lesion",)) == dice(prediction, empty, ("lesion",)) == {"dice": 0.0}


def brute_force_hd95(mine: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: tuple[float, ...]) -> float:
    """All pairs of surface voxels; a surface voxel has a face neighbour outside the mask or the image."""

    def surface(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        padded = np.pad(mask, 1)
        inner = padded.copy()
        for axis in range(mask.ndim):
            inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
        return (np.argwhere(padded & ~inner) - 1).astype(np.float64) * np.array(spacing, np.float64)

    a, b = surface(mine), surface(truth)
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return max(float(np.percentile(distances.min(1), 95)), float(np.percentile(distances.min(0), 95)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(20, 24, 12), (30, 40)])
def test_hausdorff_equals_brute_force_in_mm(seed: int, shape: tuple[int, ...]) -> None:
    spacing = (1.0, 0.7, 3.0)[: len(shape)]
    prediction, reference = blobs(seed, shape), blobs(seed + 50, shape)
    found = hausdorff95(prediction, reference, LABELS, spacing)
    for value, label in enumerate(LABELS, start=1):
        expected = brute_force_hd95(prediction == value, reference == value, spacing)
        assert found[f"hd95_{label}"] == pytest.approx(expected, rel=1e-5)
    assert found["hd95"] == pytest.approx((found["hd95_oedema"] + found["hd95_core"]) / 2)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("seed", range(3))
def test_cropping_does_not_change_the_hausdorff_distance(seed: int) -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    prediction, reference = blobs(seed) == 1, blobs(seed + 50) == 1
    whole = compute_hausdorff_distance(
        prediction[None, None], reference[None, None], include_background=True, percentile=95, spacing=[1.0, 2.0, 0.5]
    ).item()
    found = hausdorff95(prediction.astype(int), reference.astype(int), ("lesion",), (1.0, 2.0, 0.5))
    assert found == {"hd95": pytest.approx(whole)}


def test_hausdorff_of_empty_masks() -> None:
    """An image of 30 x 40 mm has a diagonal of 50 mm."""
    empty, some = np.zeros((30, 20), int), np.zeros((30, 20), int)
    some[3, 4] = 1
    assert hausdorff95(empty, empty, ("lesion",), (1.0, 2.0)) == {"hd95": 0.0}
    assert hausdorff95(empty, some, ("lesion",), (1.0, 2.0)) == {"hd95": 50.0}
    assert hausdorff95(some, empty, ("lesion",), (1.0, 2.0)) == {"hd95": 50.0}
    assert hausdorff95(some, some, ("lesion",), (1.0, 2.0)) == {"hd95": 0.0}


def test_images_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        dice(np.zeros((3, 4)), np.zeros((4, 3)), ("lesion",))
    with pytest.raises(ValueError, match="differ in shape"):
        hausdorff95(np.zeros((3, 4)), np.zeros((4, 3)), ("lesion",), (1.0, 1.0))
    with pytest.raises(ValueError, match="spacing has 3 numbers"):
        hausdorff95(np.zeros((3, 4)), np.zeros((3, 4)), ("lesion",), (1.0, 1.0, 1.0))


def cohort(seed: int, n: int = 40) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities of three classes with many ties."""
    rng = np.random.default_rng(seed)
    targets = np.concatenate([[0, 1, 2], rng.integers(0, 3, n - 3)])
    scores = np.round(rng.random((n, 3)) + 0.5 * np.eye(3)[targets], 1) + 0.1
    return scores / scores.sum(1, keepdims=True), targets


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_and_auroc_equal_scikit_learn(seed: int) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    probabilities, targets = cohort(seed)
    assert accuracy(probabilities, targets) == pytest.approx(oracle.accuracy_score(targets, probabilities.argmax(1)))
    expected = oracle.roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    assert auroc(probabilities, targets) == pytest.approx(expected)


def test_auroc_equals_torchmetrics_for_two_classes() -> None:
    from torchmetrics.functional.classification import binary_auroc

    probabilities, targets = cohort(9)
    pair = np.stack([1 - probabilities[:, 1], probabilities[:, 1]], axis=1)
    expected = binary_auroc(torch.from_numpy(pair[:, 1]), torch.from_numpy(targets == 1).long())
    assert auroc(pair, (targets == 1).astype(int)) == pytest.approx(expected.item())


def test_cohort_metrics_where_they_are_undefined() -> None:
    probabilities, targets = cohort(0)
    present = targets != 2
    assert auroc(probabilities[targets == 1], targets[targets == 1]) is None
    assert auroc(probabilities[:0], targets[:0]) is None
    assert accuracy(probabilities[:0], targets[:0]) is None
    # A class that no patient has does not count.
    expected = []
    for label in (0, 1):
        score = probabilities[present, label]
        expected.append(auroc(np.stack([-score, score], axis=1), (targets[present] == label).astype(int)))
    assert auroc(probabilities[present], targets[present]) == pytest.approx(np.mean(np.array(expected, float)))


@pytest.mark.parametrize(("right", "n"), [(30, 30), (0, 30), (27, 30), (6, 8), (1, 1)])
def test_the_interval_of_a_share_is_jeffreys(right: int, n: int) -> None:
    """Brown, Cai and DasGupta 2001, section 3.1.3: quantiles of Beta(x + 1/2, n - x + 1/2), where it is the wider.

    Half an unseen patient at 0 and at 1 makes a Dirichlet whose mean is that Beta; the spread of the seen is the
    unbiased one, √((n + 1) / (n - 1)) of the Beta's.
    """
    from scipy.stats import beta

    found = mean_interval([[1.0] * right + [0.0] * (n - right)], seed=0, resamples=20_000, bounds=(0.0, 1.0), fewest=1)
    low, high = beta.ppf([0.025, 0.975], right + 0.5, n - right + 0.5)
    assert found.low is not None and found.high is not None and found.method == "bounded"
    slack = 0.01 + (0 if right in (0, n) else 0.6 * (high - low) / n)
    assert found.low == pytest.approx(low, abs=slack) and found.high == pytest.approx(high, abs=slack)


def test_a_bounded_interval_knows_that_failures_may_not_have_been_seen() -> None:
    """Thirty scores about 0.9: none failed, yet one in fifteen may. The bootstrap cannot say so."""
    values = np.random.default_rng(0).normal(0.9, 0.02, 30)
    bounded, seen = (mean_interval([values], seed=0, bounds=bounds) for bounds in ((0.0, 1.0), None))
    assert bounded.low is not None and seen.low is not None and bounded.high is not None and seen.high is not None
    assert bounded.low < 0.9 * 29 / 31 < seen.low and seen.high - 0.01 < bounded.high < seen.high + 0.02
    many = mean_interval([np.tile(values, 100)], seed=0, bounds=(0.0, 1.0))
    assert many.low is not None and many.low > many.mean - 0.002, "with 3000 patients half a one is nothing"
    mirrored = mean_interval([1 - values], seed=0, bounds=(0.0, 1.0))
    assert mirrored.high == pytest.approx(1 - bounded.low, abs=0.01)
    with pytest.raises(ValueError, match="needs bounds"):
        mean_interval([values], seed=0, method="bounded")


def test_the_general_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).random(30)

    def general(seed: int) -> tuple[float, float, float] | None:
        return bootstrap(lambda rows: float(values[rows].mean()), 30, resamples=1000, seed=seed)

    assert general(1) == general(1) != general(2)
    mean = mean_interval([values], seed=1, method="percentile", resamples=4000)
    found = general(1)
    assert found is not None and mean.low is not None and mean.low < found[1] < found[0] < found[2]
    assert mean.low == pytest.approx(found[1], abs=0.02), "the level of a mean is widened for few patients"


def test_the_general_bootstrap_skips_undefined_resamples() -> None:
    probabilities, targets = cohort(1, n=12)
    found = bootstrap(lambda rows: auroc(probabilities[rows], targets[rows]), 12, resamples=200, seed=0)
    assert found is not None
    assert found[1] <= found[0] <= found[2]
    assert bootstrap(lambda _: None, 12, resamples=200, seed=0) is None
    assert bootstrap(lambda _: 1.0, 0, resamples=200, seed=0) is None
    one = np.arange(12) == 0  # defined in the cohort, but absent from 35 % of resamples, then from most
    assert bootstrap(lambda rows: 1.0 if one[rows].any() else None, 12, resamples=400, seed=0) is not None
    assert (
        bootstrap(lambda rows: 1.0 if np.array_equal(rows, np.arange(12)) else None, 12, resamples=50, seed=0) is None
    )


def test_every_metric_has_a_direction() -> None:
    assert set(METRICS) - {"reliability"} == set(higher_is_better), "a curve has no direction"
    worse = {name for name, better in higher_is_better.items() if not better}
    assert worse == {
        "hd95", "volume_difference", "false_positives", "lesion_count_difference", "lesion_hd95", "brier", "ece",
        "mae", "rmse",
    }  # fmt: skip


def test_a_study_can_name_every_metric_and_no_other() -> None:
    assert set(get_args(Metric)) == set(METRICS) == frozenset().union(*SUITED_METRICS.values())


# -- volumes and lesions --------------------------------------------------------------------------------------

RULES = ScanRules(labels=("lesion",), tolerance=1.0, lesions=LESION_RULES["isles-2022"], cuts=(0.002, 0.01))
EVERY = tuple(sorted(SUITED_METRICS["segmentation"]))


def two_lesions() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The truth: one voxel and a bar of eight. Seen: half of the bar, and one voxel elsewhere."""
    truth, seen = np.zeros((24, 8, 8), np.int64), np.zeros((24, 8, 8), np.int64)
    truth[0, 2, 2] = 1
    truth[8:16, 4, 4] = 1
    seen[8:12, 4, 4] = 1
    seen[20, 6, 1] = 1
    return seen, truth


def test_scores_by_hand() -> None:
    """Voxels of 1 mm: 9 true, 5 seen, 4 shared. TP 1, FN 1, FP 1. NSD: 4 + 1 of the truth's 9 and 4 of the 5 seen."""
    found = scan_scores(*two_lesions(), (1.0, 1.0, 1.0), EVERY, RULES)
    assert found["dice"] == pytest.approx(8 / 14)
    assert found["nsd"] == pytest.approx(9 / 14)
    assert found["volume_difference"] == pytest.approx(0.004)
    assert (found["lesion_f1"], found["lesion_sensitivity"], found["false_positives"]) == (0.5, 0.5, 1.0)
    assert (found["lesion_sensitivity:small"], found["lesion_sensitivity:medium"]) == (0.0, 1.0)
    assert "lesion_sensitivity:large" not in found and found["lesion_count_difference"] == 0.0
    assert found["lesion_dice"] == pytest.approx((0 + 8 / 12) / 3), "missed, half, false"


def test_the_presets_differ_where_they_should() -> None:
    """BraTS leaves out lesions of 50 mm³ and less, but no false positive; in 6 mm³ voxels the bar has 48 mm³."""
    gli = replace(RULES, lesions=LESION_RULES["brats-2023-gli"])
    found = scan_scores(*two_lesions(), (1.0, 2.0, 3.0), EVERY, gli)
    assert found["lesion_f1"] == 0.0 and "lesion_sensitivity" not in found, "nothing is left to be found"
    assert found["lesion_hd95"] == 374.0 and found["false_positives"] == 1.0
    found = scan_scores(*two_lesions(), (2.0, 2.0, 2.0), EVERY, gli)
    assert found["lesion_f1"] == pytest.approx(2 / 3) and found["lesion_sensitivity"] == 1.0
    near = two_lesions()[1].copy()
    near[0, 2, 2], near[16, 4, 4] = 0, 1  # beside the bar, and no voxel in common with the rest
    near[8:16, 4, 4] = 0
    isles = scan_scores(near, two_lesions()[1], (2.0, 2.0, 2.0), EVERY, RULES)
    within = scan_scores(near, two_lesions()[1], (2.0, 2.0, 2.0), EVERY, gli)
    assert (isles["lesion_sensitivity"], within["lesion_sensitivity"]) == (0.0, 1.0)


EMPTY = {
    "dice": 1.0, "nsd": 1.0, "hd95": 0.0, "volume_difference": 0.0, "lesion_f1": 1.0, "false_positives": 0.0,
    "lesion_count_difference": 0.0, "lesion_dice": 1.0, "lesion_hd95": 0.0,
}  # fmt: skip


def test_empty_masks_follow_the_table() -> None:
    _, truth = two_lesions()
    none, diagonal = np.zeros_like(truth), math.sqrt(24**2 + 8**2 + 8**2)
    one = (1.0, 1.0, 1.0)
    assert scan_scores(none, none, one, EVERY, RULES) == EMPTY
    assert scan_scores(truth, none, one, EVERY, RULES) == {
        "dice": 0.0, "nsd": 0.0, "hd95": diagonal, "volume_difference": pytest.approx(0.009), "lesion_f1": 0.0,
        "false_positives": 2.0, "lesion_count_difference": 2.0, "lesion_dice": 0.0, "lesion_hd95": 374.0,
    }  # fmt: skip
    assert scan_scores(none, truth, one, EVERY, RULES) == {
        "dice": 0.0, "nsd": 0.0, "hd95": diagonal, "volume_difference": pytest.approx(0.009), "lesion_f1": 0.0,
        "false_positives": 0.0, "lesion_count_difference": 2.0, "lesion_dice": 0.0, "lesion_hd95": 374.0,
        "lesion_sensitivity": 0.0, "lesion_sensitivity:small": 0.0, "lesion_sensitivity:medium": 0.0,
    }  # fmt: skip


def test_an_unknown_voxel_size_leaves_out_what_needs_it() -> None:
    found = scan_scores(*two_lesions(), None, EVERY, RULES)
    assert {"nsd", "hd95", "volume_difference", "lesion_hd95", "lesion_sensitivity:small"}.isdisjoint(found)
    assert found["lesion_f1"] == 0.5


def test_several_labels_are_told_apart_and_averaged() -> None:
    """The second label is in neither mask: its sensitivity is undefined, its Dice 1."""
    found = scan_scores(*two_lesions(), (1.0, 1.0, 1.0), EVERY, replace(RULES, labels=("lesion", "core")))
    assert found["dice"] == pytest.approx((8 / 14 + 1) / 2) and found["dice_core"] == 1.0
    assert found["lesion_sensitivity"] == found["lesion_sensitivity_lesion"] == 0.5
    assert "lesion_sensitivity_core" not in found and found["lesion_f1"] == 0.75


def test_a_scan_that_failed_has_the_worst_score_whatever_the_truth() -> None:
    _, truth = two_lesions()
    for reference in (truth, np.zeros_like(truth)):
        found = failed_scores(reference, (1.0, 1.0, 1.0), EVERY, RULES)
        assert {found[name] for name in ("dice", "nsd", "lesion_f1", "lesion_dice")} == {0.0}
        assert found["hd95"] == pytest.approx(math.sqrt(24**2 + 8**2 + 8**2)) and "false_positives" not in found


# -- classes and outcomes -------------------------------------------------------------------------------------


def test_youdens_threshold_by_hand() -> None:
    """Positives at 0.6 and 0.8, negatives at 0.1 and 0.3: every threshold above 0.3 up to 0.6 is perfect."""
    score = np.array([0.1, 0.3, 0.6, 0.8])
    pair, targets = np.stack([1 - score, score], axis=1), np.array([0, 0, 1, 1])
    threshold = youden_threshold(pair, targets)
    assert threshold == pytest.approx(0.46)
    assert sensitivity(pair, targets, 0.46) == specificity(pair, targets, 0.46) == 1
    assert (sensitivity(pair, targets, 0.7), specificity(pair, targets, 0.2)) == (0.5, 0.5)
    assert youden_threshold(pair[:2], targets[:2]) is None, "no positives"
    assert youden_threshold(np.ones((4, 3)) / 3, targets) is None, "three classes"


def test_the_reliability_curve_by_hand() -> None:
    """Four patients are told 0.2, one of them is positive; one is told 1.0, and is. Wilson: 0.25 of 4."""
    score = np.array([0.2, 0.2, 0.2, 0.2, 1.0])
    pair, targets = np.stack([1 - score, score], axis=1), np.array([1, 0, 0, 0, 1])
    first, last = reliability(pair, targets, 5)
    assert (first.number, first.n, first.observed) == (2, 4, 0.25) and first.predicted == pytest.approx(0.2)
    assert [first.low, first.high] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert (last.number, last.n, last.observed) == (5, 1, 1.0)
    assert ece(pair, targets, 5) == pytest.approx(4 / 5 * 0.05)


def test_cohorts_without_patients_or_with_one_class() -> None:
    probabilities, targets = cohort(0)
    none = probabilities[:0], targets[:0]
    assert [metric(*none) for metric in (auprc, sensitivity, specificity, brier)] == [None] * 4
    assert ece(*none, 10) is None and reliability(*none, 10) == []
    same = probabilities[targets == 1], targets[targets == 1]
    assert [metric(*same) for metric in (auprc, sensitivity, specificity)] == [None] * 3
    assert brier(*same) is not None


def test_the_concordance_index_equals_lifelines() -> None:
    """Recorded from lifelines 0.30.3 (``concordance_index(time, -risk, event)``), which pins an older pandas."""
    expected = [0.6660305344, 0.8152866242, 0.769005848, 0.6605839416, 0.6256281407, 0.64, 0.4955752212, 0.6881390593]
    for seed, theirs in enumerate(expected):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(5, 40))
        time, event = rng.integers(1, 15, n).astype(float), rng.random(n) < (1.0 if seed % 4 == 0 else 0.6)
        risk = np.round(rng.normal(-time / 8, 1), 1 if seed % 2 else 6)
        assert c_index(risk, time, event) == pytest.approx(theirs, abs=1e-9)


def test_the_concordance_index_where_no_pair_counts() -> None:
    never = np.zeros(3, bool)
    assert c_index(np.arange(3.0), np.arange(3.0), never) is None, "nobody had the event"
    assert c_index(np.arange(3.0), np.arange(3.0), ~never) == 0.0, "the highest risk lives longest"
    assert mean_absolute_error(np.array([1.0, 4.0]), np.array([2.0, 2.0])) == 1.5
    assert mean_absolute_error(np.empty(0), np.empty(0)) is None
