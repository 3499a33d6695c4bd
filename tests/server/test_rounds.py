# SPDX-License-Identifier: Apache-2.0
"""The coordinator over a transport whose sites answer as the test says: joining, quorum, selection, resume."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedneuro.privacy.contract import (
    Estimate,
    EvaluateReply,
    HelloReply,
    Receipt,
    Refusal,
    Reply,
    Request,
    Role,
    TrainReply,
)
from fedneuro.privacy.errors import QuorumLost, Reason, Refused, StateError, StudyError
from fedneuro.privacy.study import Study
from fedneuro.server.events import Event
from fedneuro.server.results import build_results
from fedneuro.server.rounds import initial_arrays, run_study
from fedneuro.server.store import RunStore

Answer = Callable[[str, Request], Reply]


def study_of(**sections: dict[str, object]) -> Study:
    values: dict[str, dict[str, object]] = {
        "study": {"name": "t"},
        "data": {"patch": [16, 16]},
        "model": {"channels": [4, 8], "residual_units": 0},
        "training": {"rounds": 3, "local_steps": 1},
        "privacy": {"mode": "none"},
        "evaluation": {"heldout": ["C"], "metrics": ["dice"]},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return Study.parse(values)


def answer(site: str, request: Request, *, score: float = 0.5) -> Reply:
    """A site that adds its own number to every weight."""
    if request.kind == "hello":
        role = Role.HELDOUT if site in request.study.evaluation.heldout else Role.TRAIN
        return HelloReply(site=site, role=role, public_size=10)
    if request.kind == "evaluate":
        estimate = Estimate(mean=score, low=score, high=score, n=3)
        return EvaluateReply(site=site, round=request.round, metrics={"dice": estimate}, seconds=0)
    assert request.arrays is not None
    step = 1 if site == "A" else 3
    return TrainReply(
        site=site,
        round=request.round,
        arrays={k: np.add(v, step, dtype=np.float32) for k, v in request.arrays.items()},
        steps=1,
        seconds=0,
        loss=1.0,
    )


class Sites:
    def __init__(self, answer: Answer = answer, names: tuple[str, ...] = ("A", "B", "C")) -> None:
        self.answer, self.names = answer, names
        self.asked: list[tuple[str, str, int]] = []

    def sites(self) -> list[str]:
        return list(self.names)

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        del timeout
        for site, request in requests.items():
            self.asked.append((site, request.kind, request.round))
            yield self.answer(site, request)


def run(out: Path, study: Study, sites: Sites, *, resume: bool = False) -> tuple[RunStore, list[Event]]:
    store = RunStore.resume(out, study, engine="test") if resume else RunStore.create(out, study, engine="test")
    events: list[Event] = []
    run_study(study, sites, store, events.append)
    return store, events


def refuse(site: str, reason: Reason, kind: str = "train", since: int = 1, until: int = 99) -> Answer:
    def reply(name: str, request: Request) -> Reply:
        if name == site and request.kind == kind and since <= request.round <= until:
            return Refusal(site=site, kind=request.kind, round=request.round, reason=reason)
        return answer(name, request)

    return reply


def test_mean_of_updates_by_hand(tmp_path: Path) -> None:
    """Equal public sizes: every round adds (1 + 3) / 2 = 2 to every weight; three rounds add 6."""
    store, _ = run(tmp_path, study_of(), Sites())
    first, last = store.groups(2)["model"], store.groups(3)["model"]
    for name in first:
        np.testing.assert_allclose(last[name] - first[name], 2, atol=1e-5)


def test_heldout_site_is_never_asked_to_train(tmp_path: Path) -> None:
    sites = Sites()
    run(tmp_path, study_of(), sites)
    assert {kind for site, kind, _ in sites.asked if site == "C"} == {"hello", "evaluate"}


def test_best_round_is_chosen_on_training_sites_only(tmp_path: Path) -> None:
    """Training sites are best in round 2, the held-out site in round 3: round 2 is chosen."""
    scores = {("A", 1): 0.1, ("A", 2): 0.8, ("A", 3): 0.2, ("C", 3): 0.99}
    sites = Sites(lambda s, r: answer(s, r, score=scores.get((s, r.round), 0.3)))
    store, _ = run(tmp_path, study_of(), sites)
    results = build_results(store)
    assert results["selected_round"] == 2
    assert results["select"]["value"] == pytest.approx((0.8 + 0.3) / 2)
    assert results["sites"]["C"]["role"] == "heldout"


def test_untrained_model_is_never_chosen(tmp_path: Path) -> None:
    sites = Sites(lambda s, r: answer(s, r, score=0.9 if r.round == 0 else 0.1))
    store, _ = run(tmp_path, study_of(), sites)
    assert build_results(store)["selected_round"] == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_bad_update_is_excluded_and_named(tmp_path: Path, value: float) -> None:
    def poison(site: str, request: Request) -> Reply:
        reply = answer(site, request)
        if isinstance(reply, TrainReply) and site == "B":
            for array in reply.arrays.values():
                array.flat[0] = value
        return reply

    store, events = run(tmp_path, study_of(strategy={"min_sites": 1}), Sites(poison))
    assert [r.refusals for r in store.rounds()[1:]] == [{"B": "non-finite"}] * 3
    assert ("B", "non-finite") in {(e.site, e.values["reason"]) for e in events if e.kind == "refused"}
    assert all(np.isfinite(a).all() for a in store.groups(3)["model"].values())


def test_lost_site_ends_the_run_and_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", study_of(), Sites())
    with pytest.raises(QuorumLost, match=r"1 of 2 training sites.*round 2.*B: lost"):
        run(tmp_path / "cut", study_of(), Sites(refuse("B", Reason.LOST, since=2)))
    store, _ = run(tmp_path / "cut", study_of(), Sites(), resume=True)
    for name, array in whole.groups(3)["model"].items():
        assert array.tobytes() == store.groups(3)["model"][name].tobytes()


def test_min_sites_goes_on_and_says_since_when(tmp_path: Path) -> None:
    store, _ = run(tmp_path, study_of(strategy={"min_sites": 1}), Sites(refuse("B", Reason.TIMEOUT, since=2)))
    assert store.sites()["B"].state == "missing since round 2: timeout"
    assert store.rounds()[2].refusals == {"B": "timeout"}


def test_site_that_comes_back_is_no_longer_missing(tmp_path: Path) -> None:
    store, _ = run(tmp_path, study_of(strategy={"min_sites": 1}), Sites(refuse("B", Reason.LOST, since=2, until=2)))
    assert store.sites()["B"].state == "answered"


def test_all_refuse_by_policy(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="study-not-approved"):
        run(tmp_path, study_of(), Sites(refuse("A", Reason.STUDY_NOT_APPROVED, kind="hello", since=0)))


def test_unknown_heldout_site(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="heldout names X; the sites are A, B, C"):
        run(tmp_path, study_of(evaluation={"heldout": ["X"]}), Sites())


def test_nobody_left_to_train(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no site is left to train"):
        run(tmp_path, study_of(evaluation={"heldout": ["A", "B", "C"]}), Sites())


def test_reply_to_another_round_is_a_violation(tmp_path: Path) -> None:
    def stale(site: str, request: Request) -> Reply:
        reply = answer(site, request)
        if isinstance(reply, TrainReply) and site == "A":
            return TrainReply(site="A", round=request.round - 1, arrays=reply.arrays, steps=1, seconds=0)
        return reply

    with pytest.raises(QuorumLost, match="A: contract-violation"):
        run(tmp_path, study_of(), Sites(stale))


def test_ema_is_what_is_evaluated(tmp_path: Path) -> None:
    """Warm-up: round 1 keeps 1/10 of the untrained model, so w1 = 0.1·w0 + 0.9·(w0 + 2) = w0 + 1.8."""
    store, _ = run(tmp_path, study_of(training={"ema": 0.9, "rounds": 1}), Sites())
    groups, first = store.groups(1), store.groups(0)["model"]
    for name in first:
        np.testing.assert_allclose(groups["evaluated"][name] - first[name], 1.8, atol=1e-5)


def test_a_finished_run_is_not_overwritten_silently(tmp_path: Path) -> None:
    run(tmp_path, study_of(), Sites())
    with pytest.raises(StateError, match="finished run"):
        RunStore.create(tmp_path, study_of(), engine="test")


def test_resume_of_another_study(tmp_path: Path) -> None:
    run(tmp_path, study_of(), Sites())
    with pytest.raises(StateError, match="holds a run of study"):
        RunStore.resume(tmp_path, study_of(study={"seed": 7}), engine="test")


def test_changed_round_file_is_seen(tmp_path: Path) -> None:
    store, _ = run(tmp_path, study_of(), Sites())
    path = tmp_path / "state" / "round-0003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateError, match="was changed"):
        store.groups(3)


def test_store_keeps_two_rounds_and_the_selected_one(tmp_path: Path) -> None:
    best = Sites(lambda s, r: answer(s, r, score=0.9 if r.round == 1 else 0.1))
    run(tmp_path, study_of(training={"rounds": 6}), best)
    assert sorted(p.name for p in (tmp_path / "state").glob("*.safetensors")) == [
        "round-0001.safetensors", "round-0005.safetensors", "round-0006.safetensors",
    ]  # fmt: skip


def test_a_run_that_nobody_joined_holds_nothing_to_keep(tmp_path: Path) -> None:
    """After a faulty scan was mended the same command must start, without --overwrite."""
    with pytest.raises(QuorumLost):
        run(tmp_path, study_of(), Sites(refuse("A", Reason.DATA_INVALID, kind="hello", since=0)))
    store, _ = run(tmp_path, study_of(), Sites())
    assert store.status == "complete"


def test_a_public_start_is_round_0_also_after_a_resume(tmp_path: Path) -> None:
    """Given once, when the run is made: ones everywhere. Three rounds add 6, with a stop after the first."""
    study = study_of(training={"init": {"from": "phantoms"}})
    ones = {name: np.ones_like(array) for name, array in initial_arrays(study)["model"].items()}
    RunStore.create(tmp_path, study, engine="test", initial=ones).close()
    with pytest.raises(QuorumLost):
        run(tmp_path, study, Sites(refuse("B", Reason.LOST, since=2)), resume=True)
    (tmp_path / "state" / "initial.safetensors").unlink()  # round 1 is saved: the start is no longer needed
    store, _ = run(tmp_path, study, Sites(), resume=True)
    for array in store.groups(3)["model"].values():
        np.testing.assert_allclose(array, 7, atol=1e-5)
    results = build_results(store)
    assert results["start"]["title"] == "pre-trained on phantoms, no private patient"
    assert results["sites"]["C"]["start"]["dice"]["mean"] == 0.5 and results["sites"]["C"]["untrained"] == {}


@pytest.mark.parametrize(("source", "given"), [("phantoms", False), ("", True)])
def test_a_start_that_is_missing_or_not_asked_for_is_refused(tmp_path: Path, source: str, given: bool) -> None:
    study = study_of(training={"init": {"from": source}})
    initial = initial_arrays(study)["model"] if given else None
    RunStore.create(tmp_path, study, engine="test", initial=initial).close()
    with pytest.raises(StudyError, match="was given when the run was made"):
        run(tmp_path, study, Sites(), resume=True)


def test_a_start_of_another_network_is_refused(tmp_path: Path) -> None:
    study = study_of(training={"init": {"from": "phantoms"}})
    other = initial_arrays(study_of(model={"channels": [4, 16]}))["model"]
    RunStore.create(tmp_path, study, engine="test", initial=other).close()
    with pytest.raises(StudyError, match="not of this study's network"):
        run(tmp_path, study, Sites(), resume=True)


def test_each_site_is_shown_its_own_latest_receipt_also_after_a_resume(tmp_path: Path) -> None:
    shown: list[tuple[str, int, int | None]] = []

    def private(site: str, request: Request) -> Reply:
        reply = answer(site, request)
        if not isinstance(reply, TrainReply):
            assert request.receipt is None
            return reply
        shown.append((site, request.round, request.receipt.count if request.receipt else None))
        if request.round == 3 and site == "B" and len(shown) < 7:
            return Refusal(site=site, kind="train", round=3, reason=Reason.LOST)
        entries = 2 * request.round + (100 if site == "B" else 0)
        return replace(
            reply, loss=None, epsilon=1.0, noise_multiplier=1.0, attempt=1,
            receipt=Receipt(count=entries, head=f"{entries:016x}"),
        )  # fmt: skip

    study = study_of(privacy={"mode": "local"})
    store = RunStore.create(tmp_path, study, engine="test")
    with pytest.raises(QuorumLost):
        run_study(study, Sites(private), store, lambda _: None)
    store.close()
    store = RunStore.resume(tmp_path, study, engine="test")
    run_study(study, Sites(private), store, lambda _: None)
    first_run = [("A", 1, None), ("B", 1, None), ("A", 2, 2), ("B", 2, 102), ("A", 3, 4), ("B", 3, 104)]
    # A trained in round 3 before the quorum was lost: that receipt was kept, though the round was not.
    assert shown == [*first_run, ("A", 3, 6), ("B", 3, 104)]
    assert [r.train["A"]["attempt"] for r in store.rounds() if r.train] == [1, 1, 1]
    store.close()


@pytest.mark.parametrize(
    ("delta", "found", "largest"), [(0.0, {"A": 1e-2, "B": 1e-3}, 1e-2), (1e-5, {"A": 1e-5, "B": 1e-5}, 1e-5)]
)
def test_results_give_the_delta_of_each_site(
    tmp_path: Path, delta: float, found: dict[str, float], largest: float
) -> None:
    def sized(site: str, request: Request) -> Reply:
        reply = answer(site, request)
        return replace(reply, public_size=60) if isinstance(reply, HelloReply) and site == "B" else reply

    study = study_of(privacy={"mode": "local", "delta": delta})
    store = RunStore.create(tmp_path, study, engine="test")
    run_study(study, Sites(sized), store, lambda _: None)
    privacy = build_results(store)["privacy"]
    assert (privacy["delta"], privacy["delta_by_site"]) == (largest, found)
    assert privacy["neighbouring_relation"] == "zero-out of one patient"
    assert "not noised" in " ".join(privacy["not_covered"]) and privacy["metrics_epsilon"] is None
    store.close()
