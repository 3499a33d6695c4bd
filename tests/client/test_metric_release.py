# SPDX-License-Identifier: Apache-2.0
"""What leaves of metrics: nothing of small cohorts, public counts, or noise that the ledger paid for."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from fedneuro.client.metric_release import noised
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.privacy.budget import evaluations, metric_event
from fedneuro.privacy.contract import Estimate, EvaluateReply, Refusal, Request, Role
from fedneuro.privacy.errors import Reason
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.noise import SecureRandom
from fedneuro.privacy.study import Study
from fedneuro.server.rounds import initial_arrays
from tests.bids import make_study, write_site


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    write_site(tmp_path / "north", patients=6, shape=(18, 18, 4))
    return SiteSettings(
        name="north", data=tmp_path / "north", state=tmp_path / "state", role=Role.HELDOUT, public_size=10
    )


def study_of(**sections: Any) -> Study:
    return make_study(
        **{
            "training": {"rounds": 2, "local_steps": 1, "local_epochs": 0},
            "evaluation": {"heldout": ["north"], "bootstrap": 100},
            **sections,
        }
    )


NOISED = {"mode": "local", "metrics": "noise", "metrics_epsilon": 2.0}


def evaluate(site: Site, study: Study, number: int, *, final: bool = False) -> dict[str, Estimate]:
    reply = site.handle(
        Request(kind="evaluate", study=study, round=number, arrays=initial_arrays(study)["model"], final=final)
    )
    assert isinstance(reply, EvaluateReply), reply
    return dict(reply.metrics)


def test_the_number_of_patients_that_leaves_is_the_public_one(settings: SiteSettings) -> None:
    """Six patients, ten declared."""
    assert {estimate.n for estimate in evaluate(Site(settings), study_of(), 0).values()} == {10}


@pytest.mark.parametrize(
    ("own", "of_study", "leaves"), [(1, 1, True), (6, 1, True), (7, 1, False), (1, 7, False), (1, 11, False)]
)
def test_the_larger_minimum_decides_and_the_true_count_must_meet_it(
    settings: SiteSettings, own: int, of_study: int, leaves: bool
) -> None:
    study = study_of(evaluation={"heldout": ["north"], "bootstrap": 100, "min_patients": of_study})
    assert bool(evaluate(Site(replace(settings, min_patients=own)), study, 0)) is leaves


def test_noised_metrics_are_charged_once_for_each_model_and_then_refused(settings: SiteSettings) -> None:
    study = study_of(privacy=NOISED)
    assert study.metric_names == ("dice",) and evaluations(study) == 4
    site, ledger = Site(settings), Ledger(settings.ledger, "north")
    first = evaluate(site, study, 0)
    assert set(first) == {"dice"} and first["dice"].n == 10
    assert evaluate(Site(settings), study, 0) == first, (
        "the same question after a restart: the same answer, for nothing"
    )
    assert [(e.kind, e.purpose) for e in ledger.entries()][1:] == [("reserve", "metrics"), ("settle", "")]
    assert ledger.events(study.hash, "north", "metrics") == [metric_event(study, 10)]
    others = [evaluate(site, study, 1), evaluate(site, study, 2), evaluate(site, study, 2, final=True)]
    assert len({estimates["dice"].mean for estimates in [first, *others]}) > 1, "noise is drawn for each release"
    more = site.handle(
        Request(kind="evaluate", study=study, round=1, arrays=initial_arrays(study)["model"], final=True)
    )
    assert isinstance(more, Refusal) and more.reason is Reason.BUDGET_EXHAUSTED
    assert ledger.events(study.hash, "north") == [], "patients who train pay from another budget"


@pytest.mark.parametrize(("claimed", "accepted"), [(1.0, True), (0.85, False), (1.15, False)])
def test_the_noise_has_the_size_that_it_was_charged_for(claimed: float, accepted: bool) -> None:
    """Two metrics: one patient moves (v - 1/2) by √2/2 at most, so each sum has noise of σ·√2/2."""
    sigma, patients, random = 3.0, 100, SecureRandom()
    found = [one.mean - 0.5 for _ in range(4000) for one in noised([0.0, 0.0], sigma, patients, random)]
    scale = claimed * sigma * math.sqrt(2) / 2 / patients
    spread = np.asarray(found) + np.random.default_rng(0).uniform(-5e-5, 5e-5, len(found))  # what rounding took
    assert bool(kstest(spread / scale, "norm").pvalue > 1e-6) is accepted


def test_the_interval_is_made_of_public_numbers() -> None:
    estimate = noised([0.0], 1e-9, 25, SecureRandom())[0]
    assert (estimate.mean, estimate.n) == (0.5, 25)
    assert estimate.high - estimate.mean == pytest.approx(1.96 * 0.5 / 5, abs=1e-3)
    assert noised([1e9], 1.0, 5, SecureRandom())[0].high == 1.0, "never outside what the metric can be"


@pytest.mark.parametrize(
    ("privacy", "evaluation", "words"),
    [
        ({"mode": "none", "metrics": "noise"}, {}, "privacy.mode"),
        (NOISED, {"metrics": ["dice", "hd95"]}, '"hd95" with privacy.metrics'),
        (NOISED, {"select": "hd95"}, '"hd95" with privacy.metrics'),
    ],
)
def test_what_cannot_be_noised_is_refused_in_the_study(
    privacy: dict[str, Any], evaluation: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        study_of(privacy=privacy, evaluation={"heldout": ["north"], **evaluation})
