# SPDX-License-Identifier: Apache-2.0
"""The data path on real scans: three hospitals' gliomas (LPS, no voxel size) and a hippocampus set (RAS, mm)."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from fedneuro.client.data import Crops, open_site
from fedneuro.privacy.errors import DataError
from tests.bids import make_study

pytestmark = pytest.mark.real


@pytest.mark.parametrize(("site", "patients"), [("CS", 12), ("DU", 34), ("HT", 25)])
def test_glioma_sites_open(site: str, patients: int, shared_data: Path, tmp_path: Path) -> None:
    study = make_study(data={"patch": [128, 128], "augment": "light"})
    cold = open_site(shared_data / "lgg" / site, study, cache=tmp_path)
    data = open_site(shared_data / "lgg" / site, study, cache=tmp_path)
    assert len(data.patients) == patients
    assert data.patients == cold.patients
    assert any(f"voxel size unknown for {patients} of {patients}" in text for text in data.warnings)
    for patient in data.patients:
        (scan,) = data.scans(patient)
        assert scan.spacing is None
        assert scan.image.shape[1:] == scan.label.shape
        assert scan.label.any()
        body = scan.image[scan.image != 0].double()
        assert abs(float(body.mean())) < 0.01
        assert float(body.std()) == pytest.approx(1, abs=0.01)
    images, labels = Crops(data, data.training(), study).batch(16, np.random.default_rng(0))
    assert images.shape == (16, 1, 128, 128)
    assert labels.any()


def test_glioma_is_stored_lps_and_served_ras(shared_data: Path) -> None:
    """Stored from right to left and front to back: the tensor is the array with both of these axes reversed."""
    study = make_study(data={"normalise": "none"})
    data = open_site(shared_data / "lgg" / "CS", study)
    patient = data.patients[0]
    stored: Any = nibabel.load(shared_data / "lgg" / "CS" / patient / "anat" / f"{patient}_FLAIR.nii.gz")
    assert nibabel.orientations.aff2axcodes(stored.affine) == ("L", "P", "S")  # type: ignore[no-untyped-call]
    array = np.asarray(stored.dataobj, dtype=np.float32)[::-1, ::-1].copy()
    assert torch.equal(data.scans(patient)[0].image[0], torch.from_numpy(array))


def test_really_missing_modalities(shared_data: Path) -> None:
    """T1w with gadolinium was not acquired in some patients of HT; T1w alone does not stand in for it."""
    wanted = {"modalities": ["FLAIR", "ce-gadolinium_T1w", "T1w"]}
    root = shared_data / "lgg" / "HT"
    everyone = {p.name for p in root.glob("sub-*")}
    with_contrast = {p for p in everyone if (root / p / "anat" / f"{p}_ce-gadolinium_T1w.nii.gz").exists()}
    without = {p for p in everyone if (root / p / "anat" / f"{p}_T1w.nii.gz").exists()}
    complete = with_contrast & without
    assert complete < everyone, "the data set changed: no modality is missing any more"
    with pytest.raises(DataError, match=r'HT: sub-\w+: no .*T1w image .* --set data\.missing_modality="exclude"'):
        open_site(root, make_study(data=wanted))
    excluding = open_site(root, make_study(data=wanted | {"missing_modality": "exclude"}))
    assert set(excluding.patients) == complete
    assert set(excluding.excluded) == everyone - complete
    filling = open_site(root, make_study(data=wanted | {"missing_modality": "zero"}))
    assert set(filling.patients) == everyone
    patient = sorted(everyone - with_contrast)[0]
    image = filling.scans(patient)[0].image
    assert not image[1].any()
    assert image[0].any()


def test_hippocampus_in_three_dimensions(shared_data: Path, tmp_path: Path) -> None:
    """Intensities from 1e2 to 1e6, uint8 and float32, float masks: all come out alike."""
    study = make_study(
        task={"labels": ["anterior", "posterior"], "mask": "dseg"},
        model={"dims": 3},
        data={"modalities": ["T1w"], "patch": [32, 32, 32], "foreground": 1.0, "normalise": "percentile"},
    )
    root = shared_data / "hippocampus"
    mask = next((root / "derivatives").glob("*/sub-*/anat/*.nii.gz")).name.split("_", 1)[1].removesuffix(".nii.gz")
    study = study.model_copy(update={"task": study.task.model_copy(update={"mask": mask})})
    site = open_site(root, study, cache=tmp_path)
    assert len(site.patients) == 208
    shares = len(site.validation()) / 208
    assert 0.1 < shares < 0.3
    images, labels = Crops(site, site.training(), study).batch(20, np.random.default_rng(0))
    assert images.shape == (20, 1, 32, 32, 32)
    assert set(labels.flatten().tolist()) == {0, 1, 2}
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert {scan.spacing for p in site.patients[:20] for scan in site.scans(p)} == {(1.0, 1.0, 1.0)}
