# SPDX-License-Identifier: Apache-2.0
"""A released model on a hospital's own scans: the study's own numbers, on each scan's own grid, or not at all."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedneuro.client.cli import app
from fedneuro.client.data import open_site
from fedneuro.client.data.nifti import read_volume
from fedneuro.client.data.preprocess import Prepared
from fedneuro.client.inference import class_probabilities, label_map, predicted_outcome
from fedneuro.client.original_grid import on_scan_grid, save_labels
from fedneuro.client.predict import predict
from fedneuro.models.metrics import dice
from fedneuro.models.networks import build_network
from fedneuro.models.state import load_arrays
from fedneuro.privacy.errors import BadInput, DataError, Refused
from fedneuro.privacy.release_pack import open_released
from fedneuro.privacy.study import Study
from tests.bids import make_study, write_nifti, write_site
from tests.finished_run import finished_run

_NIB: Any = nibabel
OBLIQUE = np.array([[-1.2, 0.1, 0.2, 90.0], [0.1, 1.1, 0.0, -70.0], [0.1, 0.0, 2.5, 3.0], [0, 0, 0, 1.0]])
"""Axes run left, front and up, a little turned: not the order and not the directions in which it is computed."""
PIR = np.array([[0.0, 0.0, 1.5, -40.0], [-1.0, 0.0, 0.0, 60.0], [0.0, -1.0, 0.0, 50.0], [0, 0, 0, 1.0]])
"""Sagittal slices, as many T1 scans are stored."""


@dataclass(frozen=True)
class Judge:
    study: Study
    network: torch.nn.Module
    device: torch.device


def judge(run: Path) -> Judge:
    released = open_released(run)
    study = released.study
    network = build_network(
        study.model, in_channels=len(study.data.modalities), out_channels=study.task.channels, seed=0
    )
    load_arrays(network, released.arrays)
    return Judge(study, network.eval(), torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = make_study(data={"modalities": ["FLAIR", "T1w"]}, evaluation={"heldout": ["west"]})
    return finished_run(tmp_path_factory.mktemp("run") / "out", study)


@pytest.mark.parametrize("affine", [OBLIQUE, PIR], ids=["oblique", "sagittal"])
def test_the_prediction_is_the_studys_own_on_the_scans_grid(tmp_path: Path, run: Path, affine: Any) -> None:
    data = write_site(
        tmp_path / "bids",
        patients=2,
        shape=(21, 19, 7),
        modalities=("FLAIR", "T1w"),
        affine=affine,
        sessions=("ses-1",),
    )
    lines: list[str] = []
    rows = predict(open_released(run), data, tmp_path / "out", compare=True, tell=lines.append)
    assert [line.split()[0] for line in lines] == ["1/2", "2/2"]
    ours, site = judge(run), open_site(data, open_released(run).study)
    for row, patient in zip(rows, site.patients, strict=True):
        scan = data / patient / "ses-1" / "anat" / f"{patient}_ses-1_FLAIR.nii.gz"
        image, found = _NIB.load(scan), _NIB.load(tmp_path / "out" / row.file)
        assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
        assert found.header["sform_code"] == image.header["sform_code"] and found.get_data_dtype() == np.uint8
        (prepared,) = site.scans(patient)
        with torch.inference_mode():
            expected = label_map(ours, prepared.image).numpy()
        canonical = np.asarray(_NIB.as_closest_canonical(found).dataobj)
        assert np.array_equal(canonical, expected) and 0 < expected.sum() < expected.size
        # The study's evaluation and a comparison on the scan's own grid are one number.
        assert row.dice == dice(expected, prepared.label.numpy(), ("lesion",))
        assert row.values["lesion"] == pytest.approx(
            expected.sum() * abs(np.linalg.det(affine[:3, :3])) / 1e3, rel=0.02
        )
    assert rows[-1].file == "sub-P002/ses-1/anat/sub-P002_ses-1_label-lesion_desc-predicted_mask.nii.gz"
    table = list(csv.DictReader((tmp_path / "out/predictions.tsv").open(), delimiter="\t"))
    assert [float(line["dice"]) for line in table] == pytest.approx([row.dice["dice"] for row in rows], abs=1e-5)
    made_by = json.loads((tmp_path / "out/dataset_description.json").read_text())["GeneratedBy"][0]
    assert made_by["StudyHash"] == ours.study.hash and "Not a medical device" in made_by["Description"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("affine", [OBLIQUE, PIR], ids=["oblique", "sagittal"])
def test_the_way_back_from_other_voxels_and_a_crop(tmp_path: Path, affine: Any) -> None:
    """A ball that is drawn in millimetres on the study's grid lies at the same millimetres on the scan's."""
    scan = write_nifti(tmp_path / "scan.nii.gz", np.zeros((40, 36, 18), np.float32), affine=affine)
    volume = read_volume(scan)
    assert volume.spacing is not None
    spacing, corner = (1.0, 1.0, 1.0), (3, 2, 1)
    # MONAI's grid begins where the scan's does, so a voxel of it lies at index × spacing.
    shape = [int((n - 1) * mm) for n, mm in zip(volume.data.shape, volume.spacing, strict=True)]
    index = np.stack(np.meshgrid(*(np.arange(c, n) for c, n in zip(corner, shape, strict=True)), indexing="ij"))
    centre = np.array(shape) / 2
    ball = (np.linalg.norm(index - centre[:, None, None, None], axis=0) < 9).astype(np.int64)
    prepared = Prepared(torch.zeros((1, *ball.shape)), None, spacing, True, corner=corner)
    back = on_scan_grid(ball, prepared, volume)
    assert back.shape == volume.data.shape
    own = np.stack(np.meshgrid(*(np.arange(n) for n in volume.data.shape), indexing="ij"))
    own = own * np.array(volume.spacing)[:, None, None, None]
    expected = np.linalg.norm(own - centre[:, None, None, None], axis=0) < 9
    assert dice(back, expected.astype(np.uint8), ("ball",))["dice"] > 0.93
    save_labels(tmp_path / "back.nii.gz", back, scan)
    saved = _NIB.load(tmp_path / "back.nii.gz")
    where = np.argwhere(np.asarray(saved.dataobj)).mean(0)
    canonical = _NIB.as_closest_canonical(_NIB.load(scan))
    wanted = canonical.affine @ [*(centre / np.array(volume.spacing)), 1]
    assert np.allclose((saved.affine @ [*where, 1])[:3], wanted[:3], atol=0.5)


def test_a_study_with_resampling_and_cropping(tmp_path: Path) -> None:
    """Whatever the study's grid, a prediction comes back to the place that it was made for."""
    study = make_study(
        data={"spacing": [1.0, 1.0, 2.0], "normalise": "percentile", "preprocessing": {"crop": "foreground"}},
        evaluation={"heldout": ["west"]},
    )
    run = finished_run(tmp_path / "run", study)
    data = write_site(tmp_path / "bids", patients=1, shape=(22, 20, 6), affine=OBLIQUE)
    (scan,) = data.glob("sub-*/anat/*.nii.gz")
    image = _NIB.load(scan)
    bright = np.asarray(image.dataobj).copy() + 100
    bright[:7], bright[:, 15:] = 0, 0  # what is 0 is cropped
    write_nifti(scan, bright, affine=OBLIQUE)
    (row,) = predict(open_released(run), data, tmp_path / "out", tell=lambda _: None)
    found = _NIB.load(tmp_path / "out" / row.file)
    labels = np.asarray(found.dataobj)
    assert found.shape == image.shape and np.array_equal(found.affine, image.affine)
    assert labels.sum() and not labels[:4].any() and not labels[:, 18:].any()


def test_classification(tmp_path: Path) -> None:
    study = make_study(
        task={"kind": "classification", "labels": ["a", "b"], "target": "kind"},
        data={"patch": [40, 40]},
        model={"name": "resnet", "channels": [4, 4, 4, 4], "norm": "group"},
        training={"loss": "cross_entropy"},
        evaluation={"heldout": ["west"]},
    )
    run = finished_run(tmp_path / "run", study)
    data = write_site(tmp_path / "bids", patients=2, shape=(33, 45, 3), mask=None, classes=("a", "b"))
    (data / "participants.tsv").rename(tmp_path / "not-needed.tsv")
    rows = predict(open_released(run), data, tmp_path / "out", tell=lambda _: None)
    (tmp_path / "not-needed.tsv").rename(data / "participants.tsv")
    site, ours = open_site(data, study), judge(run)
    for row, patient in zip(rows, site.patients, strict=True):
        with torch.inference_mode():
            expected = class_probabilities(ours, site.scans(patient)[0].image)
        assert list(row.values.values()) == pytest.approx(expected.tolist())
    header = (tmp_path / "out/predictions.tsv").read_text().splitlines()[0]
    assert header.split("\t") == ["scan", "file", "a", "b"]


@pytest.mark.parametrize(
    ("task", "loss", "words"),
    [
        ({"kind": "regression", "target": "score", "centre": 5.0, "scale": 2.0}, "huber", "mean error"),
        ({"kind": "survival", "target": "score", "event": "died", "time_cuts": [3.0, 9.0], "unit": "months"}, "hazard",
         "C-index"),
    ],
    ids=["regression", "survival"],
)  # fmt: skip
def test_an_outcome_is_predicted_and_compared_with_the_hospitals_own_table(
    tmp_path: Path, task: dict[str, Any], loss: str, words: str
) -> None:
    study = make_study(
        task=task,
        data={"patch": [40, 40]},
        model={"name": "resnet", "channels": [4, 4, 4, 4], "norm": "group"},
        training={"loss": loss},
        evaluation={"heldout": ["west"]},
    )
    run = finished_run(tmp_path / "run", study)
    data = write_site(tmp_path / "bids", patients=3, shape=(33, 45, 3), mask=None)
    table = data / "participants.tsv"
    table.write_text("participant_id\tscore\tdied\nsub-P001\t4\t1\nsub-P002\t8\t1\nsub-P003\tn/a\t0\n")
    command = ["predict", str(run), "--data", str(data), "--out", str(tmp_path / "out"), "--compare"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert words in done.stdout and "2 patients whose score is in participants.tsv" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out/predictions.tsv").open(), delimiter="\t"))
    ours = judge(run)
    table.write_text(table.read_text().replace("n/a", "1"))
    site = open_site(data, study)
    for row, patient in zip(rows, site.patients, strict=True):
        with torch.inference_mode():
            assert float(row["score"]) == pytest.approx(predicted_outcome(ours, site.scans(patient)[0].image), rel=1e-4)
    table.unlink()
    command[5] = str(tmp_path / "again")
    assert "nothing of your own to compare with" in CliRunner().invoke(app, command).stdout


def test_scans_without_the_models_sequences_are_refused_before_anything_is_written(tmp_path: Path, run: Path) -> None:
    data = write_site(tmp_path / "bids", patients=3, shape=(18, 18, 3), modalities=("FLAIR", "T1w"))
    for patient in ("sub-P001", "sub-P003"):
        (scan,) = (data / patient / "anat").glob("*_T1w.nii.gz")
        scan.rename(scan.with_name(f"{patient}_ce-gadolinium_T1w.nii.gz"))
    with pytest.raises(DataError, match=r"sub-P001: no T1w image.*trained with FLAIR, T1w") as raised:
        predict(open_released(run), data, tmp_path / "out")
    assert "sub-P003" in str(raised.value) and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(BadInput, match="not an empty folder"):
        predict(open_released(run), data, tmp_path / "out")


def test_what_was_not_signed_is_not_used(tmp_path: Path, run: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Refused, match="other weights"):
        open_released(changed)
    with pytest.raises(Refused, match="signed by key"):
        open_released(run, key="0" * 64)
    with pytest.raises(Refused, match="not finished"):
        open_released(finished_run(tmp_path / "half", make_study(evaluation={"heldout": ["west"]}), finish=False))
    with pytest.raises(BadInput, match="neither a release nor a run"):
        open_released(tmp_path)


def test_the_command(tmp_path: Path, run: Path) -> None:
    data = write_site(tmp_path / "bids", patients=1, shape=(18, 18, 3), modalities=("FLAIR", "T1w"))

    words = ["predict", str(run), "--data", str(data), "--out", str(tmp_path / "out")]
    command = [str(Path(sys.executable).parent / "fedneuro-node"), *words, "--key", "0" * 64]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 3 and "signed by key" in refused.stderr and not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*words, "--compare"])
    assert done.exit_code == 0, done.output
    assert "mean Dice" in done.stdout and "Predictions stay on this machine" in done.stdout
