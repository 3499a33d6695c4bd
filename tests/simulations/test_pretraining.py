# SPDX-License-Identifier: Apache-2.0
"""Pre-training on phantoms: the same bits again, cached by what matters, a checkpoint by its digest."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fedneuro.models.state import digest, load_saved
from fedneuro.privacy.errors import EnvironmentProblem, StudyError
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_init import PHANTOM_MODALITIES, LesionKind
from fedneuro.server.events import Event
from fedneuro.server.store import RunStore
from fedneuro.simulations.phantoms.anatomy import Grid, draw_anatomy
from fedneuro.simulations.phantoms.lesions import LESION_KINDS, draw_kind
from fedneuro.simulations.phantoms.style import MODALITIES, generator_of
from fedneuro.simulations.phantoms.variety import (
    AIR,
    CORE,
    LESION,
    Head,
    Variety,
    contrast_of,
    draw_head,
    scan_statistics,
    with_lesion,
    without_skull,
)
from fedneuro.simulations.pretraining import initial_state, pretrain, recipe
from fedneuro.simulations.run import Simulation
from tests.bids import make_study, write_site

COARSE = Grid.covering_head((6.0, 6.0, 8.0))


First = tuple[Path, Study, dict[str, Any]]
"""Folder, study and results of a run that started from phantoms."""


@pytest.fixture(scope="module")
def heads() -> list[Head]:
    return [draw_head(0, number, COARSE, ("mass", "multifocal")) for number in range(2)]


def tiny(init: dict[str, Any], **sections: Any) -> Study:
    training = {"rounds": 2, "local_epochs": 1, "batch_size": 4, "init": init}
    return make_study(**{"training": training, "data": {"augment": "light"}, **sections})


PHANTOMS = {"from": "phantoms", "steps": 3, "batch_size": 4, "patients": 2}


def crops(heads: list[Head], **options: Any) -> Variety:
    values = {"patch": (32, 32), "axis": 2, "ratio": 1.25, "foreground": 0.5, "percentile": False, "flip": True}
    return Variety(heads, **{"contrasts": [contrast_of("FLAIR", "wide")], **values, **options})


def test_the_same_bits_again_whatever_the_threads_and_from_the_cache(tmp_path: Path) -> None:
    study, events = tiny(PHANTOMS), list[Event]()
    first = initial_state(study, tmp_path, events.append)
    assert first is not None
    assert [event.values["step"] for event in events][-1] == 3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = pretrain(study)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert digest(again) == digest(first)
    events.clear()
    cached = initial_state(study, tmp_path, events.append)
    assert cached is not None and digest(cached) == digest(first) and not events
    (entry,) = tmp_path.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-4] + b"\0\0\0\1")
    mended = initial_state(study, tmp_path, events.append)
    assert mended is not None and digest(mended) == digest(first) and events


def test_the_cache_is_keyed_by_what_the_result_depends_on() -> None:
    key = recipe(tiny(PHANTOMS))
    other = tiny(PHANTOMS, study={"name": "other"}, evaluation={"min_patients": 2}, strategy={"weighting": "equal"})
    assert recipe(other) == key
    changed = [
        tiny({**PHANTOMS, "steps": 4}),
        tiny({**PHANTOMS, "seed": 1}),
        tiny({**PHANTOMS, "lesions": ["mass"]}),
        tiny(PHANTOMS, study={"name": "t", "seed": 9}),
        tiny(PHANTOMS, model={"channels": [4, 16], "residual_units": 0}),
        tiny(PHANTOMS, data={"modalities": ["T1w"]}),
        tiny(PHANTOMS, data={"normalise": "percentile"}),
    ]
    assert all(recipe(study) != key for study in changed)


def test_one_step_teaches_from_phantoms_alone(heads: list[Head]) -> None:
    """Crops depend on the generator alone; with foreground = 1 nearly all show a lesion, in 2D and 3D."""
    for patch in ((32, 32), (24, 24, 24)):
        variety = crops(heads, patch=patch, foreground=1.0, contrasts=[contrast_of(m, "any") for m in ("FLAIR", "T1w")])
        images, labels = variety.batch(16, torch.Generator().manual_seed(1))
        same, _ = variety.batch(16, torch.Generator().manual_seed(1))
        other, _ = variety.batch(16, torch.Generator().manual_seed(2))
        assert images.shape == (16, 2, *patch) and labels.shape == (16, *patch)
        assert torch.equal(images, same) and not torch.equal(images, other)
        assert bool(images.isfinite().all()) and set(labels.flatten().tolist()) == {0, 1}
        assert float(labels.flatten(1).any(1).float().mean()) >= 0.8


def test_lesions_stand_out_in_flair(heads: list[Head]) -> None:
    images, labels = crops(heads, foreground=1.0).batch(64, torch.Generator().manual_seed(0))
    shown = [(i[0], lab) for i, lab in zip(images, labels, strict=True) if lab.sum() > 5]
    brighter = [bool(i[lab > 0].mean() > i[lab == 0].mean()) for i, lab in shown]
    assert np.mean(brighter) > 0.9


def test_percentile_images_lie_between_zero_and_one(heads: list[Head]) -> None:
    images, _ = crops(heads, percentile=True).batch(4, torch.Generator().manual_seed(0))
    assert float(images.min()) >= 0 and float(images.max()) <= 1


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("air", [0.0, 0.07])
def test_mean_and_variance_of_a_scan_follow_from_its_moments(heads: list[Head], stripped: bool, air: float) -> None:
    """Against the scan itself, made voxel by voxel; where air is 0 it does not count, as in the hospitals' z-score."""
    head = heads[0]
    classes = with_lesion(head.tissue.double() / 255, head.lesions[0].double() / 255)
    levels = torch.rand(1, 10, generator=torch.Generator().manual_seed(3))
    levels[:, AIR] = air
    classes, second = without_skull(classes[None], head.moments[:1], torch.tensor([stripped]))
    signal = torch.einsum("c,bcxyz->bxyz", levels[0].double(), classes).flatten()
    weight = (1 - classes[0, AIR].flatten()) if air == 0 else torch.ones_like(signal)
    mean = signal.sum() / weight.sum()
    spread = ((signal**2).sum() / weight.sum() - mean**2).sqrt()
    found = scan_statistics(levels, second, torch.tensor([air == 0]))
    assert float(found[0]) == pytest.approx(float(mean), rel=5e-3)
    assert float(found[1]) == pytest.approx(float(spread), rel=5e-3)


@pytest.mark.parametrize("kind", sorted(LESION_KINDS))
def test_every_kind_of_lesion_lies_in_the_brain(kind: str) -> None:
    volumes = []
    for number in range(4):
        generator = generator_of("test", kind, number)
        anatomy = draw_anatomy(generator, COARSE, age=50.0)
        lesion, core = draw_kind(kind, generator, anatomy)
        outside = anatomy.tissue[:3].sum(0) < 0.05
        assert lesion.min() >= 0 and lesion.max() <= 1 and bool((core <= lesion).all())
        assert not (lesion[outside] > 0.5).any()
        volumes.append(int((lesion > 0.5).sum()))
    assert sum(volumes) > 0


def test_words_of_the_study_are_what_phantoms_know() -> None:
    assert PHANTOM_MODALITIES == MODALITIES
    assert set(get_args(LesionKind)) == set(LESION_KINDS)
    assert LESION < CORE < AIR


def test_a_full_cache_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(EnvironmentProblem, match="--cache"):
        initial_state(tiny({**PHANTOMS, "steps": 1}), blocked / "cache")


# Two hospitals that start from phantoms, and studies that start from their model.


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    for seed, name in enumerate(("north", "west")):
        write_site(folder / name, patients=5, shape=(18, 18, 3), seed=seed)
    return folder


@pytest.fixture(scope="module")
def first(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> First:
    out = tmp_path_factory.mktemp("runs") / "first"
    study = tiny(PHANTOMS, evaluation={"heldout": ["west"], "bootstrap": 100, "validation_fraction": 0.4})
    return out, study, Simulation(study=study, sites=sites, out=out, workers=1).run()


def test_round_0_is_the_pretrained_model_and_has_its_row(first: First) -> None:
    out, study, results = first
    assert results["start"] == {
        "from": "phantoms",
        "title": "pre-trained on phantoms, no private patient",
        "digest": digest(pretrain(study)),
    }
    west = results["sites"]["west"]
    assert west["untrained"] == {} and west["start"] == results["rounds"][0]["metrics"]["west"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "pre-trained on phantoms, no private patient" in page and "untrained network" not in page
    assert "before any training here" in page


def test_a_run_that_is_there_is_refused_before_pretraining(first: First, sites: Path, tmp_path: Path) -> None:
    out, study, _ = first
    events: list[Event] = []
    with pytest.raises(Exception, match="finished run"):
        Simulation(study=study, sites=sites, out=out, cache=tmp_path, workers=1).run(observer=events.append)
    assert not events


def test_a_checkpoint_is_known_by_its_digest(first: First, sites: Path, tmp_path: Path) -> None:
    path = first[0] / "model.safetensors"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = {"from": "checkpoint", "path": str(path), "sha256": sha256}
    study = tiny(checkpoint, evaluation={"heldout": ["west"], "bootstrap": 100, "validation_fraction": 0.4})
    simulation = Simulation(study=study, sites=sites, out=tmp_path / "out", workers=1)
    results = simulation.run()
    assert results["start"]["digest"] == first[2]["model_digest"]
    assert str(path) not in (tmp_path / "out/results.json").read_text(encoding="utf-8")
    for wrong, text in (
        ({**checkpoint, "sha256": "0" * 64}, "the study names 000000000000"),
        ({**checkpoint, "path": str(tmp_path / "gone")}, "cannot be read"),
        ({**checkpoint, "path": ""}, "missing; expected the file"),
    ):
        with pytest.raises(StudyError, match=text) as caught:
            initial_state(tiny(wrong), tmp_path)
        assert caught.value.exit_code == 2
    junk = tmp_path / "junk"
    junk.write_text("no tensors")
    wrong = {**checkpoint, "path": str(junk), "sha256": hashlib.sha256(junk.read_bytes()).hexdigest()}
    with pytest.raises(StudyError, match="not a safetensors file"):
        initial_state(tiny(wrong), tmp_path)
    larger = tiny(checkpoint, model={"channels": [4, 16], "residual_units": 0}, evaluation={"heldout": ["west"]})
    with pytest.raises(StudyError, match="not of this study's network"):
        replace(simulation, study=larger, out=tmp_path / "larger").run()


def test_the_run_keeps_its_start(first: First, tmp_path: Path) -> None:
    """A run in another folder, resumed without cache, path or pre-training, has the same initial model."""
    out, study, _ = first
    arrays, _ = load_saved(next((out / "cache/pre-training").glob("*.safetensors")))
    RunStore.create(tmp_path, study, engine="test", initial=arrays).close()
    store = RunStore.resume(tmp_path, study, engine="test")
    kept = store.initial()
    store.close()
    assert kept is not None and digest(kept) == digest(arrays)
    path = tmp_path / "state/initial.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(Exception, match="was changed since it was saved"):
        store.initial()
