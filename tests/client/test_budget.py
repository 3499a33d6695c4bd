# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node budget``: what was spent, reserved and left, and whether a study fits."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedneuro.client.budget import plan_study, statement
from fedneuro.client.cli import app
from fedneuro.client.node_settings import load_node_settings
from fedneuro.client.settings import SiteSettings
from fedneuro.privacy.accounting import GaussianEvent, epsilon
from fedneuro.privacy.budget import Budget, evaluations, training_event
from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import BadInput, BudgetExhausted, LedgerDistrusted
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.study import Study
from fedneuro.privacy.study_file import describe
from tests.bids import make_study

NODE = f"""
[site]
name = "north"
role = "train"
public_size = 40
data = "bids"
state = "state"
[study]
approved = ["{"0" * 64}"]
[budget]
dataset = "glioma"
epsilon = 5.0
[superlink]
address = "coordinator.example.org:8000"
root_certificate = "ca.crt"
key = "node.key"
[runner]
port = 9094
secret = "runner.secret"
bundle = "{"0" * 64}"
"""
ROUND = GaussianEvent(sample_rate=1.0, noise_multiplier=2.0)


def private_study(**privacy: object) -> Study:
    return make_study(
        training={"rounds": 3, "local_steps": 2, "local_epochs": 0},
        privacy={"mode": "local", "epsilon": 4.0, "sample_rate": 1.0, **privacy},
    )


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "bids").mkdir()
    for name, mode in (("ca.crt", 0o644), ("node.key", 0o600), ("runner.secret", 0o600)):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    (tmp_path / "node.toml").write_text(NODE)
    return tmp_path / "node.toml"


def settings_of(node: Path) -> SiteSettings:
    return load_node_settings(node).site_settings()


def spend(settings: SiteSettings, study: str, rounds: int, settled: int) -> None:
    ledger = Ledger(settings.ledger, settings.name)
    for number in range(rounds):
        kept = ledger.reserve(
            study * 64, settings.dataset_id, number, ROUND, delta=1e-3, budget_epsilon=4, lifetime=settings.lifetime
        )
        if number < settled:
            ledger.settle(kept.id)


def test_spent_reserved_and_left_are_compositions(node: Path) -> None:
    settings = settings_of(node)
    assert settings.lifetime == Budget(epsilon=5.0, delta=1e-3), "δ from the public size: 1 / (10 × 40), rounded down"
    spend(settings, "a", rounds=3, settled=2)
    spend(settings, "b", rounds=1, settled=1)
    everything, first, second = statement(settings).lines
    assert (everything.what, everything.dataset, everything.charges, everything.open) == ("all studies", "glioma", 4, 1)
    assert everything.settled == epsilon([ROUND] * 3, 1e-3) and everything.charged == epsilon([ROUND] * 4, 1e-3)
    assert everything.left == pytest.approx(5.0 - everything.charged)
    assert (first.what, first.budget, first.open) == (f"study {'a' * 12} train", 4.0, 1)
    assert first.settled == epsilon([ROUND] * 2, 1e-3) and second.charged == epsilon([ROUND], 1e-3)


def test_looking_makes_no_ledger(node: Path) -> None:
    settings = settings_of(node)
    (line,) = statement(settings).lines
    assert (line.charged, line.left, line.charges) == (0.0, 5.0, 0)
    assert not settings.state.exists()


def test_a_plan_that_fits_is_granted_and_one_that_does_not_is_refused(node: Path) -> None:
    """The plan and the ledger agree, before and after other studies have spent."""
    settings, study = settings_of(node), private_study()
    plan = plan_study(settings, study)
    assert plan.fits and plan.study[0] <= 4.0 * (1 + 1e-6) and plan.study[1] == 4.0
    spend(settings, "a", rounds=4, settled=4)
    full = plan_study(settings, study)
    assert full.study == plan.study and full.lifetime[0] > 5.0 and not full.fits
    ledger = Ledger(settings.ledger, settings.name)
    with pytest.raises(BudgetExhausted, match="over all studies"):
        ledger.reserve(
            study.hash, "glioma", 1, training_event(study, 40), delta=1e-3, budget_epsilon=4.0,
            lifetime=settings.lifetime,
        )  # fmt: skip
    assert plan_study(replace(settings, lifetime=None), study).fits
    assert plan_study(replace(settings, role=Role.HELDOUT), study).study[0] == 0.0


def test_noised_metrics_are_part_of_the_plan(node: Path) -> None:
    study = private_study(metrics="noise", metrics_epsilon=0.5)
    assert evaluations(study) == 5, "untrained, three rounds, the chosen model"
    plan = plan_study(settings_of(node), study)
    assert plan.metrics is not None
    cost, budget = plan.metrics
    assert 0.45 < cost <= budget * (1 + 1e-6) == pytest.approx(0.5)
    assert plan.lifetime[0] > plan.study[0]


def test_the_command(node: Path) -> None:
    settings, run = settings_of(node), CliRunner()
    file = node.parent / "study.toml"
    file.write_text(describe(private_study()), encoding="utf-8")
    arguments = ["budget", "--config", str(node), "--study", str(file)]
    fits = run.invoke(app, arguments)
    assert fits.exit_code == 0, fits.output
    for words in ("glioma", "all studies", "nothing was ever charged", "zero-out of one patient", "it fits"):
        assert words in fits.output
    spend(settings, "a", rounds=4, settled=3)
    full = run.invoke(app, arguments)
    assert isinstance(full.exception, BudgetExhausted) and full.exception.exit_code == 3
    assert "does NOT fit" in full.output and "chain and anchors verified" in full.output
    with sqlite3.connect(settings.ledger) as database:
        database.execute("DROP TRIGGER entries_are_fixed")
        database.execute("UPDATE entries SET noise_multiplier = 500.0 WHERE id = 2")
    database.close()
    changed = run.invoke(app, arguments[:3])
    assert isinstance(changed.exception, LedgerDistrusted) and changed.exception.exit_code == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epsilon = 5.0", "epsilon = 0", "budget.epsilon"),
        ("epsilon = 5.0", 'epsilon = "a lot"', "budget.epsilon"),
        ("epsilon = 5.0", "delta = 1.0", "budget.delta"),
        ("epsilon = 5.0", "min_patients = 0", "budget.min_patients"),
        ("epsilon = 5.0", "epsilom = 5.0", "did you mean epsilon"),
    ],
)
def test_a_wrong_budget_is_named(node: Path, old: str, new: str, words: str) -> None:
    node.write_text(NODE.replace(old, new))
    with pytest.raises(BadInput, match=words):
        load_node_settings(node)


def test_an_unlimited_life_must_be_said(node: Path) -> None:
    node.write_text(NODE.replace("epsilon = 5.0", 'epsilon = "unlimited"'))
    assert settings_of(node).lifetime is None
    node.write_text(NODE.replace('[budget]\ndataset = "glioma"\nepsilon = 5.0\n', ""))
    settings = settings_of(node)
    assert settings.lifetime == Budget(epsilon=10.0, delta=1e-3)
    assert (settings.dataset_id, settings.min_patients) == ("north", 5)
