# SPDX-License-Identifier: Apache-2.0
"""Rounds in mode ``distributed`` at the server, over sites that keep the protocol and add vectors of our choice."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedneuro.privacy.budget import training_event
from fedneuro.privacy.contract import (
    EvaluateReply,
    HelloReply,
    KeysReply,
    MaskedReply,
    Refusal,
    Reply,
    Request,
    Role,
    SharesReply,
    UnmaskReply,
)
from fedneuro.privacy.errors import BadInput, QuorumLost, Reason, Refused
from fedneuro.privacy.secagg.grid import Grid
from fedneuro.privacy.secagg.keys import Identity
from fedneuro.privacy.secagg.participant import Participant, Terms
from fedneuro.privacy.study import Study
from fedneuro.server.events import Event
from fedneuro.server.results import build_results
from fedneuro.server.rounds import run_study
from fedneuro.server.store import RunStore
from fedneuro.server.strategies.pooled import PooledStep

IDENTITIES = {name: Identity.fresh() for name in "ABCDE"}


def study_of(**sections: dict[str, object]) -> Study:
    values: dict[str, dict[str, object]] = {
        "study": {"name": "t"},
        "data": {"patch": [16, 16]},
        "model": {"channels": [4, 8], "residual_units": 0},
        "training": {"rounds": 3, "local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.5},
        "privacy": {"mode": "distributed", "delta": 1e-2, "sample_rate": 0.5, "tolerate": 1},
        "evaluation": {"every": 0, "metrics": ["dice"], "validation_fraction": 0.2},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Study.parse(values)


class Sites:
    """Each site's vector is its public size everywhere, in units of the gradient; ``lost`` says who is silent when."""

    def __init__(self, names: str = "ABCD", lost: Callable[[str, Request], bool] = lambda *_: False) -> None:
        self.sizes = {name: 10 * (1 + index) for index, name in enumerate(names)}
        self.lost = lost
        self.asked: list[tuple[str, str, int]] = []
        self.parts: dict[str, Participant] = {}
        self.reason = Reason.LOST

    def sites(self) -> list[str]:
        return sorted(self.sizes)

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        del timeout
        for name, request in requests.items():
            self.asked.append((name, request.kind, request.round))
            if self.lost(name, request):
                yield Refusal(site=name, kind=request.kind, round=request.round, reason=self.reason)
            else:
                yield self.answer(name, request)

    def answer(self, name: str, request: Request) -> Reply:
        study, step, number = request.study, request.secure, request.round
        if request.kind == "hello":
            return HelloReply(
                site=name, role=Role.TRAIN, public_size=self.sizes[name], identity=IDENTITIES[name].public
            )
        if request.kind == "evaluate":
            return EvaluateReply(site=name, round=number, metrics={}, seconds=0)
        assert step is not None
        terms = Terms(study=study.hash, round=number, tolerate=study.privacy.tolerate, least=study.strategy.min_sites)
        if request.kind == "keys":
            self.parts[name] = Participant.begin(name, terms)
            return KeysReply(site=name, round=number, advert=self.parts[name].advert(IDENTITIES[name]))
        part = self.parts[name]
        if request.kind == "shares":
            return SharesReply(site=name, round=number, sealed=part.share(step.roster, step.adverts))
        if request.kind == "masked":
            assert request.arrays is not None
            part.enter(step.context, step.sealed)
            sigma = training_event(study, 10, steps=1).noise_multiplier
            size = sum(array.size for array in request.arrays.values())
            grid = Grid(
                clip=1.0, noise_multiplier=sigma, size=size, sites=len(part.roster), tolerate=part.terms.tolerate
            )
            vector = np.full(size, round(self.sizes[name] / grid.step), np.int64).view(np.uint64)
            part.mask(vector)
            return MaskedReply(
                site=name, round=number, vector=vector, seconds=0, epsilon=number * 1.0, noise_multiplier=sigma
            )
        seeds, keys = part.unmask(step.context, set(step.survivors))
        advert = None
        if number < study.training.rounds:
            self.parts[name] = Participant.begin(
                name, Terms(study=study.hash, round=number + 1, tolerate=terms.tolerate)
            )
            advert = self.parts[name].advert(IDENTITIES[name])
        return UnmaskReply(site=name, round=number, self_shares=seeds, key_shares=keys, advert=advert)


def run(out: Path, study: Study, sites: Sites, *, resume: bool = False) -> tuple[RunStore, list[Event]]:
    store = RunStore.resume(out, study, engine="test") if resume else RunStore.create(out, study, engine="test")
    events: list[Event] = []
    run_study(study, sites, store, events.append)
    return store, events


def moved(store: RunStore, number: int) -> float:
    """By how much the round moved the first weight."""
    before, after = store.groups(number - 1)["model"], store.groups(number)["model"]
    name = next(iter(after))
    return float(after[name].ravel()[0]) - float(before[name].ravel()[0])


def test_the_step_by_hand(tmp_path: Path) -> None:
    """Sum 10+20+30+40 = 100 over q·Σ sizes·0.8 = 40 is 2.5; with momentum 0.5 the third step is 2.5·(1 + .5 + .25)."""
    store, _ = run(tmp_path, study_of(), Sites())
    groups = store.groups(2)["model"]
    for name, array in store.groups(3)["model"].items():
        np.testing.assert_allclose(groups[name] - array, 0.5 * (2.5 * 1.75), rtol=1e-5)
    assert moved(store, 3) < 0


def test_a_round_costs_three_exchanges_after_the_first(tmp_path: Path) -> None:
    sites = Sites()
    run(tmp_path, study_of(), sites)
    kinds = [kind for name, kind, number in sites.asked if name == "A" and number]
    assert kinds == ["keys", *["shares", "masked", "unmask"] * 3, "evaluate"]


@pytest.mark.parametrize("step", ["keys", "shares", "masked", "unmask"])
def test_a_hospital_that_vanishes_at_a_step_costs_what_it_would_have_added(tmp_path: Path, step: str) -> None:
    """Without D: sum 60 over 0.5·60·0.8 = 24 is 2.5, too. After *masked* its vector is in the sum."""
    gone = Sites(lost=lambda name, r: name == "D" and r.kind == step and r.round == 1)
    store, events = run(tmp_path, study_of(), gone)
    assert store.status == "complete"
    first = store.rounds()[1]
    assert first.refusals == {"D": "lost"}
    assert sorted(first.train) == list("ABCD" if step == "unmask" else "ABC")
    assert store.rounds()[2].refusals == {}  # it is asked again in the next round, and answers
    assert [e.site for e in events if e.kind == "refused"] == ["D"]


def test_the_divisor_is_that_of_the_survivors(tmp_path: Path) -> None:
    """A vanishes: 20+30+40 = 90 over 0.5·90·0.8 = 36 is 2.5; with the divisor of all it would be 2.25."""
    gone = Sites(lost=lambda name, r: name == "A" and r.kind == "masked" and r.round == 3)
    store, _ = run(tmp_path, study_of(training={"momentum": 0.0}), gone)
    assert moved(store, 3) == pytest.approx(-0.5 * 2.5, rel=1e-4)


@pytest.mark.parametrize("step", ["shares", "masked", "unmask"])
def test_below_the_threshold_nothing_is_unmasked_and_the_round_is_tried_again(tmp_path: Path, step: str) -> None:
    once: list[str] = []

    def lost(name: str, request: Request) -> bool:
        if name in "CD" and request.kind == step and request.round == 2 and name not in once:
            once.append(name)
            return True
        return False

    sites = Sites(lost=lost)
    store, _ = run(tmp_path, study_of(), sites)
    assert store.status == "complete"
    second = [kind for name, kind, number in sites.asked if name == "A" and number == 2]
    fresh = ["keys", "shares", "masked", "unmask"]
    assert second == [*["shares", "masked", "unmask"][: ["shares", "masked", "unmask"].index(step) + 1], *fresh]
    assert store.rounds()[2].refusals == {}


def test_twice_below_the_threshold_is_a_lost_quorum_that_resumes(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", study_of(), Sites())
    cut = Sites(lost=lambda name, r: name in "CD" and r.kind == "masked" and r.round == 2)
    with pytest.raises(
        QuorumLost, match=r"2 of 4 training sites answered when asked to send a masked vector in round 2, 3"
    ):
        run(tmp_path / "cut", study_of(), cut)
    assert ("A", "unmask", 2) not in cut.asked
    store, _ = run(tmp_path / "cut", study_of(), Sites(), resume=True)
    for name, array in whole.groups(3)["model"].items():
        np.testing.assert_allclose(array, store.groups(3)["model"][name], rtol=1e-6)
        assert array.tobytes() == store.groups(3)["model"][name].tobytes(), "momentum must be resumed"


def test_budgets_that_say_no_are_a_refusal(tmp_path: Path) -> None:
    sites = Sites(lost=lambda name, r: name in "CD" and r.kind == "masked")
    sites.reason = Reason.BUDGET_EXHAUSTED
    with pytest.raises(Refused, match="budget-exhausted"):
        run(tmp_path, study_of(), sites)


def test_too_few_hospitals_for_the_mode(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="needs two that stay"):
        run(tmp_path, study_of(privacy={"tolerate": 0}), Sites("A"))
    with pytest.raises(BadInput, match="fewer than a third"):
        run(tmp_path, study_of(), Sites("ABC"))


def test_min_sites_raises_the_threshold(tmp_path: Path) -> None:
    sites = Sites(lost=lambda name, r: name == "D" and r.kind == "masked")
    with pytest.raises(QuorumLost, match=r"3 of 4 .* 4 are needed"):
        run(tmp_path, study_of(strategy={"min_sites": 4}), sites)


@pytest.mark.parametrize("change", ["sigma", "shape", "shares", "advert"])
def test_an_answer_that_breaks_the_protocol_counts_as_a_dropout(tmp_path: Path, change: str) -> None:
    class Odd(Sites):
        def answer(self, name: str, request: Request) -> Reply:
            reply = super().answer(name, request)
            if name != "B":
                return reply
            if change == "sigma" and isinstance(reply, MaskedReply):
                return replaced(reply, noise_multiplier=1.0)
            if change == "shape" and isinstance(reply, MaskedReply):
                return replaced(reply, vector=reply.vector[:-1])
            if change == "shares" and isinstance(reply, SharesReply):
                return replaced(reply, sealed={})
            if change == "advert" and isinstance(reply, KeysReply):
                return replaced(reply, advert=self.parts[name].advert(IDENTITIES["A"]))
            return reply

    store, _ = run(tmp_path, study_of(), Odd())
    assert store.rounds()[1].refusals == {"B": "contract-violation"}


def replaced(reply: Any, **changes: Any) -> Reply:
    values = {name: getattr(reply, name) for name in type(reply).__dataclass_fields__} | changes
    made: Reply = type(reply)(**values)
    return made


def test_results_say_the_mode_and_against_whom(tmp_path: Path) -> None:
    store, _ = run(tmp_path, study_of(), Sites())
    privacy = build_results(store)["privacy"]
    assert (privacy["mode"], privacy["tolerate"], privacy["epsilon"]) == ("distributed", 1, dict.fromkeys("ABCD", 3.0))
    assert "only the sum over the hospitals" in privacy["protects_against"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_optimiser_resumes_to_the_same_bits(optimizer: str) -> None:
    study = study_of(
        training={"optimizer": optimizer, "momentum": 0.0 if optimizer != "sgd" else 0.9, "schedule": "cosine"}
    )
    one, two = PooledStep(study), PooledStep(study)
    rng = np.random.default_rng(0)
    model: Any = _start(study)
    first = one.step(1, model, rng.standard_normal(one.size), 0.1)
    two.load_state({k: dict(v) for k, v in one.state().items()})
    gradient = rng.standard_normal(one.size)
    left, right = one.step(2, first, gradient, 0.1), two.step(2, first, gradient, 0.1)
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_the_schedule_is_over_rounds() -> None:
    """Cosine over 3 rounds: the second step is 0.5·(1 + cos(π/3)) = 0.75 of the rate."""
    study = study_of(training={"schedule": "cosine", "momentum": 0.0})
    step, model = PooledStep(study), _start(study)
    after = step.step(2, model, np.ones(step.size), 0.1)
    name = next(iter(model))
    np.testing.assert_allclose(model[name] - after[name], 0.5 * 0.5 * (1 + math.cos(math.pi / 3)), rtol=1e-5)


def _start(study: Study) -> Any:
    from fedneuro.server.rounds import initial_arrays

    return initial_arrays(study)["model"]
