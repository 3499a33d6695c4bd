# SPDX-License-Identifier: Apache-2.0
"""How a coordinator deals with hospitals that do not answer: whom it expects, how long it waits, when it goes on.

    - nobody is waited for without a deadline: ``strategy.round_timeout`` for each question
    - with ``strategy.min_sites`` = k the round goes on with any k that answered; the others are named, asked
      again in the next round, and waited for at most ``grace`` once k are there
    - a site that was *lost* (its machine, its network) is asked again in the same round while too few answered, for
      at most ``patience``. What others have answered is kept, so nobody else pays twice for the round
    - only then is the round lost: the run ends, and can be resumed

A site that is asked again may have trained already, with its reply lost on the way. Its ledger is charged
again then, and its reply says so (``attempt``).
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from ..privacy.errors import Reason
from .events import Event, Observer

__all__ = ["Conduct", "Turns", "may_return"]

RETURNING = frozenset({Reason.LOST, Reason.TIMEOUT})
"""Why a site may answer when it is asked again, without anybody doing something about it."""
OPEN = RETURNING | {Reason.STUDY_NOT_APPROVED, Reason.OUTSIDE_HOURS, Reason.TOO_MANY_REQUESTS}
"""Why a site that did not join may join later: people approve, and nights come."""


def may_return(refusals: Mapping[str, Reason], sites: Iterable[str]) -> int:
    """How many of ``sites`` may answer when they are asked again."""
    return sum(refusals.get(site) in RETURNING for site in sites)


def _nothing() -> None:
    """Nobody wants to stop."""


@dataclass(slots=True, kw_only=True)
class Conduct:
    """The rules of one run. Without arguments: all sites that are there, each asked once.

    Args:
        sites: who is expected, in place of all that are there.
        wait: seconds before round 1 in which those that did not join are asked again.
        patience: seconds in a round in which lost sites are waited for.
        grace: seconds for the others once enough have answered; infinite: until the question's own deadline.
        hello: seconds for the answer to the first question.
        pause: seconds between two looks for sites that are back.
        check: called while sites are waited for; raises to stop the run at once.
        check_between: called between two rounds; raises to stop the run there.
        cut: by the monotonic clock, when the question under way ends for those who have not answered.
    """

    sites: tuple[str, ...] = ()
    wait: float = 0.0
    patience: float = 0.0
    grace: float = inf
    hello: float = inf
    pause: float = 2.0
    check: Callable[[], None] = _nothing
    check_between: Callable[[], None] = _nothing
    cut: float = inf

    def sleep(self, seconds: float) -> None:
        """Sleep, but stop when asked to."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.25))
        self.check()

    def enough_answered(self) -> None:
        """The others have ``grace`` seconds from now."""
        self.cut = min(self.cut, time.monotonic() + self.grace)


class Turns:
    """Whom to ask, turn after turn, until enough have answered or patience ends.

    Args:
        conduct: the rules.
        there: names of the sites that can be asked now.
        tell: takes an event each time that sites are waited for.
    """

    def __init__(self, conduct: Conduct, there: Callable[[], Collection[str]], tell: Observer) -> None:
        self._conduct, self._there, self._tell = conduct, there, tell

    def ask(
        self,
        asked: Sequence[str],
        refusals: Mapping[str, Reason],
        missing: Callable[[], bool],
        event: Event,
        *,
        patience: float,
        reasons: Collection[Reason] = RETURNING,
        pause: float = 0.0,
    ) -> Iterator[list[str]]:
        """Yield who is to be asked next: first all, then those whose refusal may pass, when they are there again.

        Args:
            asked: all.
            refusals: why sites did not answer; the caller adds to it and takes from it between two turns.
            missing: whether more answers are needed.
            event: a ``waiting`` event, to be filled in.
            patience: seconds from the first look.
            reasons: which refusals may pass.
            pause: seconds between two turns; 0: the conduct's.
        """
        yield list(asked)
        deadline, told = time.monotonic() + patience, False
        while missing() and time.monotonic() < deadline:
            waiting = [site for site in asked if refusals.get(site) in reasons]
            if not waiting:
                return
            if not told:
                values = {**event.values, "sites": waiting, "seconds": round(patience, 1)}
                self._tell(Event(kind="waiting", round=event.round, values=values))
                told = True
            self._conduct.sleep(min(pause or self._conduct.pause, max(0.0, deadline - time.monotonic())))
            there = self._there()
            if back := [site for site in waiting if site in there]:
                yield back

    def until_back(self, number: int, refusals: Mapping[str, Reason], since: float) -> bool:
        """Wait until those that were lost in round ``number`` are there again, for what must be begun anew with all.

        Returns:
            Whether it is worth trying again; False where nobody was lost, or patience since ``since`` is over.
        """
        lost = {site for site, reason in refusals.items() if reason in RETURNING}
        left = since + self._conduct.patience - time.monotonic()
        if not lost or left <= 0:
            return False
        values = {"during": "keys", "sites": sorted(lost), "seconds": round(left, 1)}
        self._tell(Event(kind="waiting", round=number, values=values))
        while True:
            self._conduct.sleep(self._conduct.pause)
            if lost <= set(self._there()):
                return True
            if time.monotonic() > since + self._conduct.patience:
                return False
