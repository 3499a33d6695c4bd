# SPDX-License-Identifier: Apache-2.0
"""Outcomes: read from participants.tsv, learned across hospitals, judged per patient, and private where asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedneuro.client.data import open_site
from fedneuro.client.data.outcomes import Outcome
from fedneuro.models.spec import TaskSection
from fedneuro.privacy.errors import DataError
from fedneuro.privacy.study import Study
from fedneuro.server.report import write_report
from fedneuro.simulations.run import Simulation
from tests.bids import make_study, write_nifti, write_site

SURVIVAL: Mapping[str, Any] = {
    "kind": "survival", "target": "months", "event": "died", "time_cuts": [6.0, 12.0, 24.0], "unit": "months",
}  # fmt: skip
REGRESSION: Mapping[str, Any] = {"kind": "regression", "target": "score", "centre": 50.0, "scale": 20.0}


def study_of(task: Mapping[str, Any], **sections: Any) -> Study:
    """A small ResNet on 40×40 slices."""
    values: dict[str, Any] = {
        "data": {"patch": [40, 40], "normalise": "none"},
        "model": {"name": "resnet", "channels": [4, 4, 8, 8], "norm": "group"},
        "training": {
            "loss": "hazard" if task["kind"] == "survival" else "huber", "local_epochs": 0, "local_steps": 15,
            "batch_size": 8, "rounds": 2, "learning_rate": 0.01,
        },
        "evaluation": {"heldout": ["west"], "validation_fraction": 0.2, "bootstrap": 100, "previews": 1, "worst": 1},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return make_study(task=dict(task), **values)


def write_outcomes(root: Path, *, patients: int = 24, seed: int = 0) -> Path:
    """A site whose patients show a square that is larger the higher their score, and the sooner they die."""
    write_site(root, patients=patients, shape=(40, 40, 2), mask=None, seed=seed)
    rng = np.random.default_rng(seed)
    rows = ["participant_id\tscore\tmonths\tdied"]
    for number in range(1, patients + 1):
        level = rng.uniform(-1, 1)
        image, side = rng.normal(0, 0.3, (40, 40, 2)).astype(np.float32), round(18 + 14 * level)
        image[4 : 4 + side, 4 : 4 + side] += 2
        write_nifti(root / f"sub-P{number:03d}" / "anat" / f"sub-P{number:03d}_FLAIR.nii.gz", image)
        months, seen = 12 * np.exp(rng.normal(-1.5 * level, 0.3)), rng.uniform(6, 40)
        rows.append(f"sub-P{number:03d}\t{50 + 30 * level:.2f}\t{min(months, seen):.2f}\t{int(months < seen)}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hospitals."""
    root = tmp_path_factory.mktemp("outcomes")
    for index, name in enumerate(("north", "south", "west")):
        write_outcomes(root / name, seed=index)
    return root


def test_a_time_becomes_the_intervals_that_were_survived() -> None:
    """Cuts 6, 12, 24. Censored: an interval counts from its middle (3, 9, 18) on."""
    task = TaskSection.model_validate_json(json.dumps(SURVIVAL))
    events = {0.0: 1, 5.9: 1, 6.0: 3, 13.0: 5, 24.0: 6, 99.0: 6}
    assert {time: Outcome(time, True).label(task) for time in events} == events
    ends = {0.0: 0, 2.9: 0, 3.0: 2, 8.9: 2, 9.0: 4, 17.9: 4, 18.0: 6, 99.0: 6}
    assert {time: Outcome(time, False).label(task) for time in ends} == ends
    number = TaskSection.model_validate_json(json.dumps(REGRESSION))
    assert Outcome(70.0).label(number) == 1.0


@pytest.mark.parametrize(
    ("task", "table", "message"),
    [
        (REGRESSION, "participant_id\tage\nsub-P001\t3\n", "no column score .it has participant_id, age."),
        (REGRESSION, "participant_id\tscore\nsub-P001\tn/a\n", "sub-P001 has score = 'n/a'; expected a number"),
        (REGRESSION, "participant_id\tscore\nsub-P001\tinf\n", "expected a number"),
        (REGRESSION, "participant_id\tscore\nsub-P009\t1\n", "sub-P001 has no row"),
        (SURVIVAL, "participant_id\tmonths\nsub-P001\t3\n", "no column died .*task.event"),
        (SURVIVAL, "participant_id\tmonths\tdied\nsub-P001\t-3\t1\n", "expected a time from 0 on in months"),
        (SURVIVAL, "participant_id\tmonths\tdied\nsub-P001\t3\tmaybe\n", "died = 'maybe'; expected 1"),
        (SURVIVAL, None, "no participants.tsv; expected the outcome"),
    ],
)
def test_a_table_that_cannot_be_used_is_told(
    tmp_path: Path, task: Mapping[str, Any], table: str | None, message: str
) -> None:
    site = write_site(tmp_path / "west", patients=1, shape=(40, 40, 2), mask=None)
    (site / "participants.tsv").unlink()
    if table is not None:
        (site / "participants.tsv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_site(site, study_of(task), cache=None)


def test_keys_of_outcomes_are_in_the_hash_only_where_they_are_used() -> None:
    plain = make_study()
    assert set(json.loads(plain.canonical)["task"]) == {"kind", "labels", "mask", "target"}
    used = study_of(SURVIVAL)
    assert set(json.loads(used.canonical)["task"]) == {"kind", "labels", "mask", "target", "event", "time_cuts", "unit"}
    assert Study.from_canonical(used.canonical, used.hash) == used


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**SURVIVAL, "time_cuts": [12.0, 6.0]}, "rising times"),
        ({**SURVIVAL, "time_cuts": []}, "rising times"),
        ({**SURVIVAL, "event": ""}, "event is empty"),
        ({**SURVIVAL, "event": "months"}, "two columns"),
        ({**SURVIVAL, "scale": 2.0}, "scale belongs to regression"),
        ({**REGRESSION, "target": ""}, "target is empty"),
        ({**REGRESSION, "labels": ["a", "b"]}, "leave them out"),
        ({"unit": "ml"}, "unit belongs to regression and survival"),
    ],
)
def test_contradictions_of_an_outcome_are_refused(task: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_of({"kind": "segmentation", **task})


def test_what_cannot_go_with_an_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match='use "mse" or "l1" or "huber"'):
        study_of(REGRESSION, training={"loss": "hazard"})
    with pytest.raises(ValueError, match='use "suppress"'):
        study_of(REGRESSION, privacy={"mode": "local", "metrics": "noise", "epsilon": 8.0})
    with pytest.raises(ValueError, match='"dice" for survival'):
        study_of(SURVIVAL, evaluation={"metrics": ["dice"]})


def test_a_number_is_learned_and_told_in_its_unit(sites: Path, tmp_path: Path) -> None:
    """Scores spread by 17 about 50; a model that knows nothing errs by about 15."""
    out = tmp_path / "out"
    found = Simulation(study=study_of(REGRESSION), sites=sites, out=out, workers=1).run()
    west = found["sites"]["west"]["metrics"]
    assert west["mae"]["mean"] < 7 and west["mae"]["mean"] <= west["rmse"]["mean"]
    assert found["sites"]["west"]["start"]["mae"]["mean"] > 11
    kept = json.loads((out / "sites/west/patient-scores.json").read_text())["patients"].values()
    errors = [abs(patient["predicted"] - patient["observed"]) for patient in kept]
    assert west["mae"]["mean"] == pytest.approx(np.mean(errors)) == pytest.approx(np.mean([p["mae"] for p in kept]))
    assert west["rmse"]["mean"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    page = (out / "sites/west/site-report.html").read_text()
    assert "for a larger score" in page and "predicted" in page
    write_report(found, tmp_path / "report.html")
    assert "MAE" in (tmp_path / "report.html").read_text()


def test_survival_is_learned_and_the_order_told(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = study_of(SURVIVAL, training={"local_steps": 40})
    found = Simulation(study=study, sites=sites, out=out, workers=1).run()
    west = found["sites"]["west"]["metrics"]
    assert west["c_index"]["mean"] > 0.75 and west["c_index"]["ci95"][0] > 0.6
    kept = json.loads((out / "sites/west/patient-scores.json").read_text())["patients"].values()
    assert all(0 <= patient["predicted"] <= 24 for patient in kept), "months up to the last cut"
    assert {patient["event"] for patient in kept} == {0.0, 1.0}
    assert "for the event between" in (out / "sites/west/site-report.html").read_text()


@pytest.mark.parametrize("task", [REGRESSION, SURVIVAL], ids=["regression", "survival"])
def test_a_patient_on_whom_inference_fails_counts_with_the_worst(sites: Path, tmp_path: Path, task: Any) -> None:
    """The network gives NaN for one patient's image, and everybody is in the mean."""
    root = write_outcomes(tmp_path / "sites" / "west", patients=8)
    image = np.full((40, 40, 2), 3e38, np.float32)
    write_nifti(root / "sub-P003/anat/sub-P003_FLAIR.nii.gz", image)
    (tmp_path / "sites/north").symlink_to(sites / "north")
    study = study_of(task, training={"rounds": 1, "local_steps": 1}, data={"patch": [40, 40], "normalise": "none"})
    found = Simulation(study=study, sites=tmp_path / "sites", out=tmp_path / "out", workers=1).run()
    assert found["sites"]["west"]["failures"]["mean"] == pytest.approx(1 / 8)
    kept = json.loads((tmp_path / "out/sites/west/patient-scores.json").read_text())["patients"]["sub-P003"]
    observed = kept["observed"]
    if task is REGRESSION:
        assert abs(kept["predicted"] - observed) >= 60, "three spreads from the centre, on the wrong side"
    else:
        assert kept["predicted"] == (24.0 if kept["event"] else 0.0)


@pytest.mark.parametrize("task", [REGRESSION, SURVIVAL], ids=["regression", "survival"])
def test_an_outcome_is_learned_under_patient_level_privacy(sites: Path, tmp_path: Path, task: Any) -> None:
    """The self-test of clipping passes with these losses, the budget is charged, no loss leaves."""
    study = study_of(
        task,
        training={"loss": "hazard" if task is SURVIVAL else "mse", "rounds": 1, "local_steps": 2, "local_epochs": 0},
        privacy={"mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 2},
        evaluation={"heldout": ["west"], "bootstrap": 100, "previews": 0, "worst": 0},
    )
    found = Simulation(study=study, sites=sites, out=tmp_path / "out", workers=1).run()
    assert set(found["privacy"]["epsilon"]) == {"north", "south"}
    assert 0 < max(found["privacy"]["epsilon"].values()) <= 8.0
    assert found["sites"]["west"]["metrics"]
