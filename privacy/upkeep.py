# SPDX-License-Identifier: Apache-2.0
"""Processes that are started again when they end: what a hospital's node and a coordinator have in common."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["QUIET_FLOWER", "Kept"]

QUIET_FLOWER: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "NO_COLOR": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Variables of each process that runs Flower's code: it tells nobody of us, and its log is text, at once."""


@dataclass(slots=True)
class Kept:
    """One process that is to live.

    Attributes:
        name: of the process.
        start: starts it.
        since: when it was started last, by the monotonic clock.
        failures: how often in a row it did not live long.
        starts: how often it was started.
        again: when it is due to be started; None while it lives.
    """

    name: str
    start: Callable[[], object]
    since: float = 0.0
    failures: int = 0
    starts: int = 0
    again: float | None = None

    @property
    def due(self) -> bool:
        """Whether it is time to start it."""
        return self.again is not None and time.monotonic() >= self.again

    def begin(self) -> None:
        """Start it."""
        self.start()
        self.since, self.again = time.monotonic(), None
        self.starts += 1

    def put_off(self, pause: Callable[[int], float], *, steady: float, fine: bool = False) -> float:
        """It ended, or could not be started: when it is due again.

        Args:
            pause: seconds until then after so many failures in a row, from 1.
            steady: a process that lived longer than so many seconds failed for a new reason.
            fine: it ended as it should.

        Returns:
            the seconds; 0 where it did not fail at once.
        """
        now = time.monotonic()
        self.failures = 0 if fine or now - self.since > steady else self.failures + 1
        seconds = pause(self.failures) if self.failures else 0.0
        self.again = now + seconds
        return seconds
