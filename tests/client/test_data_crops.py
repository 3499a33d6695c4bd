# SPDX-License-Identifier: Apache-2.0
"""Training crops: shapes, share of foreground, determinism, image and label together, patients apart."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedneuro.client.data import Crops, SiteData, open_site
from fedneuro.client.data import augment as augmenting
from fedneuro.client.data import crops as crops_module
from fedneuro.client.data.augment import augment
from fedneuro.privacy.errors import DataError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_data import AugmentationSection
from tests.bids import image_path, make_study, mask_path, write_nifti, write_site

THREE = {"dims": 3}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def opened(root: Path, **sections: Any) -> tuple[Crops, Study]:
    study = make_study(**sections | {"evaluation": {"heldout": [root.name]}})
    site = open_site(root, study)
    return Crops(site, site.patients, study), study


def rewritten(
    root: Path,
    patients: int,
    image: Callable[[int, NDArray[np.uint8]], NDArray[Any]],
    shape: tuple[int, ...] = (20, 18, 6),
) -> Path:
    """A site whose images are a function of the patient's number and mask."""
    write_site(root, patients=patients, shape=shape)
    for number in range(1, patients + 1):
        mask = np.zeros(shape, np.uint8)
        mask[2 : 8 + number, 3:9, 1:3] = 1
        write_nifti(mask_path(root, f"sub-P{number:03d}"), mask)
        write_nifti(image_path(root, f"sub-P{number:03d}"), image(number, mask).astype(np.float32))
    return root


@pytest.mark.parametrize("how", ["none", "light", "standard"])
@pytest.mark.parametrize(
    ("model", "patch"), [({}, [16, 16]), ({}, [32, 8]), (THREE, [16, 16, 8]), (THREE, [8, 8, 8])], ids=str
)
def test_shapes_and_types(model: dict[str, Any], patch: list[int], how: str, tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", modalities=("FLAIR", "T1w"))
    crops, _ = opened(root, model=model, data={"modalities": ["FLAIR", "T1w"], "patch": patch, "augment": how})
    for images, labels in (crops.batch(3, generator()), crops.of_patient("sub-P002", 3, generator())):
        assert images.shape == (3, 2, *patch)
        assert labels.shape == (3, *patch)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.isfinite().all()
        assert set(labels.flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize("how", ["none", "light", "standard"])
@pytest.mark.parametrize(("dims", "patch"), [(2, [16, 16]), (3, [16, 16, 8])])
def test_classification_gives_the_patients_class(dims: int, patch: list[int], how: str, tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", mask=None, classes=("glioma", "meningioma", "pituitary"))
    crops, _ = opened(
        root,
        task={"kind": "classification", "target": "kind", "labels": ["glioma", "meningioma", "pituitary"]},
        model={"name": "resnet", "norm": "group", "channels": [4, 8, 8, 8], "dims": dims},
        training={"loss": "cross_entropy"},
        data={"patch": patch, "augment": how},
    )
    for number, patient in enumerate(crops.patients):
        images, labels = crops.of_patient(patient, 2, generator())
        assert images.shape == (2, 1, *patch)
        assert labels.tolist() == [number % 3] * 2
        assert labels.dtype == torch.int64


def test_an_epoch_shows_every_patient_once(tmp_path: Path) -> None:
    root = rewritten(tmp_path / "HT", 7, lambda number, mask: np.full(mask.shape, number))
    crops, _ = opened(root, data={"normalise": "none"})
    batches = list(crops.epoch(3, generator()))
    assert [len(images) for images, _ in batches] == [3, 3, 1]
    seen = [int(image.max()) for images, _ in batches for image in images]
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]
    again = [int(image.max()) for images, _ in crops.epoch(3, generator(1)) for image in images]
    assert seen != again


@pytest.mark.parametrize("how", ["none", "light", "standard"])
@pytest.mark.parametrize("model", [{}, THREE], ids=["2d", "3d"])
def test_the_passed_generator_decides_everything(how: str, model: dict[str, Any], tmp_path: Path) -> None:
    patch = [8, 8, 8] if model else [8, 8]
    root = write_site(tmp_path / "HT")
    crops, study = opened(root, model=model, data={"patch": patch, "augment": how})
    np.random.seed(1)
    torch.manual_seed(1)
    first = crops.batch(6, generator(3))
    np.random.seed(2)
    state = torch.get_rng_state()
    crops.batch(5, generator(9))  # what was drawn before does not matter
    other = Crops(crops.data, crops.data.patients, study)
    second = other.batch(6, generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other.batch(6, generator(4))[0])


def test_bits_do_not_depend_on_what_memory_holds(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", sessions=("ses-1", "ses-2"))
    study = make_study(evaluation={"heldout": ["HT"]})
    roomy = open_site(root, study, cache=tmp_path / "cache")
    tight = open_site(root, study, cache=tmp_path / "cache")
    tight._memory.limit = 1
    a = Crops(roomy, roomy.patients, study).batch(12, generator())
    b = Crops(tight, tight.patients, study).batch(12, generator())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_slices_that_show_a_label(share: float, tmp_path: Path) -> None:
    """2 of 10 slices are labelled, so a uniform slice shows a label with 0.2: expected share + (1 - share) · 0.2."""
    root = rewritten(tmp_path / "HT", 2, lambda number, mask: mask * number, shape=(20, 18, 10))
    crops, _ = opened(root, data={"foreground": share, "patch": [32, 32]})
    draws = 1500
    _, labels = crops.batch(draws, generator())
    shown = float(labels.flatten(1).any(1).float().mean())
    expected = share + (1 - share) * 0.2
    assert abs(shown - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9


@pytest.mark.parametrize("model", [{}, THREE], ids=["2d", "3d"])
def test_small_patches_are_centred_on_labels(model: dict[str, Any], tmp_path: Path) -> None:
    """Every crop shows the label with foreground = 1; in uniform ones the label is often out of sight."""
    root = rewritten(tmp_path / "HT", 2, lambda number, mask: mask * number, shape=(60, 60, 20))
    patch = [8, 8, 8] if model else [8, 8]
    centred, _ = opened(root, model=model, data={"foreground": 1.0, "patch": patch})
    uniform, _ = opened(root, model=model, data={"foreground": 0.0, "patch": patch})
    assert centred.batch(60, generator())[1].flatten(1).any(1).all()
    assert uniform.batch(60, generator())[1].flatten(1).any(1).float().mean() < 0.5


def test_a_patient_without_label_gives_uniform_crops(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT")
    write_nifti(mask_path(root), np.zeros((20, 18, 6), np.uint8))
    for model, patch in (({}, [8, 8]), (THREE, [8, 8, 8])):
        crops, _ = opened(root, model=model, data={"empty_masks": "keep", "foreground": 1.0, "patch": patch})
        assert not crops.of_patient("sub-P001", 4, generator())[1].any()


def test_few_voxels_of_a_large_lesion_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops_module, "VOXELS_KEPT", 5)
    root = rewritten(tmp_path / "HT", 1, lambda number, mask: mask * number)
    crops, _ = opened(root, model=THREE, data={"patch": [8, 8, 8], "foreground": 1.0})
    assert crops.of_patient("sub-P001", 30, generator())[1].flatten(1).any(1).all()
    assert crops._foreground["sub-P001"][0].size == 5


@pytest.mark.parametrize(("axis", "plane"), [("sagittal", (18, 6)), ("coronal", (20, 6)), ("axial", (20, 18))])
def test_slices_lie_across_the_named_axis(axis: str, plane: tuple[int, int], tmp_path: Path) -> None:
    """The image holds its own coordinate along the axis, so every slice has one value; padding is 0 around it."""
    number = ["sagittal", "coronal", "axial"].index(axis)
    root = rewritten(tmp_path / "HT", 1, lambda _, mask: np.indices(mask.shape)[number] + 1)
    crops, _ = opened(root, data={"normalise": "none", "slice_axis": axis, "patch": [32, 32], "foreground": 0.0})
    images, _ = crops.of_patient("sub-P001", 20, generator())
    for image in images[:, 0]:
        assert len(set(image[image > 0].tolist())) == 1
        rows, columns = (image > 0).nonzero(as_tuple=True)
        top, left = (32 - plane[0]) // 2, (32 - plane[1]) // 2
        assert (int(rows.min()), int(rows.max())) == (top, top + plane[0] - 1)
        assert (int(columns.min()), int(columns.max())) == (left, left + plane[1] - 1)
    assert len(set(images.amax((1, 2, 3)).tolist())) > 1


def overlap(images: Tensor, labels: Tensor) -> float:
    """Dice of the bright and the labelled voxels."""
    bright, labelled = images[:, 0] > 50, labels > 0
    return float(2 * (bright & labelled).sum() / (bright.sum() + labelled.sum()))


@pytest.mark.parametrize("how", ["light", "standard"])
@pytest.mark.parametrize("model", [{}, THREE], ids=["2d", "3d"])
def test_image_and_label_move_together(how: str, model: dict[str, Any], tmp_path: Path) -> None:
    """The image is 100 where the mask is 1. After augmentation it still is, but for borders that gamma shifts;
    mirrored alone it is not."""
    root = rewritten(tmp_path / "HT", 3, lambda _, mask: mask * 100.0)
    patch = [16, 16, 8] if model else [16, 16]
    plain, _ = opened(root, model=model, data={"normalise": "none", "patch": patch, "foreground": 1.0})
    crops, _ = opened(root, model=model, data={"normalise": "none", "patch": patch, "foreground": 1.0, "augment": how})
    images, labels = crops.batch(40, generator())
    assert not torch.equal(labels, plain.batch(40, generator())[1])
    assert overlap(images, labels) > (0.92 if how == "standard" else 0.9999)
    assert overlap(images.flip(2), labels) < 0.85


def test_light_mirrors_each_axis_half_of_the_time() -> None:
    image = torch.arange(4.0).reshape(1, 2, 2)
    label = torch.arange(4).reshape(2, 2)
    rng, seen = generator(), []
    for _ in range(400):
        changed, moved = augment(image, label, "light", rng)
        assert moved is not None
        assert torch.equal(changed[0].long(), moved)
        seen.append(tuple(moved.flatten().tolist()))
    counts = [seen.count(kind) for kind in set(seen)]
    assert len(counts) == 4
    assert min(counts) > 60  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize("kind", ["standard", "custom"])
def test_a_chain_is_seeded_as_monai_seeds_it(kind: str) -> None:
    patch = (24, 24)
    table = AugmentationSection(affine=0.9, elastic=0.9, low_resolution=0.5, bias=0.9, gamma=0.5, noise=0.5)
    chains = (
        augmenting._standard(patch, True)
        if kind == "standard"
        else augmenting._custom(patch, True, cast("Hashable", table))
    )
    sample = {"image": torch.randn(1, *patch), "label": torch.ones(1, *patch)}
    for chain in chains:
        seen = set()
        for seed in (0, 5, 6, 7, 8, 2**32 - 1):
            expected: Any = chain._chain.set_random_state(seed)(dict(sample))
            found = augmenting._Seeded(chain._chain)(dict(sample), seed)
            assert torch.equal(found["image"], expected["image"])
            assert torch.equal(found["label"], expected["label"])
            seen.add(float(found["image"].sum()))
        assert len(seen) > 2


def test_standard_leaves_the_background_and_monai_as_they_were() -> None:
    from monai.data.meta_obj import get_track_meta

    image = torch.zeros(1, 16, 16)
    image[0, 4:12, 4:12] = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    tracked, rng, different = get_track_meta(), generator(), 0
    for _ in range(50):
        changed, _ = augment(image, None, "standard", rng)
        assert type(changed) is Tensor
        assert int((changed == 0).sum()) > 100
        different += not torch.equal(changed, image)
    assert different > 25
    assert get_track_meta() is tracked


@pytest.mark.parametrize("how", ["none", "light", "standard"])
def test_a_crop_holds_one_patient_alone(how: str, tmp_path: Path) -> None:
    """Patient n's voxels are 1000·n: no crop holds anything in between or of somebody else."""
    root = rewritten(tmp_path / "HT", 4, lambda number, mask: np.full(mask.shape, 1000.0 * number))
    crops, _ = opened(root, data={"normalise": "none", "patch": [16, 16], "augment": how})
    for number in range(1, 5):
        images, _ = crops.of_patient(f"sub-P{number:03d}", 12, generator(number))
        inside = images[:, :, 4:12, 4:12]
        assert ((inside - 1000.0 * number).abs() < 5).all()


@pytest.mark.parametrize("how", ["none", "standard"])
def test_crops_do_not_depend_on_the_other_patients(how: str, tmp_path: Path) -> None:
    small, _ = opened(write_site(tmp_path / "A", patients=2), data={"augment": how})
    large, _ = opened(write_site(tmp_path / "B", patients=6), data={"augment": how})
    large.batch(10, generator(5))
    for a, b in zip(
        small.of_patient("sub-P002", 5, generator()), large.of_patient("sub-P002", 5, generator()), strict=True
    ):
        assert torch.equal(a, b)


def test_all_scans_of_a_patient_are_drawn_from(tmp_path: Path) -> None:
    root = write_site(tmp_path / "HT", patients=2, sessions=("ses-1", "ses-2"))
    for session, value in (("ses-1", 1.0), ("ses-2", 2.0)):
        path = root / "sub-P001" / session / "anat" / f"sub-P001_{session}_FLAIR.nii.gz"
        write_nifti(path, np.full((20, 18, 6), value, np.float32))
    crops, _ = opened(root, data={"normalise": "none"})
    images, _ = crops.of_patient("sub-P001", 40, generator())
    share = float((images.amax((1, 2, 3)) == 1).float().mean())
    assert 0.2 < share < 0.8


def test_only_the_given_patients_are_drawn(tmp_path: Path) -> None:
    root = rewritten(tmp_path / "HT", 6, lambda number, mask: np.full(mask.shape, number))
    _, study = opened(root, data={"normalise": "none"})
    site = open_site(root, study)
    images, _ = Crops(site, ["sub-P002", "sub-P005"], study).batch(40, generator())
    assert set(images.amax((1, 2, 3)).tolist()) == {2.0, 5.0}


def test_no_patients_no_crops(tmp_path: Path) -> None:
    crops, study = opened(write_site(tmp_path / "HT"))
    with pytest.raises(DataError, match=r"HT: no training patients; .* lower evaluation\.validation_fraction"):
        Crops(crops.data, (), study)
    assert isinstance(crops.data, SiteData)
