# SPDX-License-Identifier: Apache-2.0
"""What happens in a run, as a stream of small events that progress bars, logs and dashboards read.

An observer is a function that takes an :class:`Event`. Events are saved with the run
(:mod:`fedneuro.server.store`), so another process can follow it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Event", "EventKind", "Observer", "ignore"]

EventKind = Literal[
    "pre-training",  # step, steps; simulations only, before the run is made
    "joined",  # site, role, public_size
    "started",  # sites: {name: role}, rounds, first_round
    "round-started",
    "trained",  # site, loss, epsilon, seconds
    "evaluated",  # site, metrics: {name: mean}, intervals: {name: [low, high]}, 95 %; final
    "refused",  # site, reason, during
    "waiting",  # sites: those that are waited for, seconds: at most, during
    "round-done",  # seconds, sites, asked, missing: {name: since which round}
    "fell-back",  # to this round; lost: the round whose saved state was not whole, text
    "resumed",  # again: sites whose ledgers may be charged for the round a second time
    "final-started",
    "finished",  # selected_round
    "stopped",  # when: "now" or "round"
    "failed",  # error (class name), message
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. ``values`` are JSON values, listed beside each :data:`EventKind`.

    ``at``: seconds since 1970 (UTC) when it was saved; 0 before that.
    """

    kind: EventKind
    round: int = 0
    site: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    at: float = field(default=0.0, compare=False)


Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer that looks at nothing."""
    del event
