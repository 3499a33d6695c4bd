# SPDX-License-Identifier: Apache-2.0
"""Only what changed goes down: bytes by hand, restarted sites, and models that are put together wrongly."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedneuro.client.held_model import HeldModel
from fedneuro.client.site import Site
from fedneuro.models.state import digest
from fedneuro.privacy.contract import HelloReply, Refusal, Reply, Request, Role, TrainReply, payload_bytes
from fedneuro.privacy.errors import ContractViolation, Reason
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import decode_request, encode_request
from fedneuro.privacy.wire_layout import uplink_names
from fedneuro.server.downlink import Downlink
from fedneuro.server.events import Event
from fedneuro.server.rounds import initial_arrays, run_study
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.rounds import write_tiny_site
from fedneuro.simulations.engines.inprocess import InProcessTransport
from fedneuro.simulations.sites import find_sites, site_settings
from tests.bids import make_study


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    for seed, name in enumerate(("east", "west")):
        write_tiny_site(folder / name, seed=seed, patients=5)
    return folder


def study_of(**sections: Any) -> Study:
    sections["training"] = {"local_steps": 1, "local_epochs": 0, "optimizer": "sgd"} | sections.get("training", {})
    evaluation = {"bootstrap": 100, "previews": 0, "metrics": ["dice"]}
    return make_study(model={"channels": [4, 8], "residual_units": 1}, evaluation=evaluation, **sections)


class Forgetful(InProcessTransport):
    """Every site is restarted before each message but *hello*, as in a node that loses its process."""

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        self._local.clear()
        yield from super().exchange(requests, timeout)


def run(
    study: Study, hospitals: Path, out: Path, kind: type[InProcessTransport] = InProcessTransport
) -> tuple[RunStore, list[Event]]:
    store, events = RunStore.create(out, study, engine="test"), list[Event]()
    with kind(site_settings(study, find_sites(hospitals), out)) as transport:
        run_study(study, transport, store, events.append)
    return store, events


def changes(store: RunStore) -> list[int]:
    """Bytes of the arrays that each of two rounds changed, at all."""
    models = [initial_arrays(store.study)["model"], store.groups(1)["model"], store.groups(2)["model"]]
    return [
        sum(array.nbytes for name, array in new.items() if array.tobytes() != old[name].tobytes())
        for old, new in itertools.pairwise(models)
    ]


@pytest.mark.parametrize(
    "sections",
    [{}, {"training": {"trainable": "head"}}, {"strategy": {"name": "fedbn"}}, {"wire": {"up": "float16"}}],
    ids=["all", "head", "fedbn", "float16"],
)
def test_bytes_by_hand(hospitals: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    """Whole models go down once. Then a round sends what it changed for the evaluation, and nothing for training.

    Biases before a normalisation have no gradient, so even where all is trained not all changes.
    """
    study = study_of(**sections)
    store, events = run(study, hospitals, tmp_path / "out")
    model, names = initial_arrays(study)["model"], uplink_names(study)
    whole = payload_bytes(model)
    part = sum(array.nbytes for name, array in model.items() if names is None or name in names)
    up = part // 2 if study.wire.up == "float16" else part
    changed = changes(store)
    assert [r.bytes_down for r in store.rounds()] == [2 * whole, *(2 * size for size in changed)]
    assert [r.bytes_up for r in store.rounds()] == [0, 2 * up, 2 * up]
    assert 0 < max(changed) <= part
    assert not [event for event in events if event.kind == "refused"]
    if sections:
        assert up < whole


def test_restarted_sites_get_the_whole_model_and_nobody_notices(hospitals: Path, tmp_path: Path) -> None:
    study = study_of()
    store, _ = run(study, hospitals, tmp_path / "out")
    other, events = run(study, hospitals, tmp_path / "forgetful", Forgetful)
    assert digest(store.groups(2)["model"]) == digest(other.groups(2)["model"])
    assert not [event for event in events if event.kind == "refused"]
    whole = payload_bytes(initial_arrays(study)["model"])
    # Round 1 finds that both sites forgot, twice: nothing, then all, to train; what changed, then all, to judge.
    assert [r.bytes_down for r in other.rounds()] == [2 * whole, 2 * (2 * whole + changes(store)[0]), 4 * whole]


def test_a_site_that_remembers_nothing_gets_everything() -> None:
    study, sent = study_of(), list[int]()
    arrays = initial_arrays(study)["model"]

    class Plain:
        def sites(self) -> list[str]:
            return ["A"]

        def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
            del timeout
            for site, request in requests.items():
                if request.kind == "hello":
                    yield HelloReply(site=site, role=Role.TRAIN, public_size=10)
                    continue
                assert not request.held
                sent.append(payload_bytes(request.arrays))
                yield TrainReply(site=site, round=request.round, arrays=arrays, steps=1, seconds=0)

    downlink = Downlink(Plain())
    list(downlink.exchange({"A": Request(kind="hello", study=study)}, 1))
    for number in (1, 2):
        list(downlink.exchange({"A": Request(kind="train", study=study, round=number, arrays=arrays)}, 1))
    assert sent == [payload_bytes(arrays)] * 2 and downlink.taken() == sum(sent) and downlink.taken() == 0


# -- at the site -------------------------------------------------------------------------------------------------


def request_of(study: Study, arrays: dict[str, Any] | None, held: str, number: int = 1) -> Request:
    return Request(kind="train", study=study, round=number, arrays=arrays, held=held)


def test_what_came_is_put_together_and_only_with_the_right_digest() -> None:
    study, other = study_of(), study_of(study={"seed": 1})
    old = {"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}
    new = {"a": np.full(2, 7, np.float32), "b": old["b"], "control/a": np.ones(2, np.float32)}
    held = HeldModel()
    with pytest.raises(ContractViolation) as caught:
        held.complete(request_of(study, None, digest(old)))
    assert caught.value.reason is Reason.MODEL_NOT_HELD
    held.keep(request_of(study, old, ""))
    came = {name: new[name] for name in ("a", "control/a")}
    whole = held.complete(request_of(study, came, digest(new)))
    assert whole.held == "" and whole.arrays is not None and digest(whole.arrays) == digest(new)
    for request in (
        request_of(other, came, digest(new)),  # another study's model is here
        request_of(study, {"a": new["a"]}, digest(new)),  # something is missing
        request_of(study, {**came, "b": old["b"] + 1}, digest(new)),  # something was changed on the way
    ):
        with pytest.raises(ContractViolation, match="builds on a model that is not here"):
            held.complete(request)


def test_a_message_may_hold_no_array_at_all_where_it_names_what_is_held() -> None:
    study = study_of()
    for arrays in (None, {"a": np.zeros(2, np.float32)}):
        back = decode_request(encode_request(request_of(study, arrays, "0" * 64)))
        assert back.held == "0" * 64 and (back.arrays is None) is (arrays is None)
    with pytest.raises(ContractViolation, match="without a model"):
        encode_request(request_of(study, None, ""))


def test_the_refusal_is_no_fault_of_the_hospital(tmp_path: Path, hospitals: Path) -> None:
    study = study_of()
    settings = site_settings(study, find_sites(hospitals), tmp_path)["east"]
    reply = Site(settings).handle(request_of(study, None, "0" * 64))
    assert reply == Refusal(site="east", kind="train", round=1, reason=Reason.MODEL_NOT_HELD)
    assert not (settings.state / "last-fault.json").exists()
