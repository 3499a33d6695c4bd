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
from dataclasses import replace
from typing import Any

from ..models.metrics import higher_is_better
from ..privacy.contract import (
    Arrays,
    Estimate,
    EvaluateReply,
    HelloReply,
    KeysReply,
    Kind,
    MaskedReply,
    Receipt,
    Refusal,
    Reply,
    Request,
    Role,
    SharesReply,
    TrainReply,
    Transport,
    UnmaskReply,
    check_arrays,
    payload_bytes,
    shapes_of,
)
from ..privacy.errors import ContractViolation, FedNeuroError, Reason, StudyError
from ..privacy.secagg.grid import check_sites
from ..privacy.study import Study
from .events import Event, Observer
from .quorum import shortfall
from .secure_rounds import SecureRounds
from .start import initial_arrays, start_arrays
from .store import RoundRecord, RunStore, SiteRecord
from .strategies import Strategy, build_strategy
from .strategies.pooled import PooledStep

__all__ = ["Coordinator", "estimate_json", "initial_arrays", "run_study"]


def estimate_json(estimate: Estimate) -> dict[str, object]:
    """An estimate as it stands in ``results.json``."""
    return {"mean": estimate.mean, "ci95": [estimate.low, estimate.high], "n": estimate.n}


def run_study(study: Study, transport: Transport, store: RunStore, observer: Observer) -> None:
    """Run ``study`` over ``transport`` to its end, or on from where ``store`` stands.

    Raises:
        StudyError: the study names sites that are not there, or leaves none to train.
        QuorumLost, Refused: too few sites answered; the saved state can be resumed.
    """

    def tell(event: Event) -> None:
        store.record(event)
        observer(event)

    try:
        Coordinator(study, transport, store, tell).run()
    except FedNeuroError as error:
        tell(Event(kind="failed", values={"error": type(error).__name__, "message": str(error)}))
        raise


class Coordinator:
    """One run. See the module's text for its steps."""

    def __init__(self, study: Study, transport: Transport, store: RunStore, tell: Observer) -> None:
        self._study = study
        self._transport = transport
        self._store = store
        self._tell = tell
        self._secure: SecureRounds | None = None
        self._strategy: Strategy | PooledStep = build_strategy(study.strategy)
        if study.privacy.mode == "distributed":
            self._strategy = PooledStep(study)
            self._secure = SecureRounds(study, self._strategy, self._exchange, self._refused, self._trained)
        self._sites: dict[str, SiteRecord] = {}
        self._identities: dict[str, bytes] = {}
        self._receipts: dict[str, Receipt] = {}

    def run(self) -> None:
        """Steps 1 to 5."""
        if self._store.status == "complete":
            return
        self._join()
        record, groups = self._restore()
        first = record.round + 1
        values = {
            "sites": {n: s.role for n, s in self._sites.items()},
            "rounds": self._study.training.rounds,
            "first_round": first,
        }
        self._tell(Event(kind="started", round=record.round, values=values))
        for number in range(first, self._study.training.rounds + 1):
            groups = self._round(number, groups)
        self._finish()

    # -- step 1 ----------------------------------------------------------------------------------------

    def _join(self) -> None:
        names = self._transport.sites()
        heldout = set(self._study.evaluation.heldout)
        if unknown := sorted(heldout - set(names)):
            raise StudyError(
                f"evaluation.heldout names {', '.join(unknown)}; the sites are {', '.join(names) or 'none'}"
            )
        if not set(names) - heldout:
            raise StudyError(f"no site is left to train: evaluation.heldout names all of {', '.join(names) or 'none'}")
        refusals: dict[str, Reason] = {}
        for reply in self._ask("hello", names, 0):
            if isinstance(reply, Refusal):
                refusals[reply.site] = reply.reason
            elif isinstance(reply, HelloReply):
                wanted = Role.HELDOUT if reply.site in heldout else Role.TRAIN
                if reply.role is not wanted:
                    refusals[reply.site] = Reason.ROLE_REFUSED
                    self._refused(Refusal(site=reply.site, kind="hello", round=0, reason=Reason.ROLE_REFUSED))
                    continue
                self._identities |= {reply.site: reply.identity} if wanted is Role.TRAIN else {}
                self._sites[reply.site] = SiteRecord(
                    role=reply.role.value, public_size=reply.public_size, versions=dict(reply.versions)
                )
        self._sites = dict(sorted(self._sites.items()))
        self._require(self._training(), [n for n in names if n not in heldout], refusals, "to join")
        if self._secure:
            check_sites(len(self._training()), self._study.privacy.tolerate)
        self._store.set_sites(self._sites)

    def _training(self) -> list[str]:
        return [n for n, s in self._sites.items() if s.role == Role.TRAIN.value]

    def _require(self, answered: list[str], asked: list[str], refusals: Mapping[str, Reason], doing: str) -> None:
        """The quorum rule: ``min_sites``, or every site that was asked."""
        needed = min(self._study.strategy.min_sites or len(asked), len(asked)) or 1
        if len(answered) >= needed:
            return
        raise shortfall(len(answered), len(asked), needed, refusals, doing)

    # -- steps 2 and 3 ---------------------------------------------------------------------------------

    def _restore(self) -> tuple[RoundRecord, Mapping[str, Arrays]]:
        """The last saved round, evaluated; round 0 is made where nothing was saved."""
        rounds = self._store.rounds()
        if not rounds:
            record = RoundRecord(round=0)
            groups: Mapping[str, Arrays] = start_arrays(self._study, self._store)
            self._store.save_round(record, groups)
        else:
            record = rounds[-1]
            groups = self._store.groups(record.round)
            self._strategy.load_state(
                {k.removeprefix("strategy."): v for k, v in groups.items() if k.startswith("strategy.")}
            )
        for _, event in self._store.events():
            self._keep_receipt(event.site, event.values.get("receipt"))
        if not self._store.is_evaluated(record.round):
            self._evaluate(record, groups)
        return record, groups

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
        self._store.save_round(record, groups)
        self._evaluate(record, groups)
        values = {"seconds": record.seconds, "sites": len(record.train), "asked": len(asked)}
        self._tell(Event(kind="round-done", round=number, values=values))
        return groups

    def _pooled(self, record: RoundRecord, model: Arrays) -> tuple[Arrays, dict[str, Reason]]:
        """Step 3 in mode ``distributed``."""
        assert self._secure is not None  # noqa: S101 - the caller looked
        sizes = {name: self._sites[name].public_size for name in self._training()}
        new, refusals = self._secure.train(record, model, self._identities, sizes, self._receipts)
        self._note_states(record.round, self._training(), refusals)
        return new, refusals

    def _averaged(self, record: RoundRecord, model: Arrays) -> tuple[Arrays, dict[str, Reason]]:
        """Step 3, (a) to (d)."""
        number, shapes, asked = record.round, shapes_of(model), self._training()
        answered: list[str] = []
        refusals: dict[str, Reason] = {}
        assert not isinstance(self._strategy, PooledStep)  # noqa: S101 - the caller looked
        self._strategy.begin(model, [self._sites[n].public_size for n in asked])
        for reply in self._ask("train", asked, number, model):
            if isinstance(reply, TrainReply):
                try:
                    check_arrays(reply.arrays, shapes)
                except ContractViolation as error:
                    reply = Refusal(site=reply.site, kind="train", round=number, reason=error.reason)
                    self._refused(reply)
                else:
                    self._strategy.fold(reply.arrays, self._sites[reply.site].public_size)
                    record.bytes_up += payload_bytes(reply.arrays)
                    self._trained(reply, record)
                    answered.append(reply.site)
            if isinstance(reply, Refusal):
                refusals[reply.site] = reply.reason
            del reply
        record.bytes_down += payload_bytes(model) * len(asked)
        self._note_states(number, asked, refusals)
        self._require(answered, asked, refusals, f"to train in round {number}")
        return self._strategy.finish(), refusals

    def _groups(self, number: int, model: Arrays, before: Mapping[str, Arrays]) -> dict[str, Arrays]:
        groups: dict[str, Arrays] = {"model": model}
        if decay := self._study.training.ema:
            # Warm-up as in Tan & Le 2019 (EfficientNet code): early rounds must not remember the untrained model.
            decay = min(decay, number / (number + 9.0))
            old = before.get("evaluated", before["model"])
            groups["evaluated"] = {
                name: (decay * old[name].astype("float64") + (1 - decay) * array.astype("float64")).astype(array.dtype)
                for name, array in model.items()
            }
        groups |= {f"strategy.{name}": arrays for name, arrays in self._strategy.state().items()}
        return groups

    def _evaluate(self, record: RoundRecord, groups: Mapping[str, Arrays]) -> None:
        every, number = self._study.evaluation.every, record.round
        if every and (number % every == 0 or number == self._study.training.rounds):
            started = time.monotonic()
            model = groups.get("evaluated", groups["model"])
            for reply in self._ask("evaluate", list(self._sites), number, model):
                if isinstance(reply, EvaluateReply):
                    record.metrics[reply.site] = {n: estimate_json(e) for n, e in reply.metrics.items()}
                elif isinstance(reply, Refusal):
                    record.refusals[reply.site] = reply.reason.value
            record.metrics = dict(sorted(record.metrics.items()))
            record.bytes_down += payload_bytes(model) * len(self._sites)
            record.seconds += time.monotonic() - started
        self._store.save_evaluation(record)
        self._store.prune(self._selected())

    # -- steps 4 and 5 ---------------------------------------------------------------------------------

    def _selected(self) -> int:
        return select_round(self._study, self._store.rounds(), self._store.sites())

    def _finish(self) -> None:
        selected = self._selected()
        self._tell(Event(kind="final-started", round=selected))
        groups = self._store.groups(selected)
        by_round = {record.round: record for record in self._store.rounds()}
        metrics = dict(by_round[selected].metrics)  # a site that is lost now keeps what it told in that round
        for reply in self._ask(
            "evaluate", list(self._sites), selected, groups.get("evaluated", groups["model"]), final=True
        ):
            if isinstance(reply, EvaluateReply):
                metrics[reply.site] = {n: estimate_json(e) for n, e in reply.metrics.items()}
            elif isinstance(reply, Refusal):
                self._sites[reply.site].state = f"missing in the final evaluation: {reply.reason.value}"
        self._store.set_sites(self._sites)
        self._store.finish({"selected_round": selected, "metrics": dict(sorted(metrics.items()))})
        self._tell(Event(kind="finished", round=selected, values={"selected_round": selected}))

    # -- talking to sites ------------------------------------------------------------------------------

    def _ask(
        self, kind: Kind, sites: list[str], number: int, arrays: Arrays | None = None, *, final: bool = False
    ) -> Iterator[Reply]:
        """One reply per site, each checked to answer what was asked; refusals are told as they come."""
        request = Request(kind=kind, study=self._study, round=number, arrays=arrays, final=final)
        requests = dict.fromkeys(sites, request)
        if kind == "train":
            requests |= {site: replace(request, receipt=self._receipts.get(site)) for site in sites}
        for reply in self._exchange(requests):
            if isinstance(reply, EvaluateReply):
                means = {name: estimate.mean for name, estimate in reply.metrics.items()}
                self._tell(
                    Event(kind="evaluated", round=number, site=reply.site, values={"metrics": means, "final": final})
                )
            yield reply

    def _exchange(self, requests: Mapping[str, Request]) -> Iterator[Reply]:
        """Each site's request to it, and its reply, checked to be of that kind and round."""
        for reply in self._transport.exchange(requests, self._study.strategy.round_timeout):
            kind, number = requests[reply.site].kind, requests[reply.site].round
            if not _answers(reply, kind, number):
                reply = Refusal(site=reply.site, kind=kind, round=number, reason=Reason.CONTRACT_VIOLATION)
            if isinstance(reply, Refusal):
                self._refused(reply)
            yield reply

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

    def _note_states(self, number: int, asked: list[str], refusals: Mapping[str, Reason]) -> None:
        for name in asked:
            if name not in refusals:
                state = "answered"
            elif self._sites[name].state.startswith("missing since"):
                continue
            else:
                state = f"missing since round {number}: {refusals[name].value}"
            self._sites[name].state = state
        self._store.set_sites(self._sites)


def _answers(reply: Reply, kind: Kind, number: int) -> bool:
    if isinstance(reply, Refusal):
        return True
    if isinstance(reply, HelloReply):
        return kind == "hello" and reply.public_size >= 1
    return isinstance(reply, _REPLIES.get(kind, ())) and reply.round == number


_REPLIES: Mapping[Kind, type] = {
    "train": TrainReply, "evaluate": EvaluateReply,
    "keys": KeysReply, "shares": SharesReply, "masked": MaskedReply, "unmask": UnmaskReply,
}  # fmt: skip


def select_round(study: Study, rounds: list[RoundRecord], sites: Mapping[str, SiteRecord]) -> int:
    """The round whose model is kept: best ``select`` metric on training sites, weighted by public size.

    Ties and ``"last"`` go to the later round. Round 0, the untrained model, is never chosen once a round was
    trained. Where no round has the metric (no validation patient), the last round is taken.
    """
    name, best, chosen = study.select_metric, float("-inf"), rounds[-1].round if rounds else 0
    if name == "last":
        return chosen
    sign = 1.0 if higher_is_better[name] else -1.0
    for record in rounds:
        value = training_value(record, name, sites)
        if record.round and value is not None and sign * value >= best:
            best, chosen = sign * value, record.round
    return chosen


def training_value(record: RoundRecord, metric: str, sites: Mapping[str, SiteRecord]) -> float | None:
    """Mean of ``metric`` over the training sites that returned it, weighted by public size; None if none did."""
    pairs = [
        (site.public_size, record.metrics[name][metric]["mean"])
        for name, site in sites.items()
        if site.role == Role.TRAIN.value and metric in record.metrics.get(name, {})
    ]
    return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs) if pairs else None
