# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperNode with shorter pauses: ``python -m fedneuro.client.supernode`` takes its own options.

Flower 1.41 pauses for a fixed 3 s between two looks for a message and for 0.5 s between two looks for the
reply (``flwr/supernode/start_client_internal.py``); a round of two messages loses up to seven seconds to it.
This launcher gives that one module a clock whose pauses follow :class:`~fedneuro.privacy.pace.Pace`, then calls
Flower's own entry point. The look for a part of a message that is on its way begins sooner too
(:func:`~fedneuro.privacy.flower_tasks.quicken_transfers`); nothing else is touched. A contract test reads
Flower's source and fails if the pauses are no longer where they were.
"""

import sys
import time
from types import SimpleNamespace

from ..privacy.flower_tasks import quicken_transfers
from ..privacy.pace import Pace

__all__ = ["IDLE_PAUSE", "REPLY_PAUSE", "main", "shorten_pauses"]

IDLE_PAUSE = 3
REPLY_PAUSE = 0.5
"""Flower's own pauses in seconds, by which the two places are told apart."""


def shorten_pauses() -> None:
    """Let the SuperNode's main loop pause as long as :class:`Pace` says."""
    from flwr.supernode import start_client_internal as loop

    idle, reply = Pace(shortest=0.05), Pace(shortest=0.01, longest=0.25)
    last = ""

    def sleep(seconds: float) -> None:
        """A pause of the other kind than the last one means that something was received or sent."""
        nonlocal last
        if seconds not in (IDLE_PAUSE, REPLY_PAUSE):
            raise RuntimeError(f"the SuperNode pauses for {seconds} s, which Flower 1.41 does not")
        kind, pace = ("idle", idle) if seconds == IDLE_PAUSE else ("reply", reply)
        if kind != last:
            pace.news()
            last = kind
        time.sleep(pace.pause())

    loop.__dict__["time"] = SimpleNamespace(sleep=sleep)


def main() -> None:
    """Run the SuperNode with the options on the command line."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    shorten_pauses()
    quicken_transfers()
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
