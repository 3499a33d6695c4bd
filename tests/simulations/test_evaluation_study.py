# SPDX-License-Identifier: Apache-2.0
"""A whole study with groups, a curve and a threshold of the training sites: from their folders to results.json."""

import json
from pathlib import Path

import pytest
from jsonschema import validate

from fedneuro.simulations.run import Simulation
from tests.bids import make_study, write_site

ROOT = Path(__file__).parents[2]


def test_the_training_sites_threshold_is_used_at_the_heldout_site(tmp_path: Path) -> None:
    for index, name in enumerate(("north", "south", "west")):
        write_site(
            tmp_path / "sites" / name,
            patients=14,
            shape=(40, 40, 2),
            mask=None,
            classes=("glioma", "normal"),
            seed=index,
        )
    study = make_study(
        task={"kind": "classification", "labels": ["glioma", "normal"], "target": "kind"},
        data={"patch": [40, 40]},
        model={"name": "resnet", "channels": [4, 4, 8, 8]},
        training={"loss": "cross_entropy", "rounds": 1},
        evaluation={
            "heldout": ["west"], "validation_fraction": 0.5, "bootstrap": 100, "previews": 0, "worst": 1,
            "explain": False, "bins": 2, "strata": ["sex"],
            "metrics": ["accuracy", "sensitivity", "specificity", "reliability"],
        },
    )  # fmt: skip
    results = Simulation(study=study, sites=tmp_path / "sites", out=tmp_path / "out", workers=1).run()
    validate(
        json.loads((tmp_path / "out/results.json").read_text()),
        json.loads((ROOT / "docs/results.schema.json").read_text()),
    )
    told = results["rounds"][1]["metrics"]
    sizes = {name: results["sites"][name]["public_size"] for name in ("north", "south")}
    expected = sum(told[name]["threshold"]["mean"] * size for name, size in sizes.items()) / sum(sizes.values())
    west = results["sites"]["west"]
    assert west["threshold"] == pytest.approx(expected) and "threshold" not in told["west"]
    assert set(west["metrics"]) == {"accuracy", "sensitivity", "specificity"} and west["failures"] is None
    assert west["strata"] == {"sex": {"unknown": west["strata"]["sex"]["unknown"]}}, "nobody's sex is known"
    assert west["strata"]["sex"]["unknown"]["n"] == 15 and west["reliability"]
    assert sum(point["observed"]["n"] for point in west["reliability"]) in (10, 15)
    assert "This page stays at the hospital" in (tmp_path / "out/sites/west/site-report.html").read_text()
