# SPDX-License-Identifier: Apache-2.0
"""Real hospitals in mode ``distributed``: what they add up to, what they are charged, and what they refuse."""

import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedneuro.client.secure_training import identity_of
from fedneuro.client.session import Session, stream
from fedneuro.client.settings import SiteSettings
from fedneuro.client.site import Site
from fedneuro.privacy.contract import (
    HelloReply,
    KeysReply,
    MaskedReply,
    Refusal,
    Reply,
    Request,
    Role,
    SecureStep,
    SharesReply,
    UnmaskReply,
)
from fedneuro.privacy.dpsgd import PatientGradient
from fedneuro.privacy.errors import Reason
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.noise import SecureRandom
from fedneuro.privacy.secagg.aggregator import Aggregation
from fedneuro.privacy.secagg.grid import Grid
from fedneuro.privacy.secagg.keys import Identity, fingerprint
from fedneuro.privacy.secagg.participant import Terms
from fedneuro.privacy.study import Study
from fedneuro.server.rounds import initial_arrays
from tests.bids import make_study, write_site

NAMES = ("east", "north", "south", "west")


def study_of(**privacy: Any) -> Study:
    return make_study(
        training={"local_steps": 1, "local_epochs": 0, "rounds": 2},
        privacy={
            "mode": "distributed", "delta": 1e-2, "sample_rate": 1.0, "crops_per_patient": 2, "tolerate": 1,
            "epsilon": 20.0, **privacy,
        },
        evaluation={"previews": 0},
    )  # fmt: skip


STUDY = study_of()


class Hospitals:
    """Four hospitals; each step goes to all of them that are not ``silent``."""

    def __init__(self, folder: Path) -> None:
        self.sites: dict[str, Site] = {}
        for seed, name in enumerate(NAMES):
            write_site(folder / name, patients=3, shape=(18, 18, 4), seed=seed)
            settings = SiteSettings(
                name=name, data=folder / name, state=folder / "state" / name, role=Role.TRAIN, public_size=10
            )
            self.sites[name] = Site(settings)
        self.arrays = initial_arrays(STUDY)["model"]
        self.size = sum(array.size for array in self.arrays.values())

    @property
    def roster(self) -> dict[str, bytes]:
        return {name: identity_of(site.settings).public for name, site in self.sites.items()}

    def ask(self, name: str, kind: Any, number: int = 1, **step: Any) -> Reply:
        arrays = self.arrays if kind == "masked" else None
        return self.sites[name].handle(
            Request(kind=kind, study=STUDY, round=number, arrays=arrays, secure=SecureStep(**step))
        )

    def told(self, name: str) -> str:
        return str(json.loads((self.sites[name].settings.state / "last-fault.json").read_text())["text"])

    def keys(self, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
        replies = {name: self.ask(name, "keys", roster=self.roster) for name in names}
        assert all(isinstance(reply, KeysReply) for reply in replies.values()), [self.told(n) for n in names]
        return {name: reply.advert for name, reply in replies.items() if isinstance(reply, KeysReply)}

    def until_masked(self, number: int = 1, adverts: Mapping[str, Any] | None = None) -> Aggregation:
        """Keys and shares of all, ready for the masked step."""
        adverts = adverts or self.keys()
        terms = Terms(study=STUDY.hash, round=number, tolerate=STUDY.privacy.tolerate)
        aggregation = Aggregation(terms, self.roster, adverts, self.size)
        for name in adverts:
            reply = self.ask(name, "shares", number, roster=self.roster, adverts=adverts)
            assert isinstance(reply, SharesReply), self.told(name)
            aggregation.take_shares(name, reply.sealed)
        return aggregation

    def masked(self, aggregation: Aggregation, name: str, number: int = 1) -> Reply:
        return self.ask(name, "masked", number, context=aggregation.context, sealed=aggregation.sealed_for(name))

    def finish(self, aggregation: Aggregation, number: int = 1) -> tuple[np.ndarray, dict[str, Any]]:
        """The last step, over those whose vector was folded; the next round's keys."""
        adverts = {}
        for name in aggregation.survivors:
            reply = self.ask(
                name, "unmask", number, context=aggregation.context, survivors=tuple(aggregation.survivors)
            )
            assert isinstance(reply, UnmaskReply), self.told(name)
            aggregation.take_unmask(name, reply.self_shares, reply.key_shares)
            adverts[name] = reply.advert
        return aggregation.finish(), adverts


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    yield Hospitals(tmp_path_factory.mktemp("hospitals"))


def plain_sum(site: Site) -> np.ndarray:
    """The site's clipped gradients of round 1 with every patient in it, summed by the engine itself."""
    session = Session(site.settings, STUDY)
    session.load(initial_arrays(STUDY)["model"])
    session.network.train()
    engine = PatientGradient(
        session.network, session.loss, clip=1.0, noise_multiplier=1.0, expected_patients=1.0, random=SecureRandom()
    )
    assert session.crops is not None
    for patient in session.trained:
        images, labels = session.crops.of_patient(patient, 2, stream(STUDY, site.settings.name, 1, 0, patient))
        engine.accumulate(images, labels)
    return engine.take_sum().double().numpy()


def test_two_rounds_of_real_hospitals_add_up_to_the_clipped_sum_and_the_noise(hospitals: Hospitals) -> None:
    """One of four vanishes: what is left of the sum is the noise of three of three, which is σC exactly."""
    aggregation = hospitals.until_masked()
    epsilons, sigma = [], math.nan
    for name in NAMES[:3]:
        reply = hospitals.masked(aggregation, name)
        assert isinstance(reply, MaskedReply), hospitals.told(name)
        aggregation.fold(name, reply.vector)
        epsilons.append(reply.epsilon)
        sigma = reply.noise_multiplier
    total, adverts = hospitals.finish(aggregation)
    grid = Grid(clip=1.0, noise_multiplier=sigma, size=hospitals.size, sites=4, tolerate=1)
    plain = np.sum([plain_sum(hospitals.sites[name]) for name in NAMES[:3]], axis=0)
    noise = grid.read(total) - plain
    # Along the plain sum: with it taken off a standard normal number is left, before that it stands out.
    along = plain / np.linalg.norm(plain) / sigma
    assert abs(noise @ along) < 5
    assert grid.read(total) @ along > 8
    assert stats.kstest(noise / sigma, "norm").pvalue > 1e-6
    assert stats.kstest(noise / (0.7 * sigma), "norm").pvalue < 1e-6
    assert noise.std() == pytest.approx(sigma, rel=6 / math.sqrt(2 * noise.size))
    assert len(set(epsilons)) == 1
    # The next round begins with the keys that came with the last answer; whoever vanished makes new ones.
    west = hospitals.ask("west", "keys", 2, roster=hospitals.roster)
    assert isinstance(west, KeysReply)
    second = hospitals.until_masked(2, {**adverts, "west": west.advert})
    replies = [hospitals.masked(second, name, 2) for name in NAMES]
    for name, reply in zip(NAMES, replies, strict=True):
        assert isinstance(reply, MaskedReply)
        second.fold(name, reply.vector)
        assert reply.epsilon <= STUDY.privacy.epsilon * (1 + 1e-6)
    _, after = hospitals.finish(second, 2)
    assert set(after.values()) == {None}  # the study is over


@pytest.fixture
def fresh(tmp_path: Path) -> Hospitals:
    return Hospitals(tmp_path)


def test_a_step_is_taken_once_also_by_a_restarted_node_and_every_attempt_is_charged(fresh: Hospitals) -> None:
    aggregation = fresh.until_masked()
    first = fresh.masked(aggregation, "east")
    assert isinstance(first, MaskedReply)
    fresh.sites["east"] = Site(fresh.sites["east"].settings)  # a restart
    again = fresh.masked(aggregation, "east")
    assert isinstance(again, Refusal) and again.reason is Reason.OUT_OF_STEP
    settings = fresh.sites["east"].settings
    ledger = Ledger(settings.ledger, "east")
    assert len(ledger.events(STUDY.hash, settings.dataset_id)) == 1
    # The state between the steps is the owner's alone, and holds no secret of its own once the vector has left.
    state = next(settings.state.glob("*/aggregation.json"))
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    kept = json.loads(state.read_text())
    assert (kept["step"], kept["keys"], kept["seed"]) == ("masked", ["", ""], "")
    retried = fresh.masked(fresh.until_masked(), "east")
    assert isinstance(retried, MaskedReply) and retried.attempt == 2
    assert retried.epsilon > first.epsilon


def test_the_ledger_says_no_before_anything_is_sent(fresh: Hospitals) -> None:
    for _ in range(2):
        assert isinstance(fresh.masked(fresh.until_masked(), "east"), MaskedReply)
    refused = fresh.masked(fresh.until_masked(), "east")  # a third attempt of two rounds
    assert isinstance(refused, Refusal) and refused.reason is Reason.BUDGET_EXHAUSTED


def test_hospitals_know_each_other_by_their_keys(fresh: Hospitals, tmp_path: Path) -> None:
    fresh.keys(("east",))  # remembers the three others
    stranger = {**fresh.roster, "west": Identity.fresh().public}
    reply = fresh.ask("east", "keys", roster=stranger)
    assert isinstance(reply, Refusal) and reply.reason is Reason.POLICY_REFUSED
    assert "west came with a key that this hospital does not know" in fresh.told("east")
    own = {**fresh.roster, "east": Identity.fresh().public}
    reply = fresh.ask("east", "keys", roster=own)
    assert isinstance(reply, Refusal) and reply.reason is Reason.CONTRACT_VIOLATION
    # A hospital that lists its peers takes no other, not even at first sight.
    known = frozenset((name, fingerprint(public)) for name, public in fresh.roster.items() if name != "north")
    settings = replace(fresh.sites["east"].settings, state=tmp_path / "other", peers=known)
    settings = replace(settings, identity=fresh.sites["east"].settings.state / "identity.key")
    fresh.sites["east"] = Site(settings)
    reply = fresh.ask("east", "keys", roster=fresh.roster)
    assert isinstance(reply, Refusal) and reply.reason is Reason.POLICY_REFUSED
    without = {name: public for name, public in fresh.roster.items() if name != "north"}
    known_only = fresh.ask("east", "keys", roster=without)
    assert isinstance(known_only, KeysReply)


def test_the_gate_lets_a_step_into_its_own_mode_only(fresh: Hospitals) -> None:
    site, arrays = fresh.sites["east"], fresh.arrays
    hello = site.handle(Request(kind="hello", study=STUDY))
    assert isinstance(hello, HelloReply) and hello.identity == fresh.roster["east"]
    plain = site.handle(Request(kind="train", study=STUDY, round=1, arrays=arrays))
    assert isinstance(plain, Refusal) and plain.reason is Reason.CONTRACT_VIOLATION
    other = make_study()
    step = site.handle(Request(kind="keys", study=other, round=1, secure=SecureStep(roster=fresh.roster)))
    assert isinstance(step, Refusal) and step.reason is Reason.CONTRACT_VIOLATION
    heldout = Site(replace(site.settings, role=Role.HELDOUT))
    study = Study.parse({**STUDY.model_dump(mode="json"), "evaluation": {"heldout": ["east"]}})
    step = heldout.handle(Request(kind="keys", study=study, round=1, secure=SecureStep(roster=fresh.roster)))
    assert isinstance(step, Refusal) and step.reason is Reason.ROLE_REFUSED


def test_shares_without_keys_are_out_of_step(fresh: Hospitals) -> None:
    reply = fresh.ask("east", "shares", roster=fresh.roster, adverts={})
    assert isinstance(reply, Refusal) and reply.reason is Reason.OUT_OF_STEP
