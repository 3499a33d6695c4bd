# SPDX-License-Identifier: Apache-2.0
"""Who takes part: every expected hospital is asked once before round 1, and later those that could not answer then.

A hospital that took part before (the run is resumed) stays in the run when it does not answer now: it is named as
missing, asked in every round, and counts as one that must answer where the study wants all.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol

from ..privacy.contract import HelloReply, Refusal, Reply, Role
from ..privacy.errors import Reason, StudyError
from ..privacy.study import Study
from .conduct import OPEN, Conduct, Turns
from .events import Event, Observer
from .quorum import needed, require
from .store import SiteRecord

__all__ = ["Joining"]

PAUSE = 10.0
"""Seconds before a hospital is asked to join again: each time is a line in its audit log."""


class Ask(Protocol):
    """Asks sites whether they join; yields one reply per site."""

    def __call__(self, sites: list[str]) -> Iterator[Reply]:
        """Ask ``sites``."""
        ...


class Joining:
    """Step 1 of a run, and the doors that stay open afterwards.

    Args:
        study: the study.
        conduct: who is expected, and how long is waited.
        there: names of the sites that can be asked now.
        ask: asks them.
        refused: told of a refusal that is this module's own.
        tell: takes events.

    Attributes:
        sites: who takes part, by name.
        identities: public identities of training sites, where the study needs them.
        absent: expected sites that do not take part, and why.
    """

    def __init__(
        self,
        study: Study,
        conduct: Conduct,
        there: Callable[[], Collection[str]],
        ask: Ask,
        refused: Callable[[Refusal], None],
        tell: Observer,
    ) -> None:
        self._study, self._conduct, self._there = study, conduct, there
        self._ask, self._refused, self._tell = ask, refused, tell
        self._heldout = frozenset(study.evaluation.heldout)
        self.sites: dict[str, SiteRecord] = {}
        self.identities: dict[str, bytes] = {}
        self.absent: dict[str, Reason] = {}

    def open(self, known: Mapping[str, SiteRecord], number: int) -> None:
        """Ask everybody who is expected, for so long until the quorum rule holds.

        Args:
            known: sites that took part before, as they were.
            number: the round that comes next.

        Raises:
            StudyError: the study names sites that are not expected, or leaves none to train.
            QuorumLost, Refused: too few joined.
        """
        names = sorted(set(self._conduct.sites or self._there()) | set(known))
        self._check(names)
        training = [name for name in names if name not in self._heldout]
        least = needed(self._study, len(training))
        turns = Turns(self._conduct, self._there, self._tell)

        def missing() -> bool:
            joined = sum(name in self.sites for name in training)
            return joined < least or not self._heldout <= set(self.sites)

        waiting = Event(kind="waiting", round=number, values={"during": "hello"})
        # A run that goes on after its coordinator died must not end because hospitals are still on their way back.
        wait = max(self._conduct.wait, self._conduct.patience) if known else self._conduct.wait
        for turn in turns.ask(names, self.absent, missing, waiting, patience=wait, reasons=OPEN, pause=PAUSE):
            self._ask_to_join(turn)
        answered = [name for name in training if name in self.sites]
        refusals = {name: reason for name, reason in self.absent.items() if name in training or name in known}
        for name in known.keys() & self.absent.keys():
            self.sites[name] = known[name]
            if not known[name].state.startswith("missing since"):
                self.sites[name].state = f"missing since round {number}: {self.absent[name].value}"
        require(self._study, len(answered), len(training), refusals, "to join")
        self.sites = dict(sorted(self.sites.items()))

    def late(self, number: int) -> bool:
        """Let those in that could not answer before ``number``; whether anybody came."""
        there = set(self._there()) if self.absent else set()
        open_ = [n for n, reason in self.absent.items() if n not in self.sites and n in there and reason in OPEN]
        before = set(self.sites)
        if open_:
            self._ask_to_join(open_)
        for name in self.sites.keys() - before:
            self.sites[name].state = f"joined in round {number}"
        self.sites = dict(sorted(self.sites.items()))
        return set(self.sites) != before

    def _check(self, names: list[str]) -> None:
        said = ", ".join(names) or "none"
        if unknown := sorted(self._heldout - set(names)):
            raise StudyError(f"evaluation.heldout names {', '.join(unknown)}; the sites are {said}")
        if not set(names) - self._heldout:
            raise StudyError(f"no site is left to train: evaluation.heldout names all of {said}")

    def _ask_to_join(self, names: Iterable[str]) -> None:
        there = set(self._there())
        asked = [name for name in names if name in there]
        for name in (name for name in names if name not in there):
            refusal = Refusal(site=name, kind="hello", round=0, reason=Reason.LOST)
            if self.absent.get(name) is not Reason.LOST:
                self._refused(refusal)
            self.absent[name] = Reason.LOST
        for reply in self._ask(asked) if asked else ():
            if isinstance(reply, Refusal):
                self.absent[reply.site] = reply.reason
            elif isinstance(reply, HelloReply):
                self._take(reply)

    def _take(self, reply: HelloReply) -> None:
        wanted = Role.HELDOUT if reply.site in self._heldout else Role.TRAIN
        if reply.role is not wanted:
            self.absent[reply.site] = Reason.ROLE_REFUSED
            self._refused(Refusal(site=reply.site, kind="hello", round=0, reason=Reason.ROLE_REFUSED))
            return
        if wanted is Role.TRAIN:
            self.identities[reply.site] = reply.identity
        self.absent.pop(reply.site, None)
        self.sites[reply.site] = SiteRecord(
            role=reply.role.value, public_size=reply.public_size, versions=dict(reply.versions)
        )
        values = {"role": reply.role.value, "public_size": reply.public_size}
        self._tell(Event(kind="joined", site=reply.site, values=values))
