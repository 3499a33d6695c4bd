# SPDX-License-Identifier: Apache-2.0
"""Many rounds of a node that lives on: its memory, and its seconds per round.

One hospital's real node (:mod:`.live`) answers hundreds of rounds without work: one optimiser step on four tiny images,
without privacy, or private ones with ``private``. The resident memory of each of its processes is read after every
round. Growth is the median over the last tenth of the rounds against the median over the second tenth: in the first,
Python and torch fill their caches.
"""

import json
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from ...privacy.contract import Receipt, Request, TrainReply
from ...privacy.errors import EnvironmentProblem
from ...privacy.study import Study
from ...privacy.upkeep import QUIET_FLOWER
from ...server.bundle import bundle, bundle_hash
from ...server.flower_transport import FlowerTransport
from ...server.rounds import initial_arrays
from ..processes import Processes
from .live import LiveNode, make_node, start_superlink, take_run, wait_until
from .rounds import write_tiny_site

__all__ = ["bench_soak"]

SITE = "north"
MIB = 2**20


def bench_soak(json_path: Path | None = None, *, rounds: int = 300, private: bool = False) -> dict[str, Any]:
    """Run the rounds; returns (and saves) memory and seconds.

    Args:
        json_path: file for the figures.
        rounds: at least 20.
        private: charge the ledger in each round.

    Raises:
        EnvironmentProblem: the node refuses a round.
    """
    os.environ.update(QUIET_FLOWER)
    study = _study(rounds, private=private)
    memory: dict[str, list[int]] = {}
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fn-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        link = stack.enter_context(
            start_superlink(folder / "superlink", stack.enter_context(Processes(folder / "logs", QUIET_FLOWER)))
        )
        write_tiny_site(folder / "data", patients=8)
        content = bundle()
        config = make_node(
            folder / SITE, folder / "data", link, bundle_hash(content), study,
            max_rounds=rounds, max_requests_per_hour=1_000_000,
        )  # fmt: skip
        node = stack.enter_context(LiveNode(config))
        transport = FlowerTransport(stack.enter_context(take_run(link, content)))
        wait_until("the node is online", lambda: SITE in link.control.online())
        arrays, receipt = initial_arrays(study)["model"], None
        for number in range(1, rounds + 1):
            started = time.monotonic()
            request = Request(kind="train", study=study, round=number, arrays=arrays, receipt=receipt)
            reply = next(iter(transport.exchange({SITE: request}, 120.0)))
            if not isinstance(reply, TrainReply):
                raise EnvironmentProblem(f"round {number}: {reply}")
            seconds.append(time.monotonic() - started)
            arrays, receipt = reply.arrays, _shown(reply, private=private)
            for process, pid in node.pids().items():
                memory.setdefault(process, []).append(psutil.Process(pid).memory_info().rss)
    found: dict[str, Any] = {
        "rounds": rounds,
        "private": private,
        "seconds_per_round": round(median(seconds[1:]), 3),
        "seconds_of_last_tenth": round(median(seconds[-max(1, rounds // 10) :]), 3),
        "memory": {process: _growth(values) for process, values in memory.items()},
    }
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _shown(reply: TrainReply, *, private: bool) -> Receipt | None:
    return reply.receipt if private else None


def _growth(values: list[int]) -> dict[str, float]:
    tenth = max(1, len(values) // 10)
    early, late = median(values[tenth : 2 * tenth]), median(values[-tenth:])
    return {
        "early_mib": round(early / MIB, 1),
        "late_mib": round(late / MIB, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
    }


def _study(rounds: int, *, private: bool) -> Study:
    privacy: dict[str, Any] = {"mode": "none"}
    if private:
        privacy = {"mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 1}
    return Study.parse(
        {
            "study": {"name": "soak"},
            "data": {"patch": [16, 16], "augment": "none"},
            "model": {"channels": [4, 8], "residual_units": 0},
            "training": {"rounds": rounds, "local_steps": 1, "local_epochs": 0, "batch_size": 4, "device": "cpu"},
            "privacy": privacy,
            "evaluation": {"every": 0, "previews": 0},
        }
    )
