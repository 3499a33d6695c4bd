# SPDX-License-Identifier: Apache-2.0
"""A strategy's part at the site: its terms by hand, what leaves and what never does, and what a restart finds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedneuro.client import gate
from fedneuro.client.methods import Drift, Pull
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.models.state import digest, load_saved
from fedneuro.privacy.contract import Arrays, EvaluateReply, Refusal, Request, Role, TrainReply, shapes_of
from fedneuro.privacy.errors import ContractViolation, Reason
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire_layout import CONTROL, reply_shapes, stays
from fedneuro.privacy.wire_numbers import SCALE, decode
from fedneuro.server.rounds import initial_arrays
from fedneuro.server.strategies import build_strategy
from fedneuro.server.uplink import Uplink
from tests.bids import make_study, write_site

FEDBN: dict[str, Any] = {"strategy": {"name": "fedbn"}}
DITTO: dict[str, Any] = {"strategy": {"name": "ditto", "proximal": 1.0}, "evaluation": {"select": "last"}}
SCAFFOLD: dict[str, Any] = {"strategy": {"name": "scaffold"}}
INT8: dict[str, Any] = {"wire": {"up": "int8"}}


def study_of(**sections: Any) -> Study:
    training = {"rounds": 3, "local_steps": 2, "local_epochs": 0, "optimizer": "sgd", "learning_rate": 0.1}
    sections["training"] = training | sections.get("training", {})
    sections["evaluation"] = {"bootstrap": 100, "previews": 0, "metrics": ["dice"]} | sections.get("evaluation", {})
    return make_study(model={"channels": [4, 8], "residual_units": 1}, **sections)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write_site(tmp_path / "north", patients=5, shape=(18, 18, 4))
    settings = SiteSettings(
        name="north", data=tmp_path / "north", state=tmp_path / "state", role=Role.TRAIN, public_size=10
    )
    return Site(settings)


def model_of(study: Study) -> dict[str, NDArray[Any]]:
    return dict(initial_arrays(study)["model"])


def train(site: Site, study: Study, number: int, arrays: Arrays) -> TrainReply:
    reply = site.handle(Request(kind="train", study=study, round=number, arrays=arrays))
    assert isinstance(reply, TrainReply), (reply, (site.settings.state / "last-fault.json").read_text())
    return reply


def kept(site: Site, study: Study, name: str) -> dict[str, NDArray[Any]]:
    return load_saved(site.settings.state / study.hash[:16] / f"{name}.safetensors")[0]


# -- terms by hand ---------------------------------------------------------------------------------------------


def test_pull_and_drift_by_hand() -> None:
    """At w = 3 with anchor 1 and strength 1/2 the pull is 1; a drift of -5 follows."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 1.0)
    layer.bias.requires_grad_(False)
    pull, drift = Pull(layer.parameters(), 0.5), Drift([layer.get_parameter("weight")], [torch.tensor([[-5.0]])])
    nn.init.constant_(layer.weight, 3.0)
    layer.weight.grad = torch.tensor([[10.0]])
    pull.add()
    assert layer.weight.grad.item() == 11
    drift.add()
    assert layer.weight.grad.item() == 6
    assert layer.bias.grad is None


@pytest.mark.parametrize(("name", "limit"), [("fedavg", 0.604), ("scaffold", 0.8)])
def test_scaffold_finds_the_optimum_that_fedavg_misses(name: str, limit: float) -> None:
    """Sites a/2 (w - b)² with (a, b) = (1, 0) and (4, 1), ten steps of 0.1 a round.

    The optimum of the sum is 4 / (1 + 4) = 0.8. A site's ten steps leave r = (1 - 0.1 a)^10 of its distance: 0.349 and
    0.006. FedAvg rests where (1 - r1)(0 - w) + (1 - r2)(1 - w) = 0: w = 0.994 / 1.645 = 0.604.
    """
    study = study_of(strategy={"name": name}, training={"local_steps": 10})
    strategy, model = build_strategy(study), {"w": np.zeros(1, np.float32)}
    own = {0: np.zeros(1, np.float32), 1: np.zeros(1, np.float32)}
    for _ in range(60):
        strategy.begin(model, [10, 10])
        control = strategy.extra().get(CONTROL + "w", np.zeros(1, np.float32)).astype(np.float32)
        for index, (a, b) in enumerate([(1.0, 0.0), (4.0, 1.0)]):
            w = nn.Parameter(torch.from_numpy(model["w"].copy()))
            optimizer = torch.optim.SGD([w], 0.1)
            term = Drift([w], [torch.from_numpy(control - own[index])])
            for _ in range(10):
                w.grad = a * (w.detach() - b)
                if name == "scaffold":
                    term.add()
                optimizer.step()
            after = w.detach().numpy()
            own[index] = (own[index] - control + (model["w"] - after) / 1.0).astype(np.float32)
            strategy.fold({"w": after.copy()}, 10)
        model = {"w": np.asarray(strategy.finish()["w"], np.float32)}
    assert model["w"][0] == pytest.approx(limit, abs=1e-3)


# -- what leaves, and what does not ------------------------------------------------------------------------------


def test_fedbn_keeps_normalisations_at_the_site(site: Site) -> None:
    study = study_of(**FEDBN)
    model, local = model_of(study), stays(study)
    assert local and all(".N." in name or "norm" in name.lower() for name in local)
    first = train(site, study, 1, model)
    assert set(first.arrays) == set(model) - local
    norms = kept(site, study, "norms-00001")
    assert set(norms) == local and any((norms[name] != model[name]).any() for name in local)


def test_the_gate_lets_nothing_out_that_stays(site: Site) -> None:
    study = study_of(**FEDBN)
    model = model_of(study)
    request = Request(kind="train", study=study, round=1, arrays=model)
    good = train(site, study, 1, model)
    gate.leave(good, request)
    extra = next(iter(stays(study)))
    for arrays in (model, {**good.arrays, extra: model[extra]}, {**good.arrays, "personal": model[extra]}):
        with pytest.raises(ContractViolation, match="arrays differ from the contract"):
            gate.leave(replace(good, arrays=arrays), request)


def test_frozen_arrays_do_not_come_back(site: Site) -> None:
    study = study_of(training={"trainable": "head"})
    model = model_of(study)
    reply = train(site, study, 1, model)
    assert 0 < len(reply.arrays) < 5 and set(reply.arrays) < set(model)
    uplink = Uplink(study, model)
    whole = uplink.whole(uplink.read(reply.arrays))
    assert list(whole) == list(model)
    assert {name for name in model if (whole[name] != model[name]).any()} == set(reply.arrays)


def test_a_rounded_reply_is_agreed_and_an_exact_one_is_not(site: Site) -> None:
    study = study_of(**INT8)
    model = model_of(study)
    reply = train(site, study, 1, model)
    assert shapes_of(reply.arrays) == reply_shapes(study, shapes_of(model))
    assert {a.dtype.name for n, a in reply.arrays.items() if not n.startswith(SCALE)} == {"int8"}
    request = Request(kind="train", study=study, round=1, arrays=model)
    with pytest.raises(ContractViolation):
        gate.leave(replace(reply, arrays=model), request)
    assert "sent as int8" in (site.settings.state / "site.log").read_text()


def test_error_feedback_goes_into_the_next_round(site: Site) -> None:
    """What two rounds sent, and what is left over, is what two rounds learned; without feedback nothing is kept."""
    study, exact = study_of(**INT8), study_of()
    model = model_of(study)
    first = train(site, study, 1, model)
    left = kept(site, study, "residual-00001")
    plain = train(Site(replace(site.settings, state=site.settings.state / "exact")), exact, 1, model)
    changes = decode(first.arrays, "int8")
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(changes[name] + left[name], np.subtract(array, model[name]), atol=1e-7)
    second = train(site, study, 2, model)
    without = study_of(wire={"up": "int8", "error_feedback": False})
    other = Site(replace(site.settings, state=site.settings.state / "without"))
    train(other, without, 1, model)
    assert digest(train(other, without, 2, model).arrays) != digest(second.arrays)
    assert not (other.settings.state / without.hash[:16] / "residual-00001.safetensors").exists()


# -- scaffold ----------------------------------------------------------------------------------------------------


def test_the_variate_of_a_real_site_follows_option_two(site: Site) -> None:
    """K η = 2 · 0.1. Round 1: c_i = (x - y) / 0.2. Round 2, with c = 1/100: c_i ← c_i - c + (x - y) / 0.2."""
    study = study_of(**SCAFFOLD)
    model = model_of(study)
    first = train(site, study, 1, model)
    one = kept(site, study, "variate-00001")
    control = {CONTROL + name: np.full_like(array, 0.01) for name, array in model.items()}
    second = train(site, study, 2, model | control)
    two = kept(site, study, "variate-00002")
    assert set(second.arrays) == set(model)
    for name, array in model.items():
        np.testing.assert_allclose(one[name], (array - first.arrays[name]) / 0.2, rtol=1e-4, atol=1e-6)
        expected = one[name] - 0.01 + (array - second.arrays[name]) / 0.2
        np.testing.assert_allclose(two[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", ["not-asked-for", "shape", "name", "nan"])
def test_a_control_variate_that_was_not_agreed_is_refused(site: Site, fault: str) -> None:
    study = study_of(**({} if fault == "not-asked-for" else SCAFFOLD))
    model = model_of(study)
    control = {CONTROL + name: np.zeros_like(array) for name, array in model.items()}
    last = next(reversed(control))
    if fault == "shape":
        control[last] = np.zeros((2, 2), np.float32)
    elif fault == "name":
        control[CONTROL + "other"] = control.pop(last)
    elif fault == "nan":
        control[last] = np.full_like(control[last], np.nan)
    reply = site.handle(Request(kind="train", study=study, round=1, arrays=model | control))
    assert isinstance(reply, Refusal)
    assert reply.reason is (Reason.NON_FINITE if fault == "nan" else Reason.CONTRACT_VIOLATION)


# -- fedprox -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "local"])
def test_the_pull_keeps_a_site_near_the_global_model(site: Site, mode: str) -> None:
    """η · mu = 0.1 · 5 = 1/2 a step: under noise four steps go sqrt(1 + 1/4 + 1/16 + 1/64) = 1.15, not 2 deviations."""
    private = {"mode": mode, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 2, "epsilon": 4.0}
    moved = []
    for strategy in ({"name": "fedavg"}, {"name": "fedprox", "proximal": 5.0}):
        study = study_of(
            training={"local_steps": 4}, strategy=strategy, privacy=private if mode == "local" else {"mode": "none"}
        )
        model = model_of(study)
        reply = train(site, study, 1, model)
        moved.append(np.sqrt(sum(float(np.sum(np.subtract(a, model[n]) ** 2)) for n, a in reply.arrays.items())))
    assert moved[1] < 0.75 * moved[0]


# -- what lives on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections", [FEDBN, SCAFFOLD, DITTO, INT8, SCAFFOLD | INT8], ids=["fedbn", "scaffold", "ditto", "int8", "both"]
)
def test_a_restart_and_a_repeated_round_give_the_same_bits(
    tmp_path: Path, site: Site, sections: dict[str, Any]
) -> None:
    study = study_of(**sections)
    model = model_of(study)
    train(site, study, 1, model)
    second = train(site, study, 2, model)
    judged = site.handle(Request(kind="evaluate", study=study, round=2, arrays=model))
    again = train(site, study, 2, model)
    restarted = Site(site.settings)
    third = train(restarted, study, 2, model)
    assert digest(second.arrays) == digest(again.arrays) == digest(third.arrays)
    judged_again = restarted.handle(Request(kind="evaluate", study=study, round=2, arrays=model))
    assert isinstance(judged, EvaluateReply) and isinstance(judged_again, EvaluateReply)
    assert judged.metrics == judged_again.metrics
    names = {path.name for path in (site.settings.state / study.hash[:16]).glob("*-*.safetensors")}
    assert names and not any("00000" in name for name in names)
    if sections is not DITTO:
        fresh = train(Site(replace(site.settings, state=tmp_path / "empty")), study, 2, model)
        assert digest(fresh.arrays) != digest(second.arrays), "what the site keeps must matter"


def test_ditto_trains_a_personal_model_that_never_leaves_and_judges_with_it(site: Site) -> None:
    study, plain = study_of(**DITTO), study_of()
    model = model_of(study)
    reply = train(site, study, 1, model)
    other = train(Site(replace(site.settings, state=site.settings.state / "plain")), plain, 1, model)
    assert digest(reply.arrays) == digest(other.arrays), "what leaves is FedAvg's"
    personal = {n.removeprefix("model/"): a for n, a in kept(site, study, "personal-00001").items()}
    assert digest(personal) not in (digest(model), digest(reply.arrays))
    site.handle(Request(kind="evaluate", study=study, round=1, arrays=model))
    assert site._session is not None
    loaded = {n: p.detach().numpy() for n, p in site._session.network.named_parameters()}
    assert digest(loaded) == digest(personal)


def test_a_study_that_begins_anew_forgets_what_the_site_had(site: Site) -> None:
    study = study_of(**SCAFFOLD)
    model = model_of(study)
    first = train(site, study, 1, model)
    train(site, study, 2, model)
    assert digest(train(site, study, 1, model).arrays) == digest(first.arrays)
    assert not (site.settings.state / study.hash[:16] / "variate-00002.safetensors").exists()
