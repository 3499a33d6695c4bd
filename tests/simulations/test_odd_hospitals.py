# SPDX-License-Identifier: Apache-2.0
"""Hospitals as they come: one patient, no lesion, other labels, values that are no number, none at all. All is told."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedneuro.client.patient_scores import FILE
from fedneuro.server.statistics.evidence import OURS
from fedneuro.simulations.designs.design import Options, prepare
from fedneuro.simulations.designs.outcome import finish_design
from fedneuro.simulations.designs.plan import Fold, Plan
from tests.bids import make_study, write_site

Patients = list[dict[str, float | None]]
EMPTY = {"absent_core": 1.0, "absent_oedema": 1.0, "reference_ml": 0.0}


def _scores(number: int, **more: float | None) -> dict[str, float | None]:
    scores: dict[str, float | None] = {"dice": 0.5 + number / 20, "hd95": 3.0 + number, "reference_ml": 12.0}
    return scores | more


def _faulty(number: int) -> dict[str, float | None]:
    if number == 0:
        return _scores(number, dice=math.nan)
    return _scores(number, hd95=None) if number < 4 else _scores(number)


HOSPITALS: dict[str, Patients | None] = {
    "north": [_scores(k) for k in range(8)],
    "lone": [_scores(1)],
    "empty": [_scores(k, dice=1.0, hd95=0.0, **EMPTY) for k in range(6)],
    "other": [_scores(k, absent_core=1.0) for k in range(6)],
    "faulty": [_faulty(k) for k in range(7)],
    "late": None,
}
"""What our model scored at each; no file yet of the last one."""


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A leave-one-site-out of which the scores are there, as if computed, and no run."""
    folder = tmp_path_factory.mktemp("odd")
    for name, patients in HOSPITALS.items():
        write_site(folder / "sites" / name, patients=len(patients or [1]), shape=(16, 16, 2))
    study = make_study(
        task={"labels": ["core", "oedema"]}, evaluation={"metrics": ["dice", "hd95"], "bootstrap": 100, "previews": 0}
    )
    plan = prepare("loso", study, folder / "sites", folder / "out", Options())
    for fold in plan.folds:
        (name,) = fold.tests
        if (patients := HOSPITALS[name]) is not None:
            _write_scores(plan, fold, patients)
    return finish_design(folder / "out"), folder / "out"


def _write_scores(plan: Plan, fold: Fold, patients: Patients) -> None:
    """As the hospital that the fold holds out would keep them."""
    (name,) = fold.tests
    path = plan.federation(fold).folder / "sites" / name / FILE
    path.parent.mkdir(parents=True)
    values = {f"sub-P{number:03d}": scores for number, scores in enumerate(patients, start=1)}
    path.write_text(json.dumps({"schema_version": 1, "patients": values}))


@pytest.mark.parametrize(
    "told",
    [
        "at lone: one patient, so dice has no interval and no test",
        "empty: the reference mask is empty for 6 of 6 patients",
        "other: no reference mask has the label core",
        "at faulty: dice of 1 of 7 patients is not a finite number; they have no part in the mean",
        "federated at late",
        "at empty: dice is 1 for each of 6 patients",
    ],
)
def test_what_is_odd_is_in_the_page_and_in_the_text(design: tuple[dict[str, Any], Path], told: str) -> None:
    for name in ("report.html", "report.md"):
        assert told in html.unescape((design[1] / name).read_text()), name


def test_every_hospital_that_was_held_out_is_on_the_first_screen(design: tuple[dict[str, Any], Path]) -> None:
    page = (design[1] / "report.html").read_text()
    cards = re.findall(r'<div class="card">\s*<div><h3>(\w+) .*?95 % interval ([^,]*),', page, re.DOTALL)
    found = dict(cards)
    assert set(found) == set(HOSPITALS) and len(cards) == len(HOSPITALS)
    assert found["lone"] == "none: too few patients" and found["late"].startswith("none: no value")
    assert re.fullmatch(r"0\.\d\d–1\.00", found["empty"]), "Dice 1 for six patients: far from sure"


def test_no_patient_is_dropped_in_silence(design: tuple[dict[str, Any], Path]) -> None:
    """Three of seven have no HD95, another no Dice: both cells say of how many they are."""
    evidence, page = design[0]["evidence"], (design[1] / "report.html").read_text()
    rows = {(row["metric"], row["site"]): row for row in evidence["scores"] if row["model"] == OURS}
    assert (rows["dice", "faulty"]["n"], rows["dice", "faulty"]["failed"]) == (6, 1)
    assert (rows["hd95", "faulty"]["n"], rows["hd95", "faulty"]["failed"]) == (4, 3)
    (row,) = re.findall(r"<tr><th>federated</th><td>faulty</td>(.*?)</tr>", page)
    assert row.startswith('<td class="num">7</td>') and ", n = 6</td>" in row and ", n = 4</td>" in row
    (row,) = re.findall(r"<tr><th>federated</th><td>empty</td>(.*?)</tr>", page)
    assert "0.0 mm (no interval)" in row, "0.0–0.0 would look sure"


def test_every_fold_is_repeated_with_other_seeds_and_patients_are_counted_once(tmp_path: Path) -> None:
    """Three seeds, of which each gives every patient 0.1 more: the mean is the second's, the SD over seeds 0.1."""
    for name in ("east", "west"):
        write_site(tmp_path / "sites" / name, patients=6, shape=(16, 16, 2))
    study = make_study(evaluation={"metrics": ["dice"], "bootstrap": 100, "previews": 0})
    plan = prepare("loso", study, tmp_path / "sites", tmp_path / "out", Options(seeds=3))
    seeds = sorted({fold.seed for fold in plan.folds})
    assert len(plan.folds) == 6 and len(seeds) == 3
    for fold in plan.folds:
        more = 0.1 * seeds.index(fold.seed)
        _write_scores(plan, fold, [{"dice": 0.4 + number / 50 + more} for number in range(6)])
    evidence = finish_design(tmp_path / "out")["evidence"]
    row = next(row for row in evidence["scores"] if row["site"] == "east")
    assert row["n"] == 6 and row["mean"] == pytest.approx(0.55)
    spread = next(row for row in evidence["seeds"] if row["site"] == "east")
    assert (spread["seeds"], spread["sd"]) == (3, pytest.approx(0.1))
    assert "Spread over seeds" in (tmp_path / "out" / "report.html").read_text()
