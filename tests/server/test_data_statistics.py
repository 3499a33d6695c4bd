# SPDX-License-Identifier: Apache-2.0
"""What hospitals told of their data sets, checked again at the coordinator and put side by side."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedneuro.privacy.data_statistics import Group, LabelGroup, Quantiles, Released
from fedneuro.privacy.errors import DataError
from fedneuro.server.cli import app
from fedneuro.server.data_statistics import beside_each_other, read_released


def told(site: str, patients: int) -> Released:
    axes = (Quantiles(p50=1.0), Quantiles(p50=1.0), Quantiles(p50=3.0))
    grey = Quantiles(p50=200.0)
    group = Group(patients=patients, grey_p5=grey, grey_p50=grey, grey_p95=grey, voxel_mm=axes, extent_mm=axes)
    label = LabelGroup(patients=patients, volume_ml=Quantiles(p50=12.0, p5=1.0, p95=80.0), share_of_voxels=Quantiles())
    return Released(
        site=site, threshold=5, patients=patients, modalities={"FLAIR": group},
        labels={"label-lesion_mask": {"1": label}},
    )  # fmt: skip


def write(folder: Path, site: str, patients: int) -> Path:
    path = folder / f"{site}.json"
    path.write_text(told(site, patients).model_dump_json(exclude_none=True))
    return path


def test_side_by_side(tmp_path: Path) -> None:
    files = [write(tmp_path, "north", 40), write(tmp_path, "south", 25)]
    result = CliRunner().invoke(app, ["data-stats", *map(str, files), "--json", str(tmp_path / "all.json")])
    assert result.exit_code == 0, result.output
    assert "65 patients (rounded) at 2 hospitals" in result.output
    assert "label-lesion_mask 1  north  40  12 mL  p5–p95 1–80 mL" in result.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["modalities"]["FLAIR"]["patients"] == 65
    assert found["labels"]["label-lesion_mask"]["1"]["sites"]["south"]["volume_ml"] == {"p5": 1, "p50": 12, "p95": 80}
    with pytest.raises(DataError, match="north: more than one file"):
        beside_each_other([told("north", 10), told("north", 15)])


def test_files_that_tell_too_much_or_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "north", 40)
    values = json.loads(path.read_text())
    for change in ({"patients": 3}, {"patient_ids": ["sub-1"]}, {"modalities": 1}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(DataError, match="not what a hospital may tell"):
            read_released(path)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(DataError, match="over 1 MiB"):
        read_released(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_released(tmp_path / "none.json")
