# SPDX-License-Identifier: Apache-2.0
"""Simulated sites from public data: no block or patient is cut, every class is everywhere, nothing is overwritten."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedneuro.client.data import open_site
from fedneuro.privacy.errors import BadInput, DataError, StateError
from fedneuro.privacy.study import Study
from fedneuro.simulations.importers import import_tumour_jpg, split_site
from tests.bids import make_study, write_site

KINDS = ("glioma", "meningioma", "pituitary")


def tumour_study(**data: object) -> Study:
    return make_study(
        task={"kind": "classification", "target": "tumour_type", "labels": list(KINDS)},
        model={"name": "resnet", "norm": "group", "channels": [4, 8, 8, 8]},
        training={"loss": "cross_entropy"},
        data={"modalities": ["T1w"], **data},
    )


def write_jpgs(root: Path, blocks_per_class: int = 3, slices: int = 2) -> Path:
    rows, number = [], 0
    for block in range(3 * blocks_per_class):
        kind = KINDS[block % 3]
        for _ in range(slices):
            number += 1
            path = root / kind / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = np.zeros((64, 64), np.uint8)
            picture[:16, :32] = 200  # top left
            picture[40:, 40:] = 3 * block
            Image.fromarray(picture).save(path, quality=95)
            rows.append({"mat_index": number, "class_name": kind, "file": f"{kind}/{path.name}", "block": block})
    with (root / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_every_site_has_every_class_and_no_block_is_cut(tmp_path: Path) -> None:
    counts = import_tumour_jpg(write_jpgs(tmp_path / "jpg"), tmp_path / "out", sites=2, size=32)
    assert counts == {"sim-1": 5, "sim-2": 4}
    seen: list[str] = []
    for name in counts:
        study = tumour_study(missing_modality="refuse")
        held_out = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"heldout": (name,)})})
        site = open_site(tmp_path / "out" / name, held_out)
        assert set(site.classes.values()) == {0, 1, 2}
        for patient in site.patients:
            assert site.classes[patient] == int(patient.removeprefix("sub-block")) % 3
            assert [s.name for s in site.scans(patient)] == [f"{patient}_run-01", f"{patient}_run-02"]
            assert site.scans(patient)[0].image.shape == (1, 32, 32, 1)
            assert site.scans(patient)[0].spacing is None
        seen += site.patients
        assert "simulated" in json.loads((tmp_path / "out" / name / "dataset_description.json").read_text())["Name"]
    assert sorted(seen) == [f"sub-block{i:03d}" for i in range(9)]


def test_the_picture_stands_upright(tmp_path: Path) -> None:
    """Top left of the picture is the patient's right front: high y and high x in RAS+."""
    import_tumour_jpg(write_jpgs(tmp_path / "jpg"), tmp_path / "out", sites=1, size=64)
    study = tumour_study(normalise="none")
    scan = open_site(tmp_path / "out" / "sim-1", study).scans("sub-block000")[0]
    bright = (scan.image[0, :, :, 0] > 150).nonzero()
    assert bright.min(0).values.tolist() == [32, 48]
    assert bright.max(0).values.tolist() == [63, 63]


def test_imports_are_the_same_every_time(tmp_path: Path) -> None:
    source = write_jpgs(tmp_path / "jpg")
    for out in ("a", "b"):
        import_tumour_jpg(source, tmp_path / out, sites=3, size=16)
    first = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.nii.gz"))
    assert first == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.nii.gz"))
    study = tumour_study()
    pairs = [open_site(tmp_path / out / "sim-1", study, site="x") for out in ("a", "b")]
    patient = pairs[0].patients[0]
    assert torch.equal(pairs[0].scans(patient)[0].image, pairs[1].scans(patient)[0].image)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    source = write_jpgs(tmp_path / "jpg")
    with pytest.raises(BadInput, match="sites = 4; expected 1 to 3"):
        import_tumour_jpg(source, tmp_path / "out", sites=4)
    with pytest.raises(BadInput, match="size = 512"):
        import_tumour_jpg(source, tmp_path / "out", size=512)
    with pytest.raises(DataError, match=r"index\.csv: cannot be read"):
        import_tumour_jpg(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    import_tumour_jpg(source, tmp_path / "out", sites=2, size=16)
    with pytest.raises(StateError, match=r"sim-1 exists; expected a new folder"):
        import_tumour_jpg(source, tmp_path / "out", sites=2, size=16)
    (source / "glioma" / "0001.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0001\.jpg: cannot be read"):
        import_tumour_jpg(source, tmp_path / "other", sites=1, size=16)


def test_a_split_keeps_patients_whole_and_links_their_files(tmp_path: Path) -> None:
    source = write_site(tmp_path / "all", patients=30, shape=(8, 8, 4), sessions=("ses-1", "ses-2"))
    counts = split_site(source, tmp_path / "out", 3)
    assert sum(counts.values()) == 30
    assert set(counts) == {"sim-1", "sim-2", "sim-3"}
    study = make_study(data={"patch": [8, 8]})
    whole = open_site(source, study)
    seen: list[str] = []
    for name, size in counts.items():
        site = open_site(tmp_path / "out" / name, study)
        assert len(site.patients) == size
        assert not [text for text in site.warnings if "participants.tsv" in text]
        assert (tmp_path / "out" / name / site.patients[0]).is_symlink()
        for patient in site.patients[:2]:
            for a, b in zip(site.scans(patient), whole.scans(patient), strict=True):
                assert torch.equal(a.image, b.image)
                assert torch.equal(a.label, b.label)
        seen += site.patients
    assert sorted(seen) == list(whole.patients)


def test_a_split_is_stable_and_depends_on_its_key(tmp_path: Path) -> None:
    write_site(tmp_path / "all", patients=20, shape=(8, 8, 4))
    split_site(tmp_path / "all", tmp_path / "first", 2)
    split_site(tmp_path / "all", tmp_path / "keyed", 2, key="other")
    write_site(tmp_path / "all", patients=25, shape=(8, 8, 4))
    split_site(tmp_path / "all", tmp_path / "second", 2)

    def folders(out: str, site: str) -> set[str]:
        return {p.name for p in (tmp_path / out / site).glob("sub-*")}

    for site in ("sim-1", "sim-2"):
        assert folders("first", site) < folders("second", site) or folders("first", site) == folders("second", site)
        assert folders("first", site) != folders("keyed", site)


def test_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("symbolic links are not allowed here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    source = write_site(tmp_path / "all", patients=8, shape=(8, 8, 4))
    for site, size in split_site(source, tmp_path / "out", 2).items():
        assert len(list((tmp_path / "out" / site).glob("sub-*/anat/*.nii.gz"))) == size
        assert not [p for p in (tmp_path / "out" / site).rglob("*") if p.is_symlink()]


def test_a_split_that_would_leave_a_site_empty_is_refused(tmp_path: Path) -> None:
    source = write_site(tmp_path / "all", patients=2, shape=(8, 8, 4))
    with pytest.raises(DataError, match="leave one of 5 sites empty"):
        split_site(source, tmp_path / "out", 5)


@pytest.mark.real
def test_the_real_slices(shared_data: Path, tmp_path: Path) -> None:
    counts = import_tumour_jpg(shared_data / "brain_tumour_jpg", tmp_path, size=16)
    assert counts == {"sim-1": 15, "sim-2": 14, "sim-3": 14, "sim-4": 14}
    assert len(list(tmp_path.glob("sim-*/sub-*/anat/*_T1w.nii.gz"))) == 1175
    for name in counts:
        with (tmp_path / name / "participants.tsv").open() as file:
            assert {row["tumour_type"] for row in csv.DictReader(file, delimiter="\t")} == set(KINDS)
