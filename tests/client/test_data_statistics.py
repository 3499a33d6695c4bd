# SPDX-License-Identifier: Apache-2.0
"""``data stats``: numbers by hand, and what of them may leave."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from fedneuro.client.cli_data import app
from fedneuro.client.data.register import register
from fedneuro.client.data.statistics import measure, release, summary
from fedneuro.privacy.data_statistics import Released, quantiles
from fedneuro.privacy.errors import BadInput, Refused
from tests.bids import image_path, make_study, mask_path, write_nifti, write_site


def site(root: Path, patients: int = 8) -> Path:
    """Patients 1 to n: a block of n voxels of 2×2×2 mm, label 2 in the first two; a brighter image each."""
    write_site(root, patients=patients, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    for number in range(1, patients + 1):
        patient = f"sub-P{number:03d}"
        mask = np.zeros((20, 18, 6), np.uint8)
        mask[:number, 0, 0] = 1
        mask[0, 1, 0] = 2 if number <= 2 else 0
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        write_nifti(mask_path(root, patient), mask, affine=affine)
        image = np.zeros((20, 18, 6), np.float32)
        image[5:15, 5:15, 1:5] = 100 * number + np.arange(4)
        write_nifti(image_path(root, patient), image, affine=affine)
    return root


def test_numbers_by_hand(tmp_path: Path) -> None:
    root = site(tmp_path / "HT")
    image_path(root, "sub-P008").write_bytes(b"broken")
    found = summary(measure(root))
    assert (found["patients"], found["sessions"]) == (8, 8)
    flair = found["modalities"]["FLAIR"]
    assert flair["patients"] == 7 and list(found["unreadable"]) == ["sub-P008_FLAIR.nii.gz"]
    assert flair["voxel_mm"][0]["p50"] == 2 and [axis["p50"] for axis in flair["extent_mm"]] == [40, 36, 12]
    # Grey values of the head: 100 n + 0…3, so the median over patients 1 to 7 of the medians is 401.5.
    assert flair["grey_values"]["p50"]["p50"] == 401.5
    one, two = (found["labels"]["label-lesion_mask"][value] for value in ("1", "2"))
    assert (one["patients"], two["patients"]) == (8, 2)
    assert one["volume_ml"]["p50"] == pytest.approx(4.5 * 0.008)
    assert one["share_of_voxels"]["p50"] == pytest.approx(4.5 / 2160, rel=1e-3)
    assert set(one["volume_ml"]) == {"p5", "p25", "p50", "p75", "p95"}


def test_what_is_released_hides_small_groups_and_extremes(tmp_path: Path) -> None:
    found = measure(site(tmp_path / "HT"))
    told = release(found, "HT", make_study())
    assert told.patients == 10 and told.modalities["FLAIR"].patients == 10  # rounded
    assert list(told.labels["label-lesion_mask"]) == ["1"]  # two patients have label 2
    volume = told.labels["label-lesion_mask"]["1"].volume_ml
    assert (volume.p5, volume.p25, volume.p95) == (None, None, None) and volume.p50 == 0.036
    assert "sub-" not in told.model_dump_json() and "HT_" not in told.model_dump_json()
    with pytest.raises(Refused, match="8 patients, and the threshold is 9"):
        release(found, "HT", None, 9)
    with pytest.raises(Refused, match="threshold is 20"):
        release(found, "HT", make_study(evaluation={"min_patients": 20}))
    with pytest.raises(BadInput, match="at least 5"):
        release(found, "HT", None, 4)
    private = make_study(privacy={"mode": "local"}, training={"local_steps": 1, "local_epochs": 0})
    with pytest.raises(Refused, match="would void what it promises"):
        release(found, "HT", private)


def test_percentiles_come_with_enough_patients() -> None:
    values = [float(v) for v in np.random.default_rng(0).normal(50, 10, 200)]
    for count, known in ((4, 0), (5, 1), (9, 1), (10, 3), (19, 3), (20, 5)):
        told = quantiles(values[:count], 5).model_dump(exclude_none=True)
        assert len(told) == known
        for name, value in told.items():
            exact = float(np.percentile(values[:count], int(name[1:])))
            assert value == float(f"{exact:.1e}")
    lowest = quantiles(values[:20], 5).p5
    assert lowest is not None and lowest > min(values[:20])


def test_a_file_with_a_small_group_or_anything_else_is_not_one(tmp_path: Path) -> None:
    values = json.loads(release(measure(site(tmp_path / "HT", 6)), "HT", None).model_dump_json())
    Released.model_validate_json(json.dumps(values))
    for change in (
        {"patients": 3}, {"patients": 7}, {"names": ["Doe"]}, {"threshold": 2}, {"site": "../HT"}, {"threshold": 20},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            Released.model_validate_json(json.dumps(values | change))


def test_the_command(tmp_path: Path) -> None:
    root, state = site(tmp_path / "HT"), tmp_path / "state"
    register(state, "glioma", root)
    common = ["stats", "glioma", "--state", str(state), "--json", str(tmp_path / "all.json")]
    result = CliRunner().invoke(app, [*common, "--release", str(tmp_path / "out.json"), "--site", "north"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "all.json").read_text())["patients"] == 8
    assert Released.model_validate_json((tmp_path / "out.json").read_text()).site == "north"
    assert "after you have read it" in result.output
