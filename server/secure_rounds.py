# SPDX-License-Identifier: Apache-2.0
"""A round in mode ``distributed``: the coordinator gets the sum over hospitals, and takes one optimiser step on it.

    1. keys     of the sites whose keys for this round did not come with the last round's end
    2. shares   every site gets all keys, and sends sealed shares of its two secrets for the others
    3. masked   every site gets the model and its sealed shares, and sends its masked, noised sum
    4. unmask   the surviving sites give the shares that take the masks off the *sum*, and their next keys

A hospital that vanishes at any step costs at most what it would have added. If fewer than H - ``privacy.tolerate``
are left at a step, nothing is unmasked; the round is tried once more with fresh keys, is charged again at
every site that had computed, and then ends with a lost quorum, resumable. Where no site had computed yet, it is tried
again as long as the coordinator is patient with those that were lost. The steps, and what they promise, are in
:mod:`fedneuro.privacy.secagg.participant`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count

from ..privacy.budget import training_event
from ..privacy.contract import (
    Advert,
    Arrays,
    KeysReply,
    Kind,
    MaskedReply,
    Receipt,
    Refusal,
    Reply,
    Request,
    SecureStep,
    SharesReply,
    UnmaskReply,
)
from ..privacy.errors import ContractViolation, Reason
from ..privacy.secagg.aggregator import Aggregation
from ..privacy.secagg.grid import Grid
from ..privacy.secagg.keys import verify_advert
from ..privacy.secagg.participant import Terms
from ..privacy.study import Study
from .quorum import shortfall
from .store import RoundRecord
from .strategies.pooled import PooledStep

__all__ = ["SecureRounds"]

ATTEMPTS = 2

Ask = Callable[[Mapping[str, Request]], Iterator[Reply]]
"""Sends each site its request; yields one reply per site, already checked to be of the request's kind and round."""


class _TooFew(Exception):
    """An attempt ended below the threshold."""

    def __init__(self, left: int, doing: str) -> None:
        super().__init__(doing)
        self.left, self.doing = left, doing


class SecureRounds:
    """All rounds of a run.

    Args:
        study: the study.
        step: the optimiser.
        ask: how sites are asked.
        refused: told of a reply that the protocol refuses.
        trained: told of each site's vector that came.
        until_back: waits for sites that were lost, given the round, why sites did not answer and when the round began
            (monotonic clock); False where it is not worth while, or patience is over.
    """

    def __init__(
        self,
        study: Study,
        step: PooledStep,
        ask: Ask,
        refused: Callable[[Refusal], None],
        trained: Callable[[MaskedReply, RoundRecord], None],
        until_back: Callable[[int, Mapping[str, Reason], float], bool] = lambda *_: False,
    ) -> None:
        self._study, self._step = study, step
        self._ask, self._refused, self._trained, self._until_back = ask, refused, trained, until_back
        self._adverts: dict[str, Advert] = {}
        self._number = 0
        self._refusals: dict[str, Reason] = {}

    def train(
        self,
        record: RoundRecord,
        model: Arrays,
        identities: Mapping[str, bytes],
        public_sizes: Mapping[str, int],
        receipts: Mapping[str, Receipt],
    ) -> tuple[Arrays, dict[str, Reason]]:
        """One round.

        Args:
            record: the round's record, filled in.
            model: the global model.
            identities: public identity of every training site: the roster.
            public_sizes: their public cohort sizes.
            receipts: the latest that each gave.

        Returns:
            The next model, and why sites that are not in it are not.

        Raises:
            BadInput: the roster is too small for ``privacy.tolerate``.
            QuorumLost, Refused: too few sites were left, twice.
        """
        self._number, self._refusals = record.round, {}
        terms = Terms(
            study=self._study.hash,
            round=record.round,
            tolerate=self._study.privacy.tolerate,
            least=self._study.strategy.min_sites,
        )
        charged, since = 0, time.monotonic()
        for attempt in count(1):
            self._refusals = {}
            try:
                return self._attempt(terms, record, model, identities, public_sizes, receipts), self._refusals
            except _TooFew as error:
                charged += bool(record.train)
                self._adverts, record.train = {}, {}
                back = charged < ATTEMPTS and self._until_back(record.round, self._refusals, since)
                if attempt >= ATTEMPTS and not back:
                    doing = f"to send {error.doing} in round {record.round}"
                    needed = terms.needed(identities)
                    raise shortfall(error.left, len(identities), needed, self._refusals, doing) from error
        raise AssertionError  # pragma: no cover - the last attempt returns or raises

    def _attempt(
        self,
        terms: Terms,
        record: RoundRecord,
        model: Arrays,
        roster: Mapping[str, bytes],
        public_sizes: Mapping[str, int],
        receipts: Mapping[str, Receipt],
    ) -> Arrays:
        study, privacy, needed = self._study, self._study.privacy, terms.needed(roster)
        event = training_event(study, max(public_sizes.values()), steps=1)
        grid = Grid(
            clip=privacy.clip,
            noise_multiplier=event.noise_multiplier,
            size=self._step.size,
            sites=len(roster),
            tolerate=privacy.tolerate,
        )
        # 1. keys
        self._collect_keys(terms, roster)
        adverts, self._adverts = {name: self._adverts[name] for name in sorted(self._adverts)}, {}
        self._enough(adverts, needed, "keys")
        aggregation = Aggregation(terms, roster, adverts, self._step.size)
        # 2. shares
        shares = SecureStep(roster=roster, adverts=adverts)
        for reply in self._each({name: self._request("shares", shares) for name in adverts}):
            if isinstance(reply, SharesReply):
                self._guard(reply, partial(aggregation.take_shares, reply.site, reply.sealed))
        self._enough(aggregation.shared, needed, "shares")
        # 3. masked vectors
        requests = {}
        for name in aggregation.shared:
            step = SecureStep(context=aggregation.context, sealed=aggregation.sealed_for(name))
            requests[name] = self._request("masked", step, model, receipts.get(name))
        for reply in self._each(requests):
            if isinstance(reply, MaskedReply):
                self._guard(reply, partial(self._fold, aggregation, reply, event.noise_multiplier, record))
            del reply  # its vector must not outlive its fold
        survivors = aggregation.survivors
        self._enough(survivors, needed, "a masked vector")
        # 4. shares of the survivors' self masks, and of the keys of those who dropped out
        step = SecureStep(context=aggregation.context, survivors=tuple(survivors))
        given = 0
        for reply in self._each({name: self._request("unmask", step) for name in survivors}):
            if isinstance(reply, UnmaskReply):
                given += self._guard(
                    reply, partial(aggregation.take_unmask, reply.site, reply.self_shares, reply.key_shares)
                )
                if reply.advert and record.round < study.training.rounds:
                    following = replace(terms, round=terms.round + 1)
                    self._guard(reply, partial(self._keep_advert, following, reply.site, reply.advert, roster))
        try:
            total = grid.read(aggregation.finish())
        except ContractViolation as error:
            raise _TooFew(given, "shares that take the masks off") from error
        patients = sum(public_sizes[name] for name in survivors) * (1 - study.evaluation.validation_fraction)
        expected = privacy.sample_rate * patients
        return self._step.step(record.round, model, total / expected, grid.noise_of(len(survivors)) / expected)

    def _collect_keys(self, terms: Terms, roster: Mapping[str, bytes]) -> None:
        step = SecureStep(roster=roster)
        asked = {name: self._request("keys", step) for name in roster if name not in self._adverts}
        for reply in self._each(asked) if asked else ():
            if isinstance(reply, KeysReply):
                self._guard(reply, partial(self._keep_advert, terms, reply.site, reply.advert, roster))

    def _keep_advert(self, terms: Terms, site: str, advert: Advert, roster: Mapping[str, bytes]) -> None:
        verify_advert(advert, roster[site], terms.study, terms.round, site)
        self._adverts[site] = advert

    def _fold(self, aggregation: Aggregation, reply: MaskedReply, sigma: float, record: RoundRecord) -> None:
        if reply.noise_multiplier != sigma:
            raise ContractViolation(
                f"site {reply.site} computes with noise multiplier {reply.noise_multiplier}, not {sigma}"
            )
        aggregation.fold(reply.site, reply.vector)
        record.bytes_up += int(reply.vector.nbytes)
        self._trained(reply, record)

    def _each(self, requests: Mapping[str, Request]) -> Iterator[Reply]:
        for reply in self._ask(requests):
            if isinstance(reply, Refusal):
                self._refusals[reply.site] = reply.reason
            yield reply
            del reply

    def _guard(self, reply: KeysReply | SharesReply | MaskedReply | UnmaskReply, take: Callable[[], None]) -> bool:
        """Take a reply; one that the protocol refuses counts as a refusal of its site."""
        try:
            take()
        except ContractViolation as error:
            kinds: dict[type, Kind] = {KeysReply: "keys", SharesReply: "shares", MaskedReply: "masked"}
            kind = kinds.get(type(reply), "unmask")
            self._refusals[reply.site] = error.reason
            self._refused(Refusal(site=reply.site, kind=kind, round=reply.round, reason=error.reason))
            return False
        return True

    def _request(
        self, kind: Kind, step: SecureStep, model: Arrays | None = None, receipt: Receipt | None = None
    ) -> Request:
        return Request(kind=kind, study=self._study, round=self._number, arrays=model, receipt=receipt, secure=step)

    @staticmethod
    def _enough(left: Collection[str], needed: int, doing: str) -> None:
        if len(left) < needed:
            raise _TooFew(len(left), doing)
