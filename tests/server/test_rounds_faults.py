# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a run, and what the coordinator makes of it: lost sites, wrong replies, broken files."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedneuro.models.state import digest
from fedneuro.privacy.contract import Refusal, Reply, Request, TrainReply
from fedneuro.privacy.errors import EnvironmentProblem, QuorumLost, Reason, StateError
from fedneuro.privacy.study import Study
from fedneuro.server import run_folder
from fedneuro.server.conduct import Conduct
from fedneuro.server.events import Event
from fedneuro.server.rounds import initial_arrays, run_study
from fedneuro.server.run_folder import RunFolder, Stopped
from fedneuro.server.run_words import sentence
from fedneuro.server.store import RunStore
from tests.server.test_rounds import Answer, Sites, answer, refuse, study_of

Observer = Callable[[Event], None]
WHOLE = study_of()


def go(
    out: Path,
    sites: Sites,
    study: Study = WHOLE,
    conduct: Conduct | None = None,
    observe: Observer = lambda _: None,
) -> tuple[str, list[Event]]:
    """Run or resume in ``out``; digest of the last model, and all events so far."""
    there = (out / "state" / "run.db").exists()
    store = RunStore.resume(out, study, engine="test") if there else RunStore.create(out, study, engine="test")
    with closing(store):
        run_study(study, sites, store, observe, conduct)
        return digest(store.groups(study.training.rounds)["model"]), [event for _, event in store.events()]


def events_of(out: Path, kind: str) -> list[Event]:
    with closing(RunStore.load(out)) as store:
        return [event for _, event in store.events() if event.kind == kind]


def patient(**more: object) -> Conduct:
    return Conduct(**{"patience": 30.0, "pause": 0.01, **more})  # type: ignore[arg-type]


class Flaky(Sites):
    """Site B is lost in round 2 until it was looked for ``away`` times."""

    def __init__(self, away: int, kind: str = "train") -> None:
        super().__init__()
        self.away, self.kind, self.looked = away, kind, 0
        self.answer = self.reply

    def sites(self) -> list[str]:
        self.looked += 1
        return [name for name in self.names if name != "B" or self.looked > self.away]

    def reply(self, site: str, request: Request) -> Reply:
        if (site, request.kind, request.round) == ("B", self.kind, 2) and self.looked <= self.away:
            return Refusal(site=site, kind=request.kind, round=2, reason=Reason.LOST)
        return answer(site, request)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the undisturbed run's model."""
    return go(tmp_path_factory.mktemp("whole"), Sites())[0]


# -- sites that are lost -----------------------------------------------------------------------------------


def test_a_lost_site_is_waited_for_and_nobody_else_pays_twice(tmp_path: Path, whole: str) -> None:
    sites = Flaky(away=5)
    sites.looked = 0
    model, events = go(tmp_path, _joined_first(sites), conduct=patient())
    assert model == whole
    trained = [(site, number) for site, kind, number in sites.asked if kind == "train"]
    assert trained.count(("A", 2)) == 1 and trained.count(("B", 2)) == 2
    (waiting,) = [event for event in events if event.kind == "waiting"]
    assert sentence(waiting) == "round 2: waiting up to 30 s for B, missing training"


def _joined_first(sites: Flaky) -> Flaky:
    """All are there when the run begins; the looks that count come later."""
    looks = iter([0, 0])

    def there() -> list[str]:
        if next(looks, None) is not None:
            return list(sites.names)
        return Flaky.sites(sites)

    sites.sites = there  # type: ignore[method-assign]
    return sites


def test_the_choice_of_the_round_waits_for_a_site_that_is_lost_while_it_evaluates(tmp_path: Path) -> None:
    sites = _joined_first(Flaky(away=3, kind="evaluate"))
    go(tmp_path, sites, conduct=patient())
    with closing(RunStore.load(tmp_path)) as store:
        assert [sorted(record.metrics) for record in store.rounds()] == [["A", "B", "C"]] * 4


def test_patience_ends(tmp_path: Path) -> None:
    with pytest.raises(QuorumLost, match=r"1 of 2 training sites answered when asked to train in round 2.*B: lost"):
        go(tmp_path, Sites(refuse("B", Reason.LOST, since=2)), conduct=patient(patience=0.2))


def test_nobody_is_waited_for_who_will_not_come(tmp_path: Path) -> None:
    """A has no budget left, which waiting does not mend; so B, who is lost, is not waited for either."""

    def both(site: str, request: Request) -> Reply:
        reason = {"A": Reason.BUDGET_EXHAUSTED, "B": Reason.LOST}.get(site)
        if reason and request.kind == "train":
            return Refusal(site=site, kind="train", round=request.round, reason=reason)
        return answer(site, request)

    with pytest.raises(QuorumLost):
        go(tmp_path, Sites(both), conduct=patient(patience=1000.0))
    assert events_of(tmp_path, "waiting") == []


def test_k_of_n_goes_on_at_once_and_shows_the_shrinkage(tmp_path: Path) -> None:
    study = study_of(strategy={"min_sites": 1})
    _, events = go(tmp_path, Sites(refuse("B", Reason.LOST, since=2)), study, patient(patience=1000.0))
    done = [sentence(event) for event in events if event.kind == "round-done"]
    assert [line.partition(" s, ")[2] for line in done] == [
        "2 of 2 sites", "1 of 2 sites, B missing since round 2", "1 of 2 sites, B missing since round 2",
    ]  # fmt: skip


def test_the_others_have_a_time_of_grace_once_enough_answered(tmp_path: Path) -> None:
    """The transport is told when to end; by itself it would wait for ``round_timeout``."""
    conduct = Conduct(grace=5.0)
    cuts: dict[str, float] = {}

    def observe(event: Event) -> None:
        if event.kind == "trained" and event.round == 1:
            cuts[event.site] = conduct.cut - time.monotonic()

    go(tmp_path, Sites(), study_of(strategy={"min_sites": 1}), conduct, observe)
    assert cuts["A"] == float("inf") and 4.0 < cuts["B"] <= 5.0  # A was the first of the one that is needed


def test_a_resume_does_not_shrink_silently(tmp_path: Path) -> None:
    """B took part, and is gone when the run is resumed: a study that wants all must not go on without it."""
    with pytest.raises(QuorumLost):
        go(tmp_path, Sites(refuse("B", Reason.LOST, since=2)))
    alone = Sites(names=("A", "C"))
    with pytest.raises(QuorumLost, match=r"1 of 2 training sites answered when asked to join.*B: lost"):
        go(tmp_path, alone)
    with closing(RunStore.load(tmp_path)) as store:
        assert sorted(store.sites()) == ["A", "B", "C"]


def test_a_resume_with_a_quorum_keeps_the_missing_site_in_the_run(tmp_path: Path) -> None:
    study = study_of(strategy={"min_sites": 1}, training={"rounds": 4})
    with pytest.raises(Stopped):
        go(tmp_path, Sites(), study, observe=_stop_after(2))
    gone = Sites(refuse("B", Reason.LOST, since=3, until=3))
    go(tmp_path, gone, study, conduct=Conduct(sites=("A", "B", "C")))
    with closing(RunStore.load(tmp_path)) as store:
        assert [record.refusals for record in store.rounds()[3:]] == [{"B": "lost"}, {}]  # it came back in round 4
        assert store.sites()["B"].state == "answered"


def _stop_after(number: int) -> Observer:
    def observe(event: Event) -> None:
        if event.kind == "round-done" and event.round == number:
            raise Stopped("round")

    return observe


def test_who_could_not_join_joins_later(tmp_path: Path) -> None:
    """B is not there at first; the study goes on with A alone, and takes B in from round 2 on."""
    sites = Sites()
    there = iter([["A", "C"]] * 2)  # when it is asked to join, and before round 1
    sites.sites = lambda: next(there, ["A", "B", "C"])  # type: ignore[method-assign]
    study = study_of(strategy={"min_sites": 1})
    _, events = go(tmp_path, sites, study, Conduct(sites=("A", "B", "C")))
    with closing(RunStore.load(tmp_path)) as store:
        assert [sorted(record.train) for record in store.rounds()[1:]] == [["A"], ["A", "B"], ["A", "B"]]
    assert [event.site for event in events if event.kind == "joined"] == ["A", "C", "B"]


# -- replies that are not as agreed ------------------------------------------------------------------------


def altered(change: Callable[[dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]], None]) -> Answer:
    """Site B changes its arrays before it sends them."""

    def reply(site: str, request: Request) -> Reply:
        found = answer(site, request)
        if isinstance(found, TrainReply) and site == "B":
            arrays = dict(found.arrays)
            change(arrays)
            return TrainReply(site=site, round=found.round, arrays=arrays, steps=1, seconds=0)
        return found

    return reply


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update(extra=np.zeros(1, np.float32)),
        lambda arrays: arrays.pop(next(iter(arrays))),
        lambda arrays: arrays.update({next(iter(arrays)): np.zeros(3, np.float32)}),
    ],
    ids=["one more", "one less", "another shape"],
)
def test_one_reply_with_other_arrays_fails_that_reply_alone(tmp_path: Path, change: Callable[..., None]) -> None:
    """Stock Flower ends the run here. With A alone every round adds 1, so three rounds add 3."""
    _, events = go(tmp_path, Sites(altered(change)), study_of(strategy={"min_sites": 1}))
    with closing(RunStore.load(tmp_path)) as store:
        assert [record.refusals for record in store.rounds()[1:]] == [{"B": "contract-violation"}] * 3
        first, last = store.groups(2)["model"], store.groups(3)["model"]
    assert all(np.allclose(last[name] - first[name], 1, atol=1e-5) for name in first)
    assert "B did not answer training: contract-violation" in " ".join(map(sentence, events))


def test_an_update_beyond_the_bound_is_left_out_and_named(tmp_path: Path) -> None:
    """Of n weights A changes each by 1, B by 3: lengths √n and 3 √n. The bound lies at 2 √n."""
    count = sum(array.size for array in initial_arrays(WHOLE)["model"].values())
    study = study_of(strategy={"min_sites": 1, "max_update_norm": 2.0 * count**0.5})
    go(tmp_path, Sites(), study)
    with closing(RunStore.load(tmp_path)) as store:
        assert [record.refusals for record in store.rounds()[1:]] == [{"B": "out-of-norm"}] * 3
        first, last = store.groups(2)["model"], store.groups(3)["model"]
    assert all(np.allclose(last[name] - first[name], 1, atol=1e-5) for name in first)


def test_no_valid_reply_is_a_failed_round_not_a_completed_run(tmp_path: Path) -> None:
    def nobody(site: str, request: Request) -> Reply:
        if request.kind == "train" and request.round == 2:
            return Refusal(site=site, kind="train", round=2, reason=Reason.NON_FINITE)
        return answer(site, request)

    with pytest.raises(QuorumLost, match=r"0 of 2 .*round 2.*A: non-finite.*B: non-finite"):
        go(tmp_path, Sites(nobody), study_of(strategy={"min_sites": 1}))
    with closing(RunStore.load(tmp_path)) as store:
        assert (store.status, store.rounds()[-1].round) == ("running", 1)


def test_a_second_charge_is_told(tmp_path: Path) -> None:
    def twice(site: str, request: Request) -> Reply:
        found = answer(site, request)
        if isinstance(found, TrainReply):
            return TrainReply(site=site, round=found.round, arrays=found.arrays, steps=1, seconds=0, attempt=2)
        return found

    _, events = go(tmp_path, Sites(twice))
    assert "its ledger was charged for this round again (attempt 2)" in " ".join(map(sentence, events))


# -- files that are not as they were -----------------------------------------------------------------------


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def stopped_after_two(out: Path) -> None:
    with pytest.raises(Stopped):
        go(out, Sites(), observe=_stop_after(2))


def test_a_broken_checkpoint_falls_back_one_round_and_says_so(tmp_path: Path, whole: str) -> None:
    stopped_after_two(tmp_path)
    spoil(tmp_path / "state" / "round-0002.safetensors")
    sites = Sites()
    model, events = go(tmp_path, sites)
    assert model == whole
    assert sorted({number for _, kind, number in sites.asked if kind == "train"}) == [2, 3]
    (fell,) = [event for event in events if event.kind == "fell-back"]
    assert fell.round == 1 and fell.values["lost"] == 2
    assert "round-0002.safetensors: was changed since it was saved): round 1 is used instead" in sentence(fell)


def test_two_broken_checkpoints_are_one_line(tmp_path: Path) -> None:
    stopped_after_two(tmp_path)
    for number in (1, 2):
        spoil(tmp_path / "state" / f"round-000{number}.safetensors")
    with pytest.raises(StateError, match=r"round-0001.safetensors: was changed since it was saved; start anew"):
        go(tmp_path, Sites())


def test_a_broken_best_round_is_not_released(tmp_path: Path) -> None:
    """Round 1 is the best; its file breaks before the end, so the better of the last two is taken, and it is said."""
    study = study_of(training={"rounds": 4})
    sites = Sites(lambda s, r: answer(s, r, score={1: 0.9, 3: 0.5}.get(r.round, 0.1)))

    def observe(event: Event) -> None:
        if event.kind == "round-done" and event.round == 4:
            spoil(tmp_path / "state" / "round-0001.safetensors")

    _, events = go(tmp_path, sites, study, observe=observe)
    with closing(RunStore.load(tmp_path)) as store:
        final = store.final()
    assert final is not None and final["selected_round"] == 3
    assert [event.values["lost"] for event in events if event.kind == "fell-back"] == [1]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond ``size`` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_at_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    study = study_of(model={"channels": [64, 128], "residual_units": 0}, evaluation={"every": 0})
    expected, _ = go(tmp_path / "whole", Sites(), study)
    out, size = tmp_path / "out", (tmp_path / "whole" / "state" / "round-0003.safetensors").stat().st_size
    with pytest.raises(Stopped):
        go(out, Sites(), study, observe=_stop_after(1))
    files = [path.stat().st_size for path in (out / "state").iterdir() if path.suffix != ".safetensors"]
    assert max(files) < size // 2  # so that the state store itself can grow
    with files_up_to(size - 1), pytest.raises(EnvironmentProblem, match=r"cannot save the run.*what was saved before"):
        go(out, Sites(), study)
    assert [path.name for path in (out / "state").glob("*.safetensors*")] != []
    assert not list((out / "state").glob(".round-0002*"))
    assert go(out, Sites(), study)[0] == expected
    assert [event.values["error"] for event in events_of(out, "failed")] == ["EnvironmentProblem"]


# -- stopping, and who executes ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["now", "round"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, whole: str, when: run_folder.When) -> None:
    folder = RunFolder(tmp_path)
    conduct = Conduct(check=folder.check, check_between=folder.check_between)

    def observe(event: Event) -> None:
        if event.kind == "trained" and event.round == 2 and event.site == "A":
            folder.request_stop(when)

    with pytest.raises(Stopped):
        go(tmp_path, Sites(), conduct=conduct, observe=observe)
    assert len(events_of(tmp_path, "round-done")) == 2
    folder.clear_stop()
    assert go(tmp_path, Sites(), conduct=conduct)[0] == whole


def test_a_run_is_executed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.1)
    folder = RunFolder(tmp_path)
    assert not folder.is_held
    with folder.hold():
        assert folder.is_held
        with pytest.raises(StateError, match="another process executes this run"), RunFolder(tmp_path).hold():
            pass
    assert not folder.is_held


def test_a_final_evaluation_that_nobody_answers_is_no_complete_run(tmp_path: Path, whole: str) -> None:
    sites = Sites()

    def nobody_judges(site: str, request: Request) -> Reply:
        if not request.final:
            return answer(site, request)
        return Refusal(site=site, kind=request.kind, round=request.round, reason=Reason.INTERNAL)

    sites.answer = nobody_judges
    with pytest.raises(QuorumLost, match="no hospital answered the final evaluation of round"):
        go(tmp_path, sites)
    sites.answer = answer
    assert go(tmp_path, sites)[0] == whole
