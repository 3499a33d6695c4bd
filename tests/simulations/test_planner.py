# SPDX-License-Identifier: Apache-2.0
"""The planner: its numbers by hand, and equal to what the ledger then grants."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedneuro.models.networks import build_network
from fedneuro.privacy.accounting import GaussianEvent, calibrate, epsilon
from fedneuro.privacy.errors import BudgetExhausted, DataError, StudyError
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import describe
from fedneuro.simulations.cli import app
from fedneuro.simulations.planner import Plan, make_plan
from fedneuro.simulations.sites import planned_settings
from tests.bids import make_study


def private_study(**sections: Any) -> Study:
    base: dict[str, Any] = {
        "training": {"rounds": 6, "local_steps": 1, "local_epochs": 0},
        "privacy": {"mode": "local", "epsilon": 4.0, "sample_rate": 1.0},
        "evaluation": {"heldout": ["west"], "validation_fraction": 0.2},
    }
    return make_study(**{name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}})


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, Path]:
    """north declares 10 patients, south 20, west 10."""
    for name, patients in (("north", 10), ("south", 20), ("west", 10)):
        for number in range(patients):
            (tmp_path / "sites" / name / f"sub-{number:03d}").mkdir(parents=True)
    return {name: tmp_path / "sites" / name for name in ("north", "south", "west")}


def plan(study: Study, sites: dict[str, Path], **options: Any) -> Plan:
    return make_plan(study, planned_settings(study, sites, **options))


def test_each_site_by_hand(sites: dict[str, Path]) -> None:
    """n = 8 and 16 train; δ = 1e-2 for 10 patients and 1e-3 for 20; C cancels in signal over noise."""
    study = private_study()
    made = plan(study, sites)
    north, south = made.sites
    assert (north.name, south.name) == ("north", "south"), "who is held out spends nothing"
    network = build_network(study.model, in_channels=1, out_channels=2, seed=0)
    assert made.parameters == sum(p.numel() for p in network.parameters())
    for site, patients, delta in ((north, 8, 1e-2), (south, 16, 1e-3)):
        sigma = calibrate(4.0, delta, 1.0, 6)
        assert (site.delta, site.sigma, site.share, site.patients) == (delta, sigma, sigma, patients)
        assert site.signal_to_noise == pytest.approx(patients / (sigma * math.sqrt(made.parameters)))
        assert [number for number, _ in site.curve] == [1, 2, 3, 4, 5, 6]
        for number, found in site.curve:
            event = GaussianEvent(sample_rate=1.0, noise_multiplier=sigma, count=number)
            assert found == pytest.approx(epsilon([event], delta), rel=5e-3)
        assert site.ends is None and 0 <= site.left < 0.01 and site.before == 0.0
    assert made.first_to_end is None


def test_what_a_change_would_do(sites: dict[str, Path]) -> None:
    study = private_study(privacy={"mode": "local", "epsilon": 4.0, "sample_rate": 0.5, "crops_per_patient": 2})
    made = plan(study, sites)
    found = {change.what: change for change in made.changes}
    now, worst = found["as planned"], min(made.sites, key=lambda site: site.signal_to_noise)
    assert now.kept == pytest.approx(4.0, rel=5e-3)
    assert now.total == pytest.approx(now.signal_to_noise * math.sqrt(6))
    longer, shorter, crops = found["12 rounds"], found["3 rounds"], found["4 crops per patient"]
    assert shorter.kept is not None and longer.kept is not None and shorter.kept < 4.0 < longer.kept
    assert shorter.sigma < now.sigma < longer.sigma and longer.work == 2
    assert (crops.sigma, crops.kept, crops.work) == (now.sigma, now.kept, 2)
    assert found["sample rate 1"].sigma > now.sigma > found["sample rate 0.25"].sigma
    # One noise for three times north's patients (8 + 16 of 8); σ for the stricter δ.
    pooled = found["mode distributed"]
    strict = calibrate(4.0, 1e-3, 0.5, 6)
    assert pooled.signal_to_noise == pytest.approx(3 * worst.signal_to_noise * worst.sigma / strict)


def test_distributed_sites_share_one_noise(sites: dict[str, Path]) -> None:
    study = private_study(privacy={"mode": "distributed", "epsilon": 4.0, "delta": 1e-3, "sample_rate": 1.0})
    north, south = plan(study, sites).sites
    assert north.sigma == south.sigma and north.signal_to_noise == south.signal_to_noise
    assert north.share == pytest.approx(north.sigma / math.sqrt(2))
    with pytest.raises(StudyError, match="fewer than a third"):
        plan(private_study(privacy={"mode": "distributed", "delta": 1e-3, "tolerate": 1}), sites)


def test_a_life_budget_ends_where_the_ledger_says_no(tmp_path: Path, sites: dict[str, Path]) -> None:
    """South spent before: the plan names it first, and the round at which its ledger then refuses."""
    study = private_study()
    run = tmp_path / "run"
    made = plan(study, sites, lifetime=3.0)
    settings = planned_settings(study, sites, spent=None, lifetime=3.0)["south"]
    ledger = Ledger(run / "sites/south/ledger.db", "south")
    before = GaussianEvent(sample_rate=1.0, noise_multiplier=4.0, count=6)
    ledger.reserve("e" * 64, "south", 1, before, delta=1e-3, budget_epsilon=50)
    spent = plan(study, sites, spent=run, lifetime=3.0)
    south = spent.sites[1]
    assert south.before == pytest.approx(epsilon([before], 1e-3), rel=5e-3)
    first, unspent = spent.first_to_end, made.sites[1]
    assert first is not None and first.name == "south" and first.ends is not None
    assert unspent.ends is not None and first.ends < unspent.ends
    assert south.lifetime[0][1] > made.sites[1].lifetime[0][1]
    step = GaussianEvent(sample_rate=1.0, noise_multiplier=south.sigma)
    for number in range(1, first.ends):
        ledger.reserve(study.hash, "south", number, step, delta=1e-3, budget_epsilon=4.0, lifetime=settings.lifetime)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(study.hash, "south", 9, step, delta=1e-3, budget_epsilon=4.0, lifetime=settings.lifetime)


def test_what_cannot_be_planned_is_named(tmp_path: Path, sites: dict[str, Path]) -> None:
    with pytest.raises(StudyError, match="spends no ε"):
        plan(make_study(), sites)
    with pytest.raises(StudyError, match="no site is left"):
        plan(private_study(evaluation={"heldout": list(sites)}), sites)
    with pytest.raises(DataError, match="holds no run"):
        plan(private_study(), sites, spent=tmp_path / "nothing")


@pytest.mark.usefixtures("sites")
def test_the_command_writes_table_plot_and_figures(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "plan"
    file.write_text(describe(private_study()), encoding="utf-8")
    arguments = ["privacy", "plan", str(file), "--sites", str(tmp_path / "sites"), "--out", str(out), "--lifetime", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for words in ("north", "south", "runs out first", "as planned", "mode distributed", "zero-out of one patient"):
        assert words in result.output
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "plan.svg").read_text(encoding="utf-8")
    figures = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert figures["first_to_end"] in ("north", "south") and len(figures["sites"]) == 2
    assert not (Path.cwd() / "nowhere").exists(), "a plan makes no ledger"
