# SPDX-License-Identifier: Apache-2.0
"""From file to tensor: orientation, voxel size, resampling, intensities."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedneuro.client.data import Scan, open_site
from fedneuro.client.data.preprocess import normalised
from fedneuro.privacy.errors import DataError
from tests.bids import RAS, image_path, make_study, mask_path, write_nifti, write_site

# The same brain, as four scanners would store it: axes of the array (0 x, 1 y, 2 z), each with its direction.
STORED = {
    "LPS": ((0, -1), (1, -1), (2, 1)),
    "RAS": ((0, 1), (1, 1), (2, 1)),
    "ASL": ((1, 1), (2, 1), (0, -1)),
    "SRP": ((2, 1), (0, 1), (1, -1)),
}


def stored_as(data: np.ndarray[Any, Any], axes: tuple[tuple[int, int], ...]) -> tuple[np.ndarray[Any, Any], Any]:
    """``data`` (RAS, 1×2×3 mm) re-ordered and flipped, and the affine that puts every voxel where it was."""
    size = np.array([1.0, 2.0, 3.0])
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    turned = data.transpose([a for a, _ in axes])
    for column, (axis, direction) in enumerate(axes):
        affine[axis, column] = direction * size[axis]
        if direction < 0:
            turned = np.flip(turned, column)
            affine[axis, 3] += (data.shape[axis] - 1) * size[axis]
    return turned, affine


def one_scan(root: Path, image: Any, mask: Any, affine: Any = RAS, units: str = "mm", **data: Any) -> Scan:
    write_site(root, patients=1)
    write_nifti(image_path(root), image, affine=affine, units=units)
    write_nifti(mask_path(root), mask, affine=affine, units=units)
    study = make_study(data=data, evaluation={"heldout": [root.name]})
    return open_site(root, study).scans("sub-P001")[0]


@pytest.mark.parametrize("code", STORED)
def test_the_stored_orientation_does_not_matter(code: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(9, 8, 7)).astype(np.float32)
    mask = (image > 1).astype(np.uint8)
    turned, affine = stored_as(image, STORED[code])
    scan = one_scan(tmp_path / "HT", turned, stored_as(mask, STORED[code])[0], affine, normalise="none")
    assert torch.equal(scan.image[0], torch.from_numpy(image))
    assert torch.equal(scan.label, torch.from_numpy(mask).long())
    assert scan.spacing == pytest.approx((1, 2, 3))


def test_image_and_mask_may_be_stored_differently(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    root = write_site(tmp_path / "HT", patients=1)
    for path, data, code in ((image_path(root), image, "ASL"), (mask_path(root), (image > 1).astype(np.uint8), "LPS")):
        turned, affine = stored_as(data, STORED[code])
        write_nifti(path, turned, affine=affine)
    scan = open_site(root, make_study(data={"normalise": "none"}, evaluation={"heldout": ["HT"]})).scans("sub-P001")[0]
    assert torch.equal(scan.label.bool(), scan.image[0] > 1)


@pytest.mark.parametrize(("units", "factor"), [("mm", 1.0), ("unknown", None), ("meter", 1000.0), ("micron", 0.001)])
def test_voxel_size_is_known_only_with_a_unit(units: str, factor: float | None, tmp_path: Path) -> None:
    mask = np.ones((6, 6, 6), np.uint8)
    scan = one_scan(tmp_path / "HT", mask.astype(np.float32), mask, np.diag([0.5, 0.5, 4, 1]), units)
    assert scan.spacing == (None if factor is None else pytest.approx((0.5 * factor, 0.5 * factor, 4 * factor)))


def test_oblique_scans_keep_their_voxel_size(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, :3] *= [0.9, 0.9, 3.0]
    mask = np.ones((6, 6, 6), np.uint8)
    scan = one_scan(tmp_path / "HT", mask.astype(np.float32), mask, affine)
    assert scan.spacing == pytest.approx((0.9, 0.9, 3.0))


def test_resampling_keeps_image_and_mask_together(tmp_path: Path) -> None:
    mask = np.zeros((20, 20, 10), np.uint8)
    mask[5:15, 5:15, 3:7] = 1
    scan = one_scan(
        tmp_path / "HT",
        100.0 * mask.astype(np.float32),
        mask,
        np.diag([1, 1, 2, 1]),
        spacing=[2.0, 2.0, 2.0],
        normalise="none",
    )
    assert scan.image.shape == (1, 10, 10, 10)
    assert scan.label.shape == (10, 10, 10)
    assert scan.spacing == (2.0, 2.0, 2.0)
    assert set(scan.label.flatten().tolist()) == {0, 1}
    agree = ((scan.image[0] > 50) == scan.label.bool()).float().mean()
    assert agree > 0.97
    # The block was 10×10×8 mm; the nearest voxel of 2 mm misses its faces by half a voxel at most.
    assert 4 * 4 * 4 <= int(scan.label.sum()) <= 6 * 6 * 4


def test_absurd_voxel_sizes_are_refused_before_memory_is_gone(tmp_path: Path) -> None:
    mask = np.ones((20, 20, 10), np.uint8)
    with pytest.raises(DataError, match="correct the header's voxel size or unit"):
        one_scan(tmp_path / "HT", mask.astype(np.float32), mask, units="meter", spacing=[1.0, 1.0, 1.0])


def test_2d_images_are_volumes_of_one_slice(tmp_path: Path) -> None:
    classes = ("glioma", "meningioma")
    root = write_site(tmp_path / "HT", patients=6, shape=(20, 18), mask=None, classes=classes)
    write_nifti(image_path(root), np.ones((20, 18, 1), np.uint8))
    site = open_site(
        root,
        make_study(
            task={"kind": "classification", "target": "kind", "labels": list(classes)},
            model={"name": "resnet", "norm": "group", "channels": [4, 8, 8, 8]},
            training={"loss": "cross_entropy"},
        ),
    )
    scans = [site.scans(p)[0] for p in site.patients]
    assert {tuple(s.image.shape) for s in scans} == {(1, 20, 18, 1)}
    assert [int(s.label) for s in scans] == [0, 1, 0, 1, 0, 1]
    assert scans[0].label.dtype == torch.int64
    assert scans[0].label.shape == ()


def test_scale_factors_of_the_header_are_applied(tmp_path: Path) -> None:
    import nibabel

    root = write_site(tmp_path / "HT", patients=1)
    image = nibabel.nifti1.Nifti1Image(np.arange(27, dtype=np.int16).reshape(3, 3, 3), RAS)  # type: ignore[no-untyped-call]
    image.header.set_slope_inter(2.0, -5.0)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    nibabel.save(image, image_path(root))
    write_nifti(mask_path(root), np.ones((3, 3, 3), np.uint8))
    site = open_site(root, make_study(data={"normalise": "none"}, evaluation={"heldout": ["HT"]}))
    stored = np.asarray(nibabel.load(image_path(root)).dataobj)  # type: ignore[attr-defined]
    np.testing.assert_allclose(site.scans("sub-P001")[0].image[0].numpy(), stored, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e6])
def test_zscore_over_the_voxels_that_are_not_zero(dtype: type, scale: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(1, 200, size=(10, 10, 10)).astype(dtype).astype(np.float32) * np.float32(scale)
    values[:3] = 0
    result = normalised(values, "zscore")
    body = result[3:].astype(np.float64)
    assert body.mean() == pytest.approx(0, abs=1e-6)
    assert body.std() == pytest.approx(1, abs=1e-6)
    assert not result[:3].any()


def test_percentiles_map_to_zero_and_one() -> None:
    values = np.arange(1001, dtype=np.float32).reshape(1001, 1, 1)
    result = normalised(values, "percentile").ravel()
    assert result[10] == 0
    assert result[990] == 1
    assert result[500] == pytest.approx(0.5)
    assert (result.min(), result.max()) == (0, 1)


def test_percentile_of_an_image_that_is_nearly_all_zero() -> None:
    values = np.zeros((20, 20, 20), np.float32)
    values[0, 0, 0] = 4
    assert normalised(values, "percentile").max() == 1


@pytest.mark.parametrize("how", ["zscore", "percentile"])
@pytest.mark.parametrize("value", [0.0, 7.0, -3e5])
def test_constant_images_become_zeros(how: str, value: float) -> None:
    assert not normalised(np.full((4, 4, 4), value, np.float32), how).any()


@given(
    values=arrays(np.float32, (3, 4, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    how=st.sampled_from(["zscore", "percentile"]),
)
def test_normalised_values_are_always_finite(values: np.ndarray[Any, np.dtype[np.float32]], how: str) -> None:
    assert np.isfinite(normalised(values, how)).all()


def test_none_leaves_intensities_as_stored(tmp_path: Path) -> None:
    image = np.random.default_rng(0).uniform(-1000, 3000, (6, 6, 6)).astype(np.float32)
    scan = one_scan(tmp_path / "HT", image, np.ones((6, 6, 6), np.uint8), normalise="none")
    assert torch.equal(scan.image[0], torch.from_numpy(image))
