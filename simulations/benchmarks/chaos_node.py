# SPDX-License-Identifier: Apache-2.0
"""A node that is killed at random moments of a running study, cut off, out of disk and with a wrong clock.

One hospital's real node (:mod:`.live`) behind a link that can be cut, its state on a disk that can be filled. This
process is the coordinator: it asks for one private round after another, again where a round was lost, as a resumed
coordinator does. Each fault falls at a random moment of that; the next one only after a round was answered.

    supernode, runner, training   kill -9 of that process
    all                           kill -9 of all of them and of their supervisor, which is started again as systemd does
    cut, silence                  the link ends, or carries nothing, for a random time
    disk                          no byte is free for some seconds
    clock                         the node's wall clock is a day ahead or behind for some seconds

What must hold: the node comes back by itself; every answer that arrived has a charge of its own in the ledger, and so
has every answer that the audit log let out; each charge was settled once at most; ledger and log verify.
"""

import json
import math
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from ...client.audit_chain import Entry, Signer, verify_log
from ...client.node_settings import load_node_settings
from ...privacy.contract import Arrays, Receipt, Refusal, Reply, Request, TrainReply
from ...privacy.errors import EnvironmentProblem
from ...privacy.ledger import Ledger
from ...privacy.study import Study
from ...privacy.upkeep import QUIET_FLOWER
from ...server.bundle import bundle, bundle_hash
from ...server.flower_transport import FlowerTransport
from ...server.rounds import initial_arrays
from ..processes import Processes
from .faults import Clock, SmallDisk, TcpLink
from .live import LiveNode, make_node, start_superlink, take_run, wait_until
from .rounds import write_tiny_site

__all__ = ["KINDS", "bench_chaos_node"]

KILLS = ("supernode", "runner", "training", "all")
KINDS = (*KILLS, "cut", "silence", "disk", "clock")
SITE = "north"
ROUNDS = 2000
RECOVERY_SECONDS = 300.0
"""Longer than that to the next answer is a failure."""
DAY = 86400


@dataclass(slots=True)
class _Fault:
    """One fault and how it went.

    Attributes:
        kind: see :data:`KINDS`.
        lasted: seconds until it was undone; 0 for a kill.
        back: seconds from there until a round was answered that was asked for afterwards.
        attempts: requests that it took.
    """

    kind: str
    lasted: float = 0.0
    back: float = 0.0
    attempts: int = 0
    said: Counter[str] = field(default_factory=Counter)


def bench_chaos_node(
    json_path: Path | None = None,
    *,
    kills: int = 20,
    seed: int = 0,
    shortest: float = 1.0,
    longest: float = 10.0,
    kinds: tuple[str, ...] = KINDS,
    minutes: float = math.inf,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Do ``kills`` faults to a node; returns (and saves) what happened.

    Args:
        json_path: file for the figures.
        kills: faults in all; the kinds take turns, in a random order.
        seed: of order, moments and lengths.
        shortest: seconds of a cut, of a full disk, of a wrong clock; at least.
        longest: at most.
        kinds: which faults.
        minutes: no fault begins later than that; what must hold is looked at all the same.
        tell: takes a line about each.

    Raises:
        EnvironmentProblem: the node did not come back, or what must hold does not.
    """
    os.environ.update(QUIET_FLOWER)
    draw = random.Random(seed)  # noqa: S311 - moments of faults
    with tempfile.TemporaryDirectory(prefix="fn-chaos-") as name, _scene(Path(name)) as scene:
        left_out = {kind: why for kind, why in scene.cannot.items() if kind in kinds}
        turns = [kind for kind in kinds if kind not in left_out]
        plan = [turns[number % len(turns)] for number in range(kills)]
        draw.shuffle(plan)
        faults = []
        last = time.monotonic() + 60 * minutes
        for number, kind in enumerate(plan, start=1):
            if time.monotonic() > last:
                break
            fault = scene.suffer(kind, draw, (min(shortest, longest), longest))
            faults.append(fault)
            said = ", ".join(f"{reason} × {count}" for reason, count in fault.said.items())
            tell(
                f"{number}/{kills} {kind}: lasted {fault.lasted:.1f} s, answered again after {fault.back:.1f} s {said}"
            )
        found = {"faults": len(faults), "seed": seed, "left_out": left_out, **scene.verify()}
    found["longest"] = {
        kind: max(lasted) for kind in turns if (lasted := [round(f.lasted, 1) for f in faults if f.kind == kind])
    }
    found["seconds_until_answered"] = {
        kind: {"median": median(backs), "worst": max(backs), "n": len(backs)}
        for kind in turns
        if (backs := [round(fault.back, 2) for fault in faults if fault.kind == kind])
    }
    found["said_meanwhile"] = dict(sum((fault.said for fault in faults), Counter()))
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _study() -> Study:
    """Private rounds of a fraction of a second."""
    return Study.parse(
        {
            "study": {"name": "chaos"},
            "data": {"patch": [16, 16], "augment": "none"},
            "model": {"channels": [4, 8], "residual_units": 0},
            "training": {"rounds": ROUNDS, "local_steps": 2, "local_epochs": 0, "device": "cpu"},
            "privacy": {
                "mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 1,
            },
            "evaluation": {"every": 0, "previews": 0},
        }
    )  # fmt: skip


@contextmanager
def _scene(folder: Path) -> Iterator["_Scene"]:
    """SuperLink, link, disk, node and the coordinator's run, all of them up."""
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(folder / "logs", QUIET_FLOWER))
        link = stack.enter_context(start_superlink(folder / "superlink", processes))
        wire = TcpLink(int(link.address.rpartition(":")[2]))
        stack.callback(wire.close)
        write_tiny_site(folder / "data", patients=8)
        disk, clock, content = SmallDisk(folder / SITE / "state"), Clock(folder), bundle()
        stack.callback(disk.close)
        study = _study()
        config = make_node(
            folder / SITE, folder / "data", link, bundle_hash(content), study,
            address=f"127.0.0.1:{wire.port}", max_rounds=ROUNDS, max_requests_per_hour=100_000,
        )  # fmt: skip
        node = stack.enter_context(LiveNode(config, keep=True, env=clock.env))
        grid = stack.enter_context(take_run(link, content))
        scene = _Scene(node, wire, disk, clock, study, FlowerTransport(grid))
        wait_until("the node is online", lambda: SITE in link.control.online())
        scene.model = initial_arrays(study)["model"]
        scene.answered(time.monotonic())
        yield scene


class _Scene:
    """The node, what can be done to it, and the coordinator's part."""

    def __init__(
        self, node: LiveNode, wire: TcpLink, disk: SmallDisk, clock: Clock, study: Study, transport: FlowerTransport
    ) -> None:
        self.node, self.wire, self.disk, self.clock = node, wire, disk, clock
        self._study, self._transport = study, transport
        self.model: Arrays = {}
        self._round = 1
        self._receipts: list[Receipt] = []
        self.cannot = {kind: why for kind, why in (("disk", disk.why), ("clock", clock.why)) if why}

    # -- the coordinator -------------------------------------------------------------------------------

    def _ask(self) -> Reply:
        """Ask for the round once."""
        receipt = self._receipts[-1] if self._receipts else None
        request = Request(kind="train", study=self._study, round=self._round, arrays=self.model, receipt=receipt)
        return next(iter(self._transport.exchange({SITE: request}, RECOVERY_SECONDS)))

    def answered(self, since: float, fault: _Fault | None = None) -> None:
        """Ask until a round is answered that was asked for after ``since``.

        Raises:
            EnvironmentProblem: that takes longer than :data:`RECOVERY_SECONDS`.
        """
        while True:
            asked = time.monotonic()
            try:
                reply = self._ask()
            except httpx.HTTPError as error:  # our own SuperLink, busy
                raise EnvironmentProblem(f"the SuperLink fails: {error}") from error
            if isinstance(reply, TrainReply) and reply.receipt is not None:
                self._receipts.append(reply.receipt)
                self.model, self._round = reply.arrays, self._round + 1
                if asked >= since:
                    return
                continue
            reason = reply.reason.value if isinstance(reply, Refusal) else type(reply).__name__
            if fault is not None:
                fault.attempts += 1
                fault.said[reason] += 1
            if time.monotonic() > max(since, asked) + RECOVERY_SECONDS:
                raise EnvironmentProblem(f"round {self._round}: {reason}; the node did not come back")
            time.sleep(0.5)

    # -- faults ----------------------------------------------------------------------------------------

    def suffer(self, kind: str, draw: random.Random, lengths: tuple[float, float]) -> _Fault:
        """One fault at a random moment of running rounds, until a later round is answered; ``lengths``: in seconds."""
        wait_until("the node is whole", self.node.pids)
        fault = _Fault(kind)
        delay, lasts = draw.uniform(0.0, 3.0), draw.uniform(*lengths)
        over: list[float] = []

        def strike() -> None:
            time.sleep(delay)
            started = time.monotonic()
            self._do(kind, lasts, draw)
            over.append(time.monotonic())
            fault.lasted = 0.0 if kind in KILLS else over[0] - started

        thread = threading.Thread(target=strike)
        thread.start()
        while thread.is_alive():
            self.answered(0.0, fault)
        thread.join()
        self.answered(over[0], fault)
        fault.back = time.monotonic() - over[0]
        return fault

    def _do(self, kind: str, lasts: float, draw: random.Random) -> None:
        if kind in KILLS:
            pids = wait_until("the node is whole", self.node.pids)
            chosen = [pids[kind]] if kind != "all" else list(pids.values())
            for pid in chosen:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif kind in ("cut", "silence"):
            self.wire.cut(silent=kind == "silence")
            time.sleep(lasts)
            self.wire.mend()
        elif kind == "disk":
            self.disk.fill()
            time.sleep(lasts)
            self.disk.free()
        else:
            self.clock.step(draw.choice((-DAY, DAY)))
            time.sleep(lasts)
            self.clock.step(0)

    # -- what must hold --------------------------------------------------------------------------------

    def verify(self) -> dict[str, Any]:
        """Stop the node and look at what it wrote.

        Raises:
            EnvironmentProblem: something does not hold.
        """
        self.node.command("stop", "--now", rc=None)
        wait_until("the node stops", lambda: not self.node.folder.is_held("node"))
        settings = load_node_settings(self.node.config)
        site = settings.site_settings()
        rows = Ledger(site.ledger, site.name).entries()
        entries = verify_log(site.audit, Signer(Path(settings.superlink.key)).public)
        charges = Counter(row.round for row in rows if row.kind == "reserve")
        settled = [row.settles for row in rows if row.kind == "settle"]
        left = [entry for entry in entries if entry["kind"] == "out" and entry["answer"] == "TrainReply"]
        told = [receipt.count for receipt in self._receipts]
        _hold("a charge was settled twice", len(settled) == len(set(settled)))
        _hold("two answers show one charge", len(told) == len(set(told)) == self._round - 1)
        _hold("more answers left than were paid for", all(_paid(entry["round"], left, charges) for entry in left))
        _hold("an answer left before its charge was in the audit log", _in_order(entries))
        _hold("an answer came that the audit log does not know", len(left) >= len(told))
        return {
            "rounds": self._round - 1,
            "charges": sum(charges.values()),
            "settled": len(settled),
            "answers_let_out": len(left),
            "answers_received": len(told),
            "most_attempts_at_a_round": max(charges.values()),
            "audit_entries": len(entries),
            "ledger_and_log_verify": True,
            "starts_of_the_supervisor": self.node.starts,
        }


def _paid(number: int, left: list[Entry], charges: Counter[int]) -> bool:
    return bool(sum(entry["round"] == number for entry in left) <= charges[number])


def _in_order(entries: list[Entry]) -> bool:
    """Each private answer has a ledger entry of its own between it and the answer before."""
    fresh = False
    for entry in entries:
        if entry["kind"] == "ledger":
            fresh = True
        elif entry["kind"] == "out" and entry["answer"] == "TrainReply":
            if not fresh:
                return False
            fresh = False
    return True


def _hold(what: str, holds: bool) -> None:
    if not holds:
        raise EnvironmentProblem(f"chaos: {what}")
