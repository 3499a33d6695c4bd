# SPDX-License-Identifier: Apache-2.0
"""The life of a study at the coordinator: who joins, round after round, and which model is chosen.

    1. hello: every site says its role and its public cohort size, or why it will not take part
    2. round 0: the model before any training here is judged everywhere (the row that every result must beat)
    3. each round: (a) training sites train; (b) each reply is checked against the contract and folded as it
       arrives; (c) quorum; (d) the strategy gives the next model (mode ``distributed``: (a) to (d) are
       :mod:`fedneuro.server.secure_rounds`); (e) the state is saved; (f) the model is judged on validation patients
       of training sites and on held-out sites; (g) the state is completed
    4. the round with the best declared metric on *training* sites is chosen; held-out sites never choose
    5. the chosen model is judged everywhere with every metric of the study, and the run is closed

A process killed at any moment resumes at the last saved step. A site that does not answer is named; the run
goes on while ``strategy.min_sites`` sites answer, and otherwise ends with :class:`QuorumLost`, resumable.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any

from ..privacy.contract import (
    Arrays,
    Estimate,
    EvaluateReply,
    Kind,
    MaskedReply,
    Receipt,
    Refusal,
    Reply,
    Request,
    Role,
    TrainReply,
    Transport,
    check_arrays,
    payload_bytes,
    shapes_of,
)
from ..privacy.errors import ContractViolation, EnvironmentProblem, FedNeuroError, Reason, StateError
from ..privacy.secagg.grid import check_sites
from ..privacy.study import Study
from .attendance import answers, missing_since, note_states
from .conduct import Conduct, Turns, may_return
from .downlink import Downlink
from .ema import average
from .events import Event, Observer
from .joining import Joining
from .quorum import needed, require, require_judge
from .secure_rounds import SecureRounds
from .selection import final_threshold, select_round
from .start import initial_arrays, start_arrays
from .store import RoundRecord, RunStore, SiteRecord
from .strategies import Strategy, build_strategy
from .strategies.pooled import PooledStep
from .uplink import Uplink

__all__ = ["Coordinator", "initial_arrays", "run_study"]


def run_study(
    study: Study, transport: Transport, store: RunStore, observer: Observer, conduct: Conduct | None = None
) -> None:
    """Run ``study`` over ``transport`` to its end, or on from where ``store`` stands.

    Args:
        study: the study.
        transport: how sites are reached.
        store: where the run is saved.
        observer: takes events, after they are saved.
        conduct: whom to expect, and how long to wait; by default those that are there, each asked once.

    Raises:
        StudyError: the study names sites that are not there, or leaves none to train.
        QuorumLost, Refused: too few sites answered; the saved state can be resumed.
        EnvironmentProblem: the disk is full, for example; what was saved is whole.
    """

    def tell(event: Event) -> None:
        store.record(event)
        observer(event)

    try:
        Coordinator(study, transport, store, tell, conduct).run()
    except FedNeuroError as error:
        failed = Event(kind="failed", values={"error": type(error).__name__, "message": str(error)})
        with suppress(EnvironmentProblem):  # a full disk takes no event either; the error itself must get out
            store.record(failed)
        observer(failed)
        raise


class Coordinator:
    """One run. See the module's text for its steps."""

    def __init__(
        self, study: Study, transport: Transport, store: RunStore, tell: Observer, conduct: Conduct | None = None
    ) -> None:
        self._study = study
        self._conduct = conduct or Conduct()
        self._transport = Downlink(transport)
        self._store = store
        self._tell = tell
        self._turns = Turns(self._conduct, transport.sites, tell)
        self._secure: SecureRounds | None = None
        self._strategy: Strategy | PooledStep = build_strategy(study)
        if study.privacy.mode == "distributed":
            self._strategy = PooledStep(study)
            back = self._turns.until_back
            self._secure = SecureRounds(study, self._strategy, self._exchange, self._refused, self._trained, back)
        self._sites: dict[str, SiteRecord] = {}
        self._identities: dict[str, bytes] = {}
        self._joining = Joining(
            study, self._conduct, transport.sites, lambda sites: self._ask("hello", sites, 0), self._refused, tell
        )
        self._receipts: dict[str, Receipt] = {}

    def run(self) -> None:
        """Steps 1 to 5."""
        if self._store.status == "complete":
            return
        self._join()
        record, groups = self._restore()
        first, rounds = record.round + 1, self._study.training.rounds
        values = {"sites": {n: s.role for n, s in self._sites.items()}, "rounds": rounds, "first_round": first}
        self._tell(Event(kind="started", round=record.round, values=values))
        for number in range(first, rounds + 1):
            self._conduct.check_between()
            self._let_in(number)
            groups = self._round(number, groups)
        self._finish()

    # -- step 1 ----------------------------------------------------------------------------------------

    def _join(self) -> None:
        saved = self._store.rounds()
        self._joining.open(self._store.sites(), saved[-1].round + 1 if saved else 1)
        self._identities = self._joining.identities
        self._sites = self._joining.sites
        if self._secure:
            check_sites(len(self._identities), self._study.privacy.tolerate)
        self._store.set_sites(self._sites)

    def _let_in(self, number: int) -> None:
        """Sites that could not answer when the run began join now; a roster of secure aggregation stays as it is."""
        if self._conduct.sites and not self._secure and self._joining.late(number):
            self._sites = self._joining.sites
            self._store.set_sites(self._sites)

    def _training(self) -> list[str]:
        return [n for n, s in self._sites.items() if s.role == Role.TRAIN.value]

    # -- steps 2 and 3 ---------------------------------------------------------------------------------

    def _restore(self) -> tuple[RoundRecord, Mapping[str, Arrays]]:
        """The last saved round, evaluated; round 0 is made where nothing was saved."""
        rounds = self._store.rounds()
        if not rounds:
            record = RoundRecord(round=0)
            groups: Mapping[str, Arrays] = start_arrays(self._study, self._store)
            groups = self._store.save_round(record, groups)
        else:
            record, groups = self._last_whole(rounds)
            self._strategy.load_state(
                {k.removeprefix("strategy."): v for k, v in groups.items() if k.startswith("strategy.")}
            )
        for _, event in self._store.events():
            self._keep_receipt(event.site, event.values.get("receipt"))
        if not self._store.is_evaluated(record.round):
            self._evaluate(record, groups)
        return record, groups

    def _last_whole(self, rounds: list[RoundRecord]) -> tuple[RoundRecord, Mapping[str, Arrays]]:
        """The last round whose saved arrays are whole: the last, or the one before it, which is kept for this."""
        last = rounds[-1].round
        try:
            return rounds[-1], self._store.groups(last)
        except StateError as error:
            if not last:
                raise
            groups = self._store.groups(rounds[-2].round)
            self._store.forget_round(last)
            values = {"lost": last, "text": str(error).partition(";")[0]}
            self._tell(Event(kind="fell-back", round=rounds[-2].round, values=values))
            return rounds[-2], groups

    def _round(self, number: int, groups: Mapping[str, Arrays]) -> Mapping[str, Arrays]:
        started = time.monotonic()
        self._tell(Event(kind="round-started", round=number))
        record = RoundRecord(round=number)
        model = groups["model"]
        asked = self._training()
        new, refusals = self._pooled(record, model) if self._secure else self._averaged(record, model)
        record.refusals = {site: reason.value for site, reason in sorted(refusals.items())}
        record.train = dict(sorted(record.train.items()))
        check_arrays(new, shapes_of(model))
        groups = self._groups(number, new, groups)
        record.seconds = time.monotonic() - started
        groups = self._store.save_round(record, groups)
        self._evaluate(record, groups)
        values = {"seconds": record.seconds, "sites": len(record.train), "asked": len(asked)}
        self._tell(Event(kind="round-done", round=number, values={**values, "missing": missing_since(self._sites)}))
        return groups

    def _note(self, number: int, asked: list[str], refusals: Mapping[str, Reason]) -> None:
        note_states(self._sites, number, asked, refusals)
        self._store.set_sites(self._sites)

    def _pooled(self, record: RoundRecord, model: Arrays) -> tuple[Arrays, dict[str, Reason]]:
        """Step 3 in mode ``distributed``."""
        assert self._secure is not None  # noqa: S101 - the caller looked
        sizes = {name: self._sites[name].public_size for name in self._training()}
        new, refusals = self._secure.train(record, model, self._identities, sizes, self._receipts)
        record.bytes_down += self._transport.taken()
        self._note(record.round, list(self._identities), refusals)
        return new, refusals

    def _averaged(self, record: RoundRecord, model: Arrays) -> tuple[Arrays, dict[str, Reason]]:
        """Step 3, (a) to (d)."""
        number, uplink, asked = record.round, Uplink(self._study, model), self._training()
        answered: list[str] = []
        refusals: dict[str, Reason] = {}
        least = needed(self._study, len(asked))
        assert not isinstance(self._strategy, PooledStep)  # noqa: S101 - the caller looked
        self._strategy.begin(uplink.model, [self._sites[n].public_size for n in asked])
        down = {**model, **self._strategy.extra()}
        waiting, patience = Event(kind="waiting", round=number, values={"during": "train"}), self._conduct.patience

        def missing() -> bool:
            return len(answered) < least <= len(answered) + may_return(refusals, asked)

        for turn in self._turns.ask(asked, refusals, missing, waiting, patience=patience):
            for reply in self._ask("train", turn, number, down):
                size = payload_bytes(reply.arrays) if isinstance(reply, TrainReply) else 0
                self._store.let_go()
                if isinstance(reply, TrainReply):
                    reply = self._checked(reply, uplink)
                if isinstance(reply, TrainReply):
                    self._strategy.fold(reply.arrays, self._sites[reply.site].public_size)
                    record.bytes_up += size
                    self._trained(reply, record)
                    answered.append(reply.site)
                    refusals.pop(reply.site, None)
                    if self._study.strategy.min_sites and len(answered) >= least:
                        self._conduct.enough_answered()
                elif isinstance(reply, Refusal):
                    refusals[reply.site] = reply.reason
                del reply
        record.bytes_down += self._transport.taken()
        self._note(number, asked, refusals)
        require(self._study, len(answered), len(asked), refusals, f"to train in round {number}")
        return uplink.whole(self._strategy.finish()), refusals

    def _checked(self, reply: TrainReply, uplink: Uplink) -> TrainReply | Refusal:
        """The reply as weights, or, where it holds not exactly the agreed arrays, a refusal of that site alone."""
        try:
            return replace(reply, arrays=uplink.read(reply.arrays))
        except ContractViolation as error:
            refusal = Refusal(site=reply.site, kind="train", round=reply.round, reason=error.reason)
            self._refused(refusal)
            return refusal

    def _groups(self, number: int, model: Arrays, before: Mapping[str, Arrays]) -> dict[str, Arrays]:
        groups: dict[str, Arrays] = {"model": model}
        if decay := self._study.training.ema:
            groups["evaluated"] = average(decay, number, before.get("evaluated", before["model"]), model)
        groups |= {f"strategy.{name}": arrays for name, arrays in self._strategy.state().items()}
        return groups

    def _evaluate(self, record: RoundRecord, groups: Mapping[str, Arrays]) -> None:
        every, number = self._study.evaluation.every, record.round
        if every and (number % every == 0 or number == self._study.training.rounds):
            started = time.monotonic()
            model = groups.get("evaluated", groups["model"])
            metrics, refusals = self._judge(number, model)
            record.metrics |= metrics
            record.refusals |= {site: reason.value for site, reason in sorted(refusals.items())}
            self._note(number, [n for n in self._sites if n not in self._training()], refusals)
            record.bytes_down += self._transport.taken()
            record.seconds += time.monotonic() - started
        self._store.save_evaluation(record)
        self._store.prune(self._selected())

    def _judge(self, number: int, model: Arrays, *, final: bool = False) -> tuple[dict[str, Any], dict[str, Reason]]:
        """Every site's metrics of a model, and why sites gave none.

        A study that wants all sites to train waits for a site that is lost now here too, for the choice of the round
        depends on its metrics; the final evaluation always does.
        """
        found: dict[str, Any] = {}
        refusals: dict[str, Reason] = {}
        asked = list(self._sites)
        wait_for = [n for n, s in self._sites.items() if final or not s.state.startswith("missing since")]
        patient = final or not self._study.strategy.min_sites
        waiting = Event(kind="waiting", round=number, values={"during": "evaluate"})
        for turn in self._turns.ask(
            asked, refusals, lambda: bool(may_return(refusals, wait_for)), waiting,
            patience=self._conduct.patience if patient else 0.0,
        ):  # fmt: skip
            for reply in self._ask("evaluate", turn, number, model, final=final):
                if isinstance(reply, EvaluateReply):
                    found[reply.site] = {n: _as_saved(e) for n, e in reply.metrics.items()}
                    refusals.pop(reply.site, None)
                elif isinstance(reply, Refusal):
                    refusals[reply.site] = reply.reason
        return dict(sorted(found.items())), refusals

    # -- steps 4 and 5 ---------------------------------------------------------------------------------

    def _selected(self) -> int:
        return select_round(self._study, self._store.rounds(), self._store.sites())

    def _chosen(self) -> tuple[int, Mapping[str, Arrays]]:
        """The selected round, or the better of the last two where its saved arrays are no longer whole."""
        selected = self._selected()
        try:
            return selected, self._store.groups(selected)
        except StateError as error:
            instead = select_round(self._study, self._store.rounds()[-2:], self._store.sites())
            groups = self._store.groups(instead)
            values = {"lost": selected, "text": str(error).partition(";")[0]}
            self._tell(Event(kind="fell-back", round=instead, values=values))
            return instead, groups

    def _finish(self) -> None:
        selected, groups = self._chosen()
        self._tell(Event(kind="final-started", round=selected))
        by_round = {record.round: record for record in self._store.rounds()}
        metrics = dict(by_round[selected].metrics)  # a site that is lost now keeps what it told in that round
        found, refusals = self._judge(selected, groups.get("evaluated", groups["model"]), final=True)
        require_judge(found, refusals, selected)
        metrics |= found
        for name, reason in refusals.items():
            self._sites[name].state = f"missing in the final evaluation: {reason.value}"
        self._store.set_sites(self._sites)
        self._store.finish({"selected_round": selected, "metrics": dict(sorted(metrics.items()))})
        self._tell(Event(kind="finished", round=selected, values={"selected_round": selected}))

    # -- talking to sites ------------------------------------------------------------------------------

    def _ask(
        self, kind: Kind, sites: list[str], number: int, arrays: Arrays | None = None, *, final: bool = False
    ) -> Iterator[Reply]:
        """One reply per site, each checked to answer what was asked; refusals are told as they come."""
        threshold = final_threshold(self._study, self._store.rounds(), number, self._sites) if final else None
        request = Request(kind=kind, study=self._study, round=number, arrays=arrays, final=final, threshold=threshold)
        requests = dict.fromkeys(sites, request)
        if kind == "train":
            requests |= {site: replace(request, receipt=self._receipts.get(site)) for site in sites}
        for reply in self._exchange(requests):
            if isinstance(reply, EvaluateReply):
                means = {name: one.mean for name, one in reply.metrics.items()}
                intervals = {name: [one.low, one.high] for name, one in reply.metrics.items()}
                values = {"metrics": means, "intervals": intervals, "final": final}
                self._tell(Event(kind="evaluated", round=number, site=reply.site, values=values))
            yield reply
            del reply  # its arrays must not outlive their fold

    def _exchange(self, requests: Mapping[str, Request]) -> Iterator[Reply]:
        """Each site's request to it, and its reply, checked to be of that kind and round."""
        self._conduct.cut = inf
        hello = any(request.kind == "hello" for request in requests.values())
        seconds = self._study.strategy.round_timeout
        for reply in self._transport.exchange(requests, min(seconds, self._conduct.hello) if hello else seconds):
            kind, number = requests[reply.site].kind, requests[reply.site].round
            if not answers(reply, kind, number):
                reply = Refusal(site=reply.site, kind=kind, round=number, reason=Reason.CONTRACT_VIOLATION)
            if isinstance(reply, Refusal):
                self._refused(reply)
            yield reply
            del reply  # its arrays must not outlive their fold

    def _refused(self, refusal: Refusal) -> None:
        values = {"reason": refusal.reason.value, "during": refusal.kind}
        self._tell(Event(kind="refused", round=refusal.round, site=refusal.site, values=values))

    def _trained(self, reply: TrainReply | MaskedReply, record: RoundRecord) -> None:
        loss, steps = (reply.loss, reply.steps) if isinstance(reply, TrainReply) else (None, 1)
        record.train[reply.site] = {
            "loss": loss, "steps": steps, "seconds": reply.seconds,
            "epsilon": reply.epsilon, "noise_multiplier": reply.noise_multiplier, "attempt": reply.attempt,
        }  # fmt: skip
        values: dict[str, Any] = {"loss": loss, "epsilon": reply.epsilon, "seconds": reply.seconds}
        if reply.attempt is not None:
            values["attempt"] = reply.attempt
        if reply.receipt is not None:
            values["receipt"] = [reply.receipt.count, reply.receipt.head]
            self._keep_receipt(reply.site, values["receipt"])
        self._tell(Event(kind="trained", round=reply.round, site=reply.site, values=values))

    def _keep_receipt(self, site: str, receipt: list[Any] | None) -> None:
        """Remember a site's latest receipt, to show it with the next request."""
        if receipt and (site not in self._receipts or receipt[0] > self._receipts[site].count):
            self._receipts[site] = Receipt(count=receipt[0], head=receipt[1])


def _as_saved(estimate: Estimate) -> dict[str, object]:
    """An estimate of a site as it stands in ``results.json``."""
    return {"mean": estimate.mean, "ci95": [estimate.low, estimate.high], "n": estimate.n}
