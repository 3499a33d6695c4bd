# SPDX-License-Identifier: Apache-2.0
"""Invented outcomes of phantoms: they follow the lesions, are the same each time, and touch no scan."""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from fedneuro.models.metrics import c_index
from fedneuro.privacy.errors import BadInput
from fedneuro.simulations.phantoms.outcomes import COLUMNS, _millilitres, _outcome, add_outcomes
from fedneuro.simulations.phantoms.scan import LEAST_ML
from fedneuro.simulations.phantoms.style import style_of
from fedneuro.simulations.phantoms.write import write_site


def table(site: Path) -> list[dict[str, str]]:
    with (site / "participants.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_outcomes_are_added_to_the_table_and_to_nothing_else(tmp_path: Path) -> None:
    site = tmp_path / "alder"
    style = replace(style_of("alder", 5), lesion_kind="mass")
    write_site(site, name="alder", patients=2, seed=5, modalities=("FLAIR",), style=style)

    def scans() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in site.rglob("*.nii.gz")}

    before, plain = scans(), table(site)
    add_outcomes(site, name="alder", seed=5)
    once = (site / "participants.tsv").read_bytes()
    assert scans() == before and len(before) == 4
    assert [{k: v for k, v in row.items() if k not in COLUMNS} for row in table(site)] == plain
    volumes = [_millilitres(site, row["participant_id"]) for row in table(site)]
    assert min(volumes) > LEAST_ML and max(volumes) > 8, "masses: a radius of 13 mm and more"
    for row in table(site):
        assert 0 <= float(row["score"]) <= 100 and float(row["months"]) >= 0 and row["died"] in "01"
    add_outcomes(site, name="alder", seed=5)
    assert (site / "participants.tsv").read_bytes() == once, "the same each time"


def test_larger_lesions_mean_lower_scores_and_shorter_lives() -> None:
    volumes = np.geomspace(4, 250, 200)
    rows = [_outcome(float(ml), "alder", f"sub-{k:03d}", 0) for k, ml in enumerate(volumes)]
    correlation: Any = spearmanr(volumes, [float(row["score"]) for row in rows])
    assert correlation.statistic < -0.9
    died = np.array([row["died"] == "1" for row in rows])
    assert died[:100].sum() < died[100:].sum() and 0.4 < died.mean() < 0.9, "some are still alive when last seen"
    months = np.array([float(row["months"]) for row in rows])
    index = c_index(volumes, months, died)
    assert index is not None and index > 0.75


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no phantom site"):
        add_outcomes(tmp_path, name="alder", seed=0)
