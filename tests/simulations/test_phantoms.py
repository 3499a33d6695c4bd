# SPDX-License-Identifier: Apache-2.0
"""Phantom hospitals: valid BIDS, reproducible byte for byte, and heads that look like MRI in numbers."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedneuro.privacy.errors import BadInput, EnvironmentProblem, StateError
from fedneuro.simulations.phantoms import SiteStyle, style_of, write_federation, write_site
from fedneuro.simulations.phantoms.anatomy import Grid, draw_anatomy, smooth_field
from fedneuro.simulations.phantoms.style import LEVELS, generator_of

NIB: Any = nibabel  # typed in part only
SITES = {"alder": 3, "birch": 2}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("federation")
    write_federation(out, sites=SITES, seed=5)
    return out


def _bytes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _load(path: Path) -> tuple[Any, NDArray[np.float64]]:
    image = NIB.as_closest_canonical(NIB.load(path))
    return image, np.asarray(image.dataobj, np.float64)


def _scans(site: Path) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """FLAIR and mask of each patient of a site, in RAS order."""
    found = []
    for path in sorted(site.glob("sub-*/anat/*_FLAIR.nii.gz")):
        subject = path.parent.parent.name
        mask = site / "derivatives" / "manual" / subject / "anat" / f"{subject}_label-lesion_mask.nii.gz"
        found.append((_load(path)[1], _load(mask)[1] > 0))
    return found


def test_a_site_is_a_bids_data_set(federation: Path) -> None:
    site = federation / "alder"
    for folder, kind in ((site, "raw"), (site / "derivatives" / "manual", "derivative")):
        description = json.loads((folder / "dataset_description.json").read_text())
        assert description["DatasetType"] == kind
        assert description["GeneratedBy"][0]["Name"]
        assert description["BIDSVersion"]
    with (site / "participants.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["participant_id"] for row in rows] == ["sub-001", "sub-002", "sub-003"]
    assert sorted(p.name for p in site.glob("sub-*")) == [row["participant_id"] for row in rows]
    assert all(19 <= int(row["age"]) <= 89 and row["sex"] in "FM" and row["scanner"] for row in rows)
    assert set(json.loads((site / "participants.json").read_text())) == set(rows[0]) - {"participant_id"}


def test_scan_and_mask_share_a_grid_in_mm(federation: Path) -> None:
    for path in federation.glob("*/sub-*/anat/*.nii.gz"):
        subject, site = path.parent.parent.name, path.parents[2]
        mask_path = site / "derivatives" / "manual" / subject / "anat" / f"{subject}_label-lesion_mask.nii.gz"
        raw, mask = (NIB.load(file) for file in (path, mask_path))
        assert raw.shape == mask.shape and len(raw.shape) == 3
        np.testing.assert_allclose(raw.affine, mask.affine)
        assert raw.header.get_xyzt_units()[0] == "mm"
        assert int(raw.header["sform_code"]) == 1 and int(raw.header["qform_code"]) == 1


def test_every_patient_has_a_lesion_inside_the_head_that_is_brighter_than_the_brain(federation: Path) -> None:
    for site in SITES:
        voxel_ml = float(np.prod(style_of(site, 5).voxel_mm)) / 1000
        for flair, mask in _scans(federation / site):
            assert mask.sum() * voxel_ml >= 1.5
            assert np.all(flair[mask] > 0)
            head = flair[flair > 0]
            z = (flair - head.mean()) / head.std()
            assert z[mask].mean() > 1.5 > z[(flair > 0) & ~mask].mean() + 1
            assert np.all(flair[[0, -1]] == 0) and np.all(flair[:, [0, -1]] == 0)
            assert 0.2 < (flair > 0).mean() < 0.6


def test_bytes_depend_on_seed_site_and_patient_only(federation: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "alone", name="birch", patients=2, seed=5)
    assert _bytes(tmp_path / "alone") == _bytes(federation / "birch")
    write_federation(tmp_path / "pool", sites={"birch": 2, "cedar": 1}, seed=5, workers=2)
    assert _bytes(tmp_path / "pool" / "birch") == _bytes(federation / "birch")
    scan = Path("sub-001") / "anat" / "sub-001_FLAIR.nii.gz"
    write_site(tmp_path / "other", name="birch", patients=1, seed=6)
    assert (tmp_path / "other" / scan).read_bytes() != (federation / "birch" / scan).read_bytes()


def test_a_patient_does_not_depend_on_the_number_of_patients_or_modalities(federation: Path, tmp_path: Path) -> None:
    write_site(tmp_path / "one", name="birch", patients=1, seed=5, modalities=("FLAIR",))
    scan = Path("sub-001") / "anat" / "sub-001_FLAIR.nii.gz"
    assert (tmp_path / "one" / scan).read_bytes() == (federation / "birch" / scan).read_bytes()


@pytest.mark.parametrize("orientation", ["LPS", "LIA"])
def test_storage_orientation_changes_the_array_not_the_anatomy(tmp_path: Path, orientation: str) -> None:
    for name in ("RAS", orientation):
        style = SiteStyle(scanner="x", levels=style_of("alder", 0).levels, orientation=name, voxel_mm=(3.0, 3.0, 4.0))
        write_site(tmp_path / name, name="alder", patients=1, seed=0, style=style)
    scan = Path("sub-001") / "anat" / "sub-001_T1w.nii.gz"
    plain, turned = _load(tmp_path / "RAS" / scan), _load(tmp_path / orientation / scan)
    np.testing.assert_array_equal(plain[1], turned[1])
    np.testing.assert_allclose(plain[0].affine, turned[0].affine, atol=1e-4)
    stored = NIB.load(tmp_path / orientation / scan)
    assert "".join(NIB.aff2axcodes(stored.affine)) == orientation


def test_a_site_can_lack_t1w_of_some_patients_but_never_the_first_modality(tmp_path: Path) -> None:
    style = SiteStyle(scanner="x", levels=style_of("alder", 0).levels, missing=0.5, voxel_mm=(6.0, 6.0, 6.0))
    write_site(tmp_path / "site", name="alder", patients=8, seed=0, style=style)
    assert len(list(tmp_path.rglob("*_FLAIR.nii.gz"))) == 8
    assert 0 < len(list(tmp_path.rglob("*_T1w.nii.gz"))) < 8


def test_tissue_contrast_is_that_of_the_modality(tmp_path: Path) -> None:
    """FLAIR: grey above white matter, fluid darkest. T1w: white above grey, fluid darkest."""
    grid = Grid.covering_head((3.0, 3.0, 3.0))
    anatomy = draw_anatomy(generator_of("patient", 0, "alder", 1), grid, age=50)
    total = anatomy.tissue.sum(0)
    assert total.max() <= 1 + 1e-5 and anatomy.tissue.min() >= 0
    litres = {name: float(anatomy.fraction(name).sum()) * 27e-6 for name in ("gm", "wm", "csf")}
    assert 0.6 < litres["gm"] < 1.3 and 0.35 < litres["wm"] < 0.8 and litres["csf"] < 0.7
    style = SiteStyle(scanner="x", levels=style_of("alder", 0).levels, bias=0.0, noise=0.0, float_storage=True)
    write_site(tmp_path / "site", name="alder", patients=1, seed=0, style=style)
    age = int((tmp_path / "site" / "participants.tsv").read_text().splitlines()[1].split("\t")[1])
    anatomy = draw_anatomy(generator_of("patient", 0, "alder", 1), grid, age=age)
    lesion = _scans(tmp_path / "site")[0][1]
    for modality in ("FLAIR", "T1w"):
        values = _load(tmp_path / "site" / "sub-001" / "anat" / f"sub-001_{modality}.nii.gz")[1]
        csf, gm, wm = (float(np.median(values[(anatomy.fraction(n) > 0.8) & ~lesion])) for n in ("csf", "gm", "wm"))
        assert csf < min(gm, wm)
        assert (gm > wm) == (modality == "FLAIR")


def test_age_widens_the_ventricles() -> None:
    def ventricles_ml(age: float) -> float:
        grid = Grid.covering_head((3.0, 3.0, 3.0))
        anatomy = draw_anatomy(generator_of("v"), grid, age=age)
        x, y, z = (axis + middle for axis, middle in zip(grid.axes_mm(), (0.0, -18.0, 14.0), strict=True))
        inner = (np.abs(x) < 28) & (np.abs(y + 12) < 36) & (np.abs(z - 14) < 15)
        return float(anatomy.fraction("csf")[inner].sum()) * 0.027

    assert ventricles_ml(85) > 1.2 * ventricles_ml(40)


def test_smooth_fields_have_unit_variance_and_are_smooth() -> None:
    grid = Grid(shape=(48, 48, 48), voxel_mm=(3.0, 3.0, 3.0))
    field = smooth_field(np.random.default_rng(0), grid, 9.0, 4)
    assert field.shape == (4, 48, 48, 48) and field.dtype == np.float32
    assert field.std() == pytest.approx(1.0, abs=0.05)
    assert np.abs(np.diff(field, axis=1)).mean() < 0.4  # white noise: 1.13
    assert abs(np.corrcoef(field[0].ravel(), field[1].ravel())[0, 1]) < 0.05


def test_styles_are_reproducible_in_range_and_differ() -> None:
    styles = [style_of(name, 1) for name in "abcdefghijkl"]
    assert style_of("a", 1) == styles[0] != style_of("a", 2)
    assert len({style.intensity for style in styles}) > 6
    assert len({style.orientation for style in styles}) > 1
    assert len({style.scanner for style in styles}) > 2
    for style in styles:
        for modality, table in LEVELS.items():
            for tissue, (low, high) in table.items():
                assert low <= style.levels[modality][tissue] <= high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "site name"),
        ({"patients": 0}, "0 patients"),
        ({"modalities": ("FLAIR", "CT")}, "FLAIR, T1w, T2w"),
        ({"modalities": ()}, "modalities"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        write_site(tmp_path / "site", **{"name": "alder", "patients": 1, "seed": 0, **change})
    assert not (tmp_path / "site").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "alder").mkdir()
    (tmp_path / "alder" / "thesis.txt").write_text("mine")
    with pytest.raises(StateError, match="alder exists and is not an empty folder"):
        write_federation(tmp_path, sites={"alder": 1}, seed=0)
    assert [p.name for p in (tmp_path / "alder").iterdir()] == ["thesis.txt"]


def test_a_disk_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write below"):
        write_site(tmp_path / "file" / "site", name="alder", patients=1, seed=0)


def test_progress_counts_patients(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_federation(
        tmp_path, sites={"alder": 2}, seed=0, resolution_mm=6.0, progress=lambda *event: seen.append(event)
    )
    assert seen == [("alder", 1, 2), ("alder", 2, 2)]
