# SPDX-License-Identifier: Apache-2.0
"""One hospital: the two gates, refusals that tell nothing, and a state that survives a restart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedneuro.client import gate
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.privacy.accounting import calibrate
from fedneuro.privacy.contract import Arrays, Estimate, EvaluateReply, Refusal, Request, Role, TrainReply
from fedneuro.privacy.errors import ContractViolation, Reason, Refused
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.study import Study
from fedneuro.server.rounds import initial_arrays
from tests.bids import FAULTS, make_study, write_site


def settings_of(tmp_path: Path, **changes: Any) -> SiteSettings:
    base = SiteSettings(
        name="north", data=tmp_path / "north", state=tmp_path / "state", role=Role.TRAIN, public_size=10
    )
    return replace(base, **changes)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write_site(tmp_path / "north", patients=6, shape=(18, 18, 4))
    return Site(settings_of(tmp_path))


def private_study(**privacy: Any) -> Study:
    return make_study(
        training={"local_steps": 2, "local_epochs": 0},
        privacy={"mode": "local", "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 2, **privacy},
    )


def train(site: Site, study: Study, number: int, arrays: Arrays) -> TrainReply:
    reply = site.handle(Request(kind="train", study=study, round=number, arrays=arrays))
    assert isinstance(reply, TrainReply), (reply, (site.settings.state / "last-fault.json").read_text())
    return reply


# -- entry gate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "request_changes", "reason"),
    [
        ({"approved": frozenset()}, {}, Reason.STUDY_NOT_APPROVED),
        ({"approved": frozenset({"0" * 64})}, {}, Reason.STUDY_NOT_APPROVED),
        ({"role": Role.HELDOUT}, {}, Reason.ROLE_REFUSED),
        ({}, {"study": make_study(evaluation={"heldout": ["north"]})}, Reason.ROLE_REFUSED),
        ({}, {"round": 0}, Reason.CONTRACT_VIOLATION),
        ({}, {"round": 3}, Reason.CONTRACT_VIOLATION),
        ({}, {"study": private_study(delta=0.1)}, Reason.POLICY_REFUSED),
    ],
)
def test_entry_gate_refuses(
    tmp_path: Path, changes: dict[str, Any], request_changes: dict[str, Any], reason: Reason
) -> None:
    request = Request(**{"kind": "train", "study": make_study(), "round": 1, **request_changes})
    with pytest.raises((Refused, ContractViolation)) as caught:
        gate.enter(request, settings_of(tmp_path, **changes))
    assert caught.value.reason is reason


def test_entry_gate_lets_an_approved_study_in(tmp_path: Path) -> None:
    study = make_study()
    gate.enter(Request(kind="train", study=study, round=1), settings_of(tmp_path, approved=frozenset({study.hash})))


def test_heldout_site_never_trains(tmp_path: Path) -> None:
    study = make_study(evaluation={"heldout": ["north"]})
    with pytest.raises(Refused, match="held out"):
        gate.enter(Request(kind="train", study=study, round=1), settings_of(tmp_path, role=Role.HELDOUT))


@pytest.mark.parametrize("change", ["extra", "missing", "shape", "dtype", "nan", "huge"])
def test_model_that_is_not_the_agreed_one_is_refused(site: Site, change: str) -> None:
    arrays = {k: v.copy() for k, v in initial_arrays(make_study())["model"].items()}
    first = next(iter(arrays))
    match change:
        case "extra":
            arrays["smuggled"] = np.zeros(3, np.float32)
        case "missing":
            del arrays[first]
        case "shape":
            arrays[first] = arrays[first][:1]
        case "dtype":
            arrays[first] = arrays[first].astype(np.float64)
        case "nan":
            arrays[first].flat[0] = np.nan
        case _:
            arrays[first].flat[0] = 1e30
    reply = site.handle(Request(kind="train", study=make_study(), round=1, arrays=arrays))
    assert isinstance(reply, Refusal)
    assert reply.reason is (Reason.NON_FINITE if change in ("nan", "huge") else Reason.CONTRACT_VIOLATION)


# -- exit gate ------------------------------------------------------------------------------------------------


def test_exit_gate_keeps_the_loss_of_a_private_study() -> None:
    study = private_study()
    arrays = initial_arrays(study)["model"]
    request = Request(kind="train", study=study, round=1, arrays=arrays)
    reply = TrainReply(site="north", round=1, arrays=arrays, steps=2, seconds=0, loss=0.5)
    with pytest.raises(ContractViolation, match="loss"):
        gate.leave(reply, request)
    gate.leave(replace(reply, loss=None), request)


def test_exit_gate_keeps_metrics_outside_the_study_and_of_small_cohorts() -> None:
    study = make_study(evaluation={"min_patients": 3})
    request = Request(kind="evaluate", study=study, round=1)
    estimate = Estimate(mean=0.5, low=0.4, high=0.6, n=3)
    gate.leave(EvaluateReply(site="n", round=1, metrics={"dice": estimate}, seconds=0), request)
    for metrics in ({"mean_age": estimate}, {"dice": replace(estimate, n=2)}):
        with pytest.raises(ContractViolation):
            gate.leave(EvaluateReply(site="n", round=1, metrics=metrics, seconds=0), request)


def test_small_cohort_returns_no_metric(site: Site) -> None:
    study = make_study(evaluation={"min_patients": 50})
    arrays = initial_arrays(study)["model"]
    reply = site.handle(Request(kind="evaluate", study=study, round=0, arrays=arrays))
    assert isinstance(reply, EvaluateReply) and reply.metrics == {}


# -- refusals -------------------------------------------------------------------------------------------------


def test_a_refusal_carries_a_code_and_the_site_keeps_the_story(site: Site) -> None:
    FAULTS["image-nan"](site.settings.data)
    reply = site.handle(Request(kind="hello", study=make_study()))
    assert reply == Refusal(site="north", kind="hello", round=0, reason=Reason.DATA_INVALID)
    fault = json.loads((site.settings.state / "last-fault.json").read_text())
    assert "sub-P001" in fault["text"] and fault["exit_code"] == 2
    assert "sub-P001" in (site.settings.state / "site.log").read_text()
    assert "sub-P001" not in Reason.DATA_INVALID.public_text


def test_a_state_folder_that_cannot_be_written_is_a_refusal(tmp_path: Path, site: Site) -> None:
    study = make_study()
    (tmp_path / "state").write_text("a file where the folder should be")
    reply = site.handle(Request(kind="train", study=study, round=1, arrays=initial_arrays(study)["model"]))
    assert isinstance(reply, Refusal) and reply.reason is Reason.ENVIRONMENT


# -- state ----------------------------------------------------------------------------------------------------


def test_a_restarted_site_goes_on_with_the_same_bits(tmp_path: Path, site: Site) -> None:
    study = make_study()
    first = train(site, study, 1, initial_arrays(study)["model"])
    second = train(site, study, 2, first.arrays)
    again = train(Site(site.settings), study, 2, first.arrays)
    fresh = train(Site(settings_of(tmp_path, state=tmp_path / "empty")), study, 2, first.arrays)
    assert {k: v.tobytes() for k, v in second.arrays.items()} == {k: v.tobytes() for k, v in again.arrays.items()}
    assert any((second.arrays[k] != fresh.arrays[k]).any() for k in second.arrays), "Adam's state must matter"


def test_a_round_that_is_asked_again_gives_the_same_bits(site: Site) -> None:
    """The coordinator lost the reply and asks again: the optimiser goes back to the round before."""
    study = make_study()
    arrays = initial_arrays(study)["model"]
    first = train(site, study, 1, arrays)
    again = train(site, study, 1, arrays)
    assert {k: v.tobytes() for k, v in first.arrays.items()} == {k: v.tobytes() for k, v in again.arrays.items()}


def test_private_rounds_add_up_in_the_ledger(site: Site) -> None:
    study = private_study(epsilon=3.0)
    first = train(site, study, 1, initial_arrays(study)["model"])
    second = train(Site(site.settings), study, 2, first.arrays)
    assert first.loss is None and first.noise_multiplier == second.noise_multiplier
    assert first.epsilon is not None and second.epsilon is not None
    assert 0 < first.epsilon < second.epsilon <= 3.0 * (1 + 1e-6)
    refused = site.handle(Request(kind="train", study=study, round=2, arrays=first.arrays))
    assert isinstance(refused, Refusal) and refused.reason is Reason.BUDGET_EXHAUSTED


def test_a_retried_private_round_is_charged_again_and_the_log_says_so(site: Site) -> None:
    study = private_study(epsilon=3.0)
    arrays = initial_arrays(study)["model"]
    first, again = train(site, study, 1, arrays), train(site, study, 1, arrays)
    assert (first.attempt, again.attempt) == (1, 2)
    assert first.epsilon is not None and again.epsilon is not None and again.epsilon > first.epsilon
    assert "train round 1: attempt 2; the privacy ledger was charged again" in (
        site.settings.state / "site.log"
    ).read_text(encoding="utf-8")


def test_a_ledger_that_was_put_back_is_refused_by_the_receipt_of_a_past_round(site: Site) -> None:
    """The state folder of before the study is restored: ledger and anchors agree, the receipt does not."""
    study = private_study(epsilon=8.0)
    first = train(site, study, 1, initial_arrays(study)["model"])
    for file in site.settings.state.glob("ledger.db*"):
        file.unlink()
    request = Request(kind="train", study=study, round=2, arrays=first.arrays, receipt=first.receipt)
    refused = Site(site.settings).handle(request)
    assert isinstance(refused, Refusal) and refused.reason is Reason.LEDGER_ROLLED_BACK
    fault = json.loads((site.settings.state / "last-fault.json").read_text())
    assert fault["exit_code"] == 3 and "the coordinator holds a receipt for entry 2" in fault["text"]


def test_the_delta_of_a_site_follows_its_public_size(site: Site) -> None:
    """Ten patients: 1e-2; the same study at a site of sixty charges and calibrates at 1e-3."""
    study = private_study(delta=0.0)
    large = Site(replace(site.settings, public_size=60, state=site.settings.state.with_name("large")))
    arrays = initial_arrays(study)["model"]
    small_reply, large_reply = train(site, study, 1, arrays), train(large, study, 1, arrays)
    assert small_reply.noise_multiplier == calibrate(study.privacy.epsilon, 1e-2, 0.5, study.total_steps)
    assert large_reply.noise_multiplier == calibrate(study.privacy.epsilon, 1e-3, 0.5, study.total_steps)
    for one, delta in ((site, 1e-2), (large, 1e-3)):
        assert Ledger(one.settings.ledger, "north").entries()[1].delta == delta
