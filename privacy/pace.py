# SPDX-License-Identifier: Apache-2.0
"""How long to wait before asking again, where the only way to learn of news is to ask.

Flower moves messages by polling, with fixed pauses of 1 to 3 seconds at three places. Here the pause grows with
the time already waited: news that come soon are seen within 20 ms, and a wait of ten seconds is prolonged by at
most five per cent, at two requests per second. So short rounds are quick, and long ones cost no processor time.
"""

import time

__all__ = ["Pace"]


class Pace:
    """Pauses in seconds: ``share`` of the time since the last news, between ``shortest`` and ``longest``.

    Args:
        shortest: first pause.
        longest: upper bound of a pause.
        share: part of the time already waited, 0.05 by default.
    """

    def __init__(self, shortest: float = 0.02, longest: float = 0.5, share: float = 0.05) -> None:
        self._shortest, self._longest, self._share = shortest, longest, share
        self._since = time.monotonic()

    def news(self) -> None:
        """Something came: start again with short pauses."""
        self._since = time.monotonic()

    def pause(self) -> float:
        """The next pause."""
        waited = time.monotonic() - self._since
        return min(self._longest, max(self._shortest, self._share * waited))
