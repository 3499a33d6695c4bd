# SPDX-License-Identifier: Apache-2.0
"""``[data.preprocessing]`` and ``[data.augmentation]``: each step against what is known of a made-up scan."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from fedneuro.client.data import Scan, open_site
from fedneuro.client.data.augment import augment
from fedneuro.client.data.bias import correct_bias
from fedneuro.client.data.elastic import RandElasticBSplined
from fedneuro.client.data.foreground import box_around, brain_of, head_of
from fedneuro.client.data.intensity import landmarks_of, normalised, standard_scale
from fedneuro.client.data.resample import (
    _moved,
    _moved_by_monai,
    _places,
    forget_places,
    resample_image,
    resample_mask,
)
from fedneuro.privacy.errors import DataError
from fedneuro.privacy.study_data import AugmentationSection, PreprocessingSection
from tests.bids import image_path, make_study, mask_path, write_nifti, write_site

Floats = NDArray[np.float32]


def ball(side: int, radius: float) -> NDArray[np.bool_]:
    grid = np.indices((side,) * 3) - (side - 1) / 2
    return np.asarray((grid**2).sum(axis=0) <= radius**2)


def phantom_head(side: int = 48) -> tuple[Floats, NDArray[np.bool_]]:
    """A brain of two tissues with a ventricle, a dark skull, a bright scalp, two thin bridges, noise; and the brain."""
    brain = ball(side, 0.3 * side)
    image = np.where(ball(side, 0.46 * side) & ~ball(side, 0.4 * side), 180.0, 0.0)  # scalp
    image[brain] = 100
    image[ball(side, 0.2 * side)] = 140
    image[ball(side, 0.06 * side)] = 20
    bridge = image[side // 2, side // 2]
    bridge[ball(side, 0.4 * side)[side // 2, side // 2] & (bridge == 0)] = 90
    noise = np.abs(np.random.default_rng(0).normal(0, 4, image.shape))
    return (image + noise).astype(np.float32), brain


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_head_and_brain_of_a_phantom() -> None:
    image, brain = phantom_head()
    assert dice(head_of(image), ball(48, 0.46 * 48)) > 0.98
    assert dice(brain_of(image, (1, 1, 1), 2.0), brain) > 0.97
    # With voxels of twice the size in the header, the ball is half as many voxels wide.
    assert dice(brain_of(image, (2, 2, 2), 4.0), brain) > 0.97
    assert head_of(np.full((4, 4, 4), 3, np.float32)).all()


def test_box_around_the_foreground() -> None:
    inside = np.zeros((9, 8, 7), bool)
    inside[3:5, 4, 6] = True
    assert box_around(inside, 2) == (slice(1, 7), slice(2, 7), slice(4, 7))
    assert box_around(np.zeros((4, 4, 4), bool), 1) == (slice(0, 4),) * 3


def spread(image: Floats, where: NDArray[np.bool_]) -> float:
    return float(image[where].std() / image[where].mean())


def test_n4_takes_a_known_field_out_and_gives_the_same_bits_again() -> None:
    inside = ball(32, 13)
    ramp = np.linspace(0.6, 1.4, 32)[:, None, None] * np.linspace(1.2, 0.8, 32)[None, :, None]
    noise = np.random.default_rng(0).normal(0, 2, inside.shape)
    biased = np.where(inside, (100 + noise) * ramp, 0).astype(np.float32)
    mended = correct_bias(biased, inside, (1, 1, 1), shrink=2, iterations=(20, 20))
    assert spread(biased, inside) > 0.15
    assert spread(mended, inside) < 0.05
    assert not mended[~inside].any() and mended.dtype == np.float32
    assert np.array_equal(mended, correct_bias(biased, inside, (1, 1, 1), shrink=2, iterations=(20, 20)))
    one_slice = correct_bias(
        biased[:, :, 16:17].copy(), inside[:, :, 16:17], (1, 1, 5), shrink=1, iterations=(30, 30, 30)
    )
    assert spread(one_slice, inside[:, :, 16:17]) < 0.5 * spread(biased[:, :, 16:17], inside[:, :, 16:17])
    flat = np.full((8, 8, 8), 5, np.float32)
    assert np.array_equal(correct_bias(flat, flat > 0, (1, 1, 1), shrink=4, iterations=(5,)), flat)


def test_nyul_brings_two_scanners_to_one_scale() -> None:
    """The second scanner shows the same head with another contrast: after standardisation they are alike."""
    rng = np.random.default_rng(0)
    one = np.where(ball(24, 11), rng.gamma(4, 30, (24, 24, 24)), 0).astype(np.float32)
    other = (5 * one**0.8).astype(np.float32)
    marks = [landmarks_of(image, image != 0) for image in (one, other)]
    scale = standard_scale(marks)
    assert scale[0] == 0 and scale[-1] == 1 and np.all(np.diff(scale) > 0)
    table = PreprocessingSection(landmarks=tuple(scale))
    same = [normalised(image, "nyul", table=table) for image in (one, other)]
    for image in same:
        np.testing.assert_allclose(landmarks_of(image, one != 0), scale, atol=0.02)
        assert not image[one == 0].any()
    assert np.abs(same[0] - same[1])[one != 0].mean() < 0.01
    ours, theirs = (normalised(image, "percentile") for image in (one, other))
    assert np.abs(ours - theirs)[one != 0].mean() > 0.02  # what the method is for
    assert not normalised(np.full((3, 3, 3), 7, np.float32), "nyul", table=table).any()


def test_window_of_hounsfield_units() -> None:
    values = np.array([-1000, 0, 20, 40, 80, 3000], np.float32).reshape(6, 1, 1)
    assert normalised(values, "window").ravel().tolist() == [0, 0, 0.25, 0.5, 1, 1]
    inside = values > 30
    table = PreprocessingSection(window=(-100.0, 100.0))
    found = normalised(values, "window", inside=inside, table=table).ravel()
    np.testing.assert_allclose(found, [0, 0, 0, 0.7, 0.9, 1])


def test_clipping_before_the_zscore() -> None:
    values = np.arange(1, 1001, dtype=np.float32).reshape(10, 10, 10)
    values[0, 0, 0], values[9, 9, 9] = -1e6, 1e6
    found = normalised(values, "zscore", table=PreprocessingSection(clip=(1.0, 99.0)))
    assert np.abs(found).max() < 2 and found.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(normalised(values, "zscore")).max() > 20


def test_cubic_images_and_smooth_masks() -> None:
    x = np.linspace(0, 3 * np.pi, 16)
    image = (np.sin(x)[:, None, None] * np.ones((16, 16, 16)) + 2).astype(np.float32)[None]
    fine = np.sin(np.linspace(0, 3 * np.pi, 31)) + 2
    errors = {}
    for how in ("linear", "cubic", "nearest"):
        moved = resample_image(image, (2, 2, 2), (1.0, 2.0, 2.0), how)
        assert moved.shape[1:] == (31, 16, 16) and moved.dtype == np.float32
        assert image.min() <= moved.min() and moved.max() <= image.max()
        errors[how] = float(np.abs(moved[0, 2:29, 8, 8] - fine[2:29]).mean())
    assert errors["cubic"] < errors["linear"] < errors["nearest"]
    empty = image.copy()
    empty[:, 8:] = 0
    assert (resample_image(empty, (2, 2, 2), (1.0, 2.0, 2.0), "cubic")[0, 18:] == 0).all()
    mask = ball(12, 4).astype(np.uint8) + ball(12, 2.5).astype(np.uint8)
    for how, worst in (("nearest", 0.35), ("linear", 0.2)):
        fine_mask = resample_mask(mask, (4, 4, 4), (1.0, 1.0, 1.0), how)
        assert set(np.unique(fine_mask)) == {0, 1, 2} and fine_mask.dtype == np.uint8
        inner = (fine_mask == 2).sum() / 64 / (mask == 2).sum()
        assert abs(inner - 1) < worst


def test_shared_places_change_no_bit() -> None:
    """Grids of any size against MONAI's own transform, one after the other, so that what is kept is used again."""
    rng = np.random.default_rng(0)
    for number in range(40):
        shape = tuple(int(n) for n in rng.integers(1, 14, 3))
        was = tuple(float(v) for v in rng.choice([0.5, 0.9375, 1.0, 1.5, 6.0], 3))
        spacing = tuple(float(v) for v in rng.choice([0.8, 1.0, 1.0005, 1.2, 2.0], 3))
        for channels, how in ((2, "linear"), (1, "nearest"), (1, "linear")):
            image = rng.normal(size=(channels, *shape)).astype(np.float32)
            found, expected = _moved(image, was, spacing, how), _moved_by_monai(image, was, spacing, how)
            assert found.shape == expected.shape and found.dtype == np.float32
            assert np.array_equal(found, expected), (number, shape, was, spacing, how)
    assert _places.cache_info().hits > 20
    forget_places()
    assert _places.cache_info().currsize == 0


def one_scan(root: Path, image: Any, mask: Any, *, modalities: tuple[str, ...] = ("FLAIR",), **data: Any) -> Scan:
    write_site(root, patients=1)
    write_nifti(image_path(root), image)
    write_nifti(mask_path(root), mask)
    study = make_study(data=data | {"modalities": list(modalities)}, evaluation={"heldout": [root.name]})
    return open_site(root, study).scans("sub-P001")[0]


def test_masking_cropping_and_the_label(tmp_path: Path) -> None:
    image, brain = phantom_head()
    lesion = ball(48, 5).astype(np.uint8)
    table = {"mask": "brain", "mask_radius": 2.0, "crop": "foreground", "crop_margin": 1}
    scan = one_scan(tmp_path / "HT", image, lesion, preprocessing=table)
    whole = one_scan(tmp_path / "HT2", image, lesion, preprocessing={"mask": "brain", "mask_radius": 2.0})
    assert scan.image.shape[1:] == scan.label.shape
    assert max(scan.label.shape) < 34 and whole.label.shape == (48, 48, 48)
    assert int(scan.label.sum()) == int(lesion.sum())
    inside = whole.image[0].numpy() != 0
    assert dice(inside, brain) > 0.97
    box = box_around(inside, 1)
    assert torch.equal(scan.image, whole.image[:, *box])
    with pytest.raises(DataError, match=r"labelled voxels lie outside of the foreground"):
        one_scan(tmp_path / "HT3", image, np.roll(lesion, 22, 0), preprocessing=table)


def test_a_supplied_mask(tmp_path: Path) -> None:
    image, brain = phantom_head()
    root = write_site(tmp_path / "HT", patients=1)
    write_nifti(image_path(root), image)
    write_nifti(mask_path(root), brain.astype(np.uint8))
    study = make_study(
        data={"normalise": "none", "preprocessing": {"mask": "supplied"}}, evaluation={"heldout": ["HT"]}
    )
    with pytest.raises(DataError, match=r"no mask sub-P001_label-brain_mask\.nii\.gz below derivatives"):
        open_site(root, study)
    path = mask_path(root, mask="label-brain_mask")
    write_nifti(path, np.zeros(brain.shape, np.uint8))
    with pytest.raises(DataError, match="empty mask; expected the brain"):
        open_site(root, study)
    write_nifti(path, brain.astype(np.uint8))
    first = open_site(root, study, cache=tmp_path / "cache").scans("sub-P001")[0]
    assert np.array_equal(first.image[0].numpy(), np.where(brain, image, 0))
    write_nifti(path, ball(48, 8).astype(np.uint8))  # another mask, another entry of the cache
    again = open_site(root, study, cache=tmp_path / "cache").scans("sub-P001")[0]
    assert int((again.image != 0).sum()) < int((first.image != 0).sum())


def test_a_missing_modality_is_zeros_through_all_steps(tmp_path: Path) -> None:
    image, _ = phantom_head(24)
    everything = {
        "missing_modality": "zero",
        "normalise": "window",
        "spacing": [1.5, 1.5, 1.5],
        "preprocessing": {
            "window": [-100.0, 200.0], "bias_correction": "n4", "n4_iterations": [5], "mask": "head",
            "image_interpolation": "cubic", "crop": "foreground",
        },
    }  # fmt: skip
    scan = one_scan(tmp_path / "HT", image, ball(24, 3).astype(np.uint8), modalities=("FLAIR", "T2w"), **everything)
    assert scan.image[0].max() > 0.5
    assert not scan.image[1].any()
    table = AugmentationSection(affine=1, elastic=1, low_resolution=1, bias=1, gamma=1, noise=1)
    for _ in range(5):
        changed, _ = augment(scan.image, None, "custom", np.random.default_rng(0), table)
        assert changed[0].any() and not changed[1].any()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("what", ["affine", "elastic", "low_resolution", "bias", "gamma", "noise"])
def test_each_augmentation_alone(what: str, dims: int) -> None:
    side = 32
    image = torch.from_numpy(np.where(ball(side, 10), 1.0 + np.arange(side) / side, 0).astype(np.float32))[None]
    label = torch.from_numpy(ball(side, 6).astype(np.int64))
    if dims == 2:
        image, label = image[..., side // 2], label[..., side // 2]
    values = dict.fromkeys(("flip", "affine", "elastic", "low_resolution", "bias", "gamma", "noise"), 0.0)
    table = AugmentationSection.model_validate(values | {what: 1.0, "elastic_voxels": 4.0})
    changed, moved = augment(image, label, "custom", np.random.default_rng(1), table)
    again, _ = augment(image, label, "custom", np.random.default_rng(1), table)
    assert moved is not None and changed.shape == image.shape and moved.dtype == torch.int64
    assert torch.equal(changed, again) and not torch.equal(changed, image)
    assert set(moved.flatten().tolist()) == {0, 1}
    if what in ("affine", "elastic"):
        assert not torch.equal(moved, label)
        assert bool((changed[0][moved == 1] > 0.5).all())  # the label lies inside the object, as before
    else:
        assert torch.equal(moved, label)
        assert not changed[image == 0].any()


def test_nothing_is_moved_further_than_was_said() -> None:
    places = torch.stack(torch.meshgrid(*(torch.arange(40.0),) * 2, indexing="ij"))
    move = RandElasticBSplined(["image"], voxels=3.0, modes=["bilinear"], prob=1.0)
    furthest = 0.0
    for seed in range(20):
        move.set_random_state(seed)
        moved = move({"image": places})["image"][:, 4:-4, 4:-4]
        furthest = max(furthest, float((moved - places[:, 4:-4, 4:-4]).abs().max()))
    assert 1.0 < furthest <= 3.0 + 1e-3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"normalise": "nyul"}, "0 numbers"),
        ({"normalise": "nyul", "preprocessing": {"landmarks": [0.5] * 11}}, "do not rise"),
        ({"preprocessing": {"landmarks": [float(n) for n in range(11)]}}, "they belong to"),
        ({"normalise": "none", "preprocessing": {"clip": [1.0, 99.0]}}, "clip belongs to"),
        ({"preprocessing": {"clip": [1.0]}}, "a smaller and a larger"),
        ({"preprocessing": {"window": [80.0, 0.0]}}, "a smaller and a larger"),
        ({"normalise": "window", "preprocessing": {"crop": "foreground"}}, "choose a mask"),
        ({"augment": "light", "augmentation": {"noise": 1.0}}, "the table belongs to"),
        ({"augment": "custom", "augmentation": {"gamma_range": [1.5, 0.5]}}, "a smaller and a larger"),
    ],
)
def test_contradictions_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make_study(data={"augment": "none"} | data)
