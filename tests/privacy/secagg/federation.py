# SPDX-License-Identifier: Apache-2.0
"""Whole aggregations in memory, for tests: who drops out at which step is the test's choice."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedneuro.privacy.secagg.aggregator import Aggregation
from fedneuro.privacy.secagg.keys import Identity
from fedneuro.privacy.secagg.participant import Participant, Terms

__all__ = ["STUDY", "Federation"]

STUDY = "5" * 64


@dataclass
class Federation:
    """Sites with identities; :meth:`run` is one round, in which each site is dumped and loaded between steps."""

    names: Sequence[str]
    tolerate: int = 0
    round: int = 1
    identities: dict[str, Identity] = field(default_factory=dict)
    participants: dict[str, Participant] = field(default_factory=dict)
    masked: dict[str, NDArray[np.uint64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = self.identities or {name: Identity.fresh() for name in self.names}

    @property
    def terms(self) -> Terms:
        return Terms(study=STUDY, round=self.round, tolerate=self.tolerate)

    @property
    def roster(self) -> dict[str, bytes]:
        return {name: identity.public for name, identity in self.identities.items()}

    def begin(self, names: Collection[str] | None = None) -> dict[str, Participant]:
        self.participants = {n: Participant.begin(n, self.terms) for n in (self.names if names is None else names)}
        return self.participants

    def adverts(self) -> dict[str, object]:
        return {n: p.advert(self.identities[n]) for n, p in self.participants.items()}

    def run(
        self,
        vectors: Mapping[str, NDArray[np.uint64]],
        *,
        before_keys: Collection[str] = (),
        before_shares: Collection[str] = (),
        before_masked: Collection[str] = (),
        before_unmask: Collection[str] = (),
    ) -> tuple[Aggregation, NDArray[np.uint64]]:
        """One aggregation; the named sites vanish before they answer that step."""
        size = len(next(iter(vectors.values())))
        self.begin([n for n in self.names if n not in before_keys])
        adverts = {n: p.advert(self.identities[n]) for n, p in self.participants.items()}
        aggregation = Aggregation(self.terms, self.roster, adverts, size)
        for name in [n for n in adverts if n not in before_shares]:
            aggregation.take_shares(name, self.reloaded(name).share(self.roster, adverts))
        for name in [n for n in aggregation.shared if n not in before_masked]:
            site = self.reloaded(name)
            site.enter(aggregation.context, aggregation.sealed_for(name))
            self.masked[name] = vectors[name].copy()
            site.mask(self.masked[name])
            aggregation.fold(name, self.masked[name])
        for name in [n for n in aggregation.survivors if n not in before_unmask]:
            aggregation.take_unmask(name, *self.reloaded(name).unmask(aggregation.context, set(aggregation.survivors)))
        return aggregation, aggregation.finish()

    def reloaded(self, name: str) -> Participant:
        """The site after a restart between two steps."""
        self.participants[name] = Participant.load(self.participants[name].dump())
        return self.participants[name]
