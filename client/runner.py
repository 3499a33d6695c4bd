# SPDX-License-Identifier: Apache-2.0
"""The hospital's own runner: ``fedneuro-node run --config NODE.toml``.

It stands in place of Flower's executor beside a SuperNode that was started with ``--isolation process`` and a
shared secret. Flower's executor unpacks the coordinator's bundle and runs the code in it, in a new process per
message. This runner lives on between rounds and runs only what the hospital installed:

    1. take a task from the SuperNode on this machine; prove knowledge of the shared secret
    2. refuse it unless its bundle has the one hash that the hospital's settings name; never unpack the bundle
    3. decode the request strictly, let the :class:`Site` gate and handle it, encode the reply; the work itself is done
       by a child behind walls (:mod:`.sandboxed_site`)
    4. hand the reply to the SuperNode; of an error, only the reason code

Data, network and optimiser stay in the child's memory between messages. SIGTERM and SIGINT end it, also in the middle
of a round: the coordinator is told that the site is lost, and what was saved before stays whole. SIGUSR1 lets it
finish the task in hand first. While the hospital pauses its node (:mod:`.manners`) no task is taken.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from ..privacy.errors import ContractViolation, FedNeuroError, Reason, Refused
from ..privacy.flower_tasks import Doorbell, TaskSource, heartbeat, quicken_transfers
from ..privacy.pace import Pace
from .app import answer, masked
from .integrity import require_integrity
from .manners import Manners
from .message_bounds import bound_unfolding, largest_message
from .network_layout import count_with
from .node_settings import NodeSettings
from .run_folder import RunFolder
from .sandboxed_site import SandboxedSite
from .site import Site
from .training_child import Caps, TrainingChild

__all__ = ["Runner", "serve"]

HELD_PAUSE = 0.2
"""Seconds between two looks whether a pause has ended."""
GIB = 2**30

_log = logging.getLogger("fedneuro.runner")


class Runner:
    """Serves one site's tasks, one after another.

    Args:
        settings: the hospital's node file.
        site: who handles the requests.
        hold: why no task may be taken now, or nothing.
        note: is called after each task with what it was.
    """

    def __init__(
        self,
        settings: NodeSettings,
        site: Site,
        hold: Callable[[], str] = lambda: "",
        note: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self._bundle = settings.runner.bundle
        self._site = site
        self._hold, self._note = hold, note
        self.draining = False
        self._bell = Doorbell(Path(settings.runner.secret))
        self._source = TaskSource(f"127.0.0.1:{settings.runner.port}", "flwr-clientapp", Path(settings.runner.secret))

    def run(self) -> None:
        """Serve until a :class:`KeyboardInterrupt`, or until ``draining`` and no task is in hand.

        Raises:
            BadInput: the SuperNode does not accept the shared secret.
        """
        # The SuperNode rings when a task is there; looking is for a ring that was lost, and where no bell is.
        pace = Pace(shortest=0.5, longest=0.5) if self._bell.there else Pace(longest=0.25)
        while not self.draining:
            if self._hold():
                time.sleep(HELD_PAUSE)
            elif token := self._source.acquire():
                self._serve(token)
                pace.news()
            else:
                self._bell.wait(pace.pause())
                for _ in range(self._bell.turned_away):
                    self._site.turn_away("", ContractViolation("a message that was too large to be taken in"))
                self._bell.turned_away = 0

    def close(self) -> None:
        """Release the connection, and sign the audit log."""
        self._bell.close()
        self._source.close()
        self._site.close()

    def _serve(self, token: str) -> None:
        """Steps 2 to 4 for one task. Never raises for what the task holds."""
        client = self._source.task_client(token)
        message: Message | None = None
        context: Context | None = None
        status = SubStatus.FAILED
        try:
            with heartbeat(client):
                message, context, _, bundle = pull_task_input(client)
                reply = self._reply(message, bundle.hash_str)
                push_message(client, reply, context)
                status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
        except KeyboardInterrupt:
            # The hospital stops its node: let the coordinator know at once, then go.
            if message is not None and context is not None:
                lost = Message(Error(ErrorCode.NODE_UNAVAILABLE, Reason.LOST.value), reply_to=message)
                push_message(client, lost, context)
            raise
        except (httpx.HTTPError, ObjectPullError) as error:
            # The run was stopped, or the SuperNode went away.
            _log.warning("a task was given up: %s: %s", type(error).__name__, error)
        except Exception as error:
            # A message that cannot be put together; the SuperNode answers where nothing is handed over.
            _log.warning("a task was given up: %s: %s", type(error).__name__, error)
            if message is None:
                known = error if isinstance(error, FedNeuroError) else ContractViolation("a message that is none")
                self._site.turn_away("", known)
        finally:
            push_task_output(client, context, status, "")
            client.close()

    def _reply(self, message: Message, bundle: str) -> Message:
        started = time.monotonic()
        try:
            if bundle != self._bundle:
                text = f"the task's bundle has hash {bundle[:12]}, this node serves {self._bundle[:12]} only"
                raise Refused(f"{text}; ask the coordinator, then change runner.bundle")
            reply = answer(message, self._site)
        except Exception as error:
            self._site.turn_away(message.metadata.message_type, error)
            reply = masked(message, error)
        kind, number, seconds = message.metadata.message_type, message.metadata.group_id, time.monotonic() - started
        outcome = "refused" if reply.has_error() else "answered"
        _log.info("%s of round %s %s in %.2f s", kind[:40], number[:10], outcome, seconds)
        self._note({"kind": kind[:40], "round": number[:10], "outcome": outcome, "seconds": round(seconds, 3)})
        return reply


def serve(settings: NodeSettings) -> None:
    """Serve the node of ``settings`` until SIGTERM or SIGINT.

    Raises:
        BadInput: the SuperNode does not accept the shared secret.
        EnvironmentProblem: the code is not what was installed; another runner serves this state folder.
        Refused: a wall around training is missing and ``sandbox.isolation`` is ``required``.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    quicken_transfers()
    bound_unfolding(largest_message(settings.site_settings().policy))
    integrity = require_integrity(record=settings.runner.require_record)
    site_settings, folder = settings.site_settings(), RunFolder(Path(settings.site.state))
    lock = folder.hold("runner", "a runner")
    status: dict[str, Any] = {"pid": os.getpid(), "since": time.time(), "integrity": integrity.note or "proven"}

    def publish() -> None:
        walls = child.walls
        status["child"] = {"pid": child.pid, "held": child.held, "crashes": child.crashes}
        status["walls"] = {"network": walls.network, "files": walls.files, "why": walls.why} if walls else None
        folder.write("runner", status)

    def note(last: dict[str, Any]) -> None:
        status["last"] = {**last, "at": time.time()}
        publish()

    manners = Manners(
        folder,
        site_settings.policy,
        yield_gpu=settings.sandbox.yield_gpu,
        ours=lambda: {os.getpid(), *filter(None, [child.pid])},
    )
    child = TrainingChild(site_settings, _caps(settings), folder.scratch, manners.hold, publish)
    count_with(child.count)
    runner = Runner(settings, SandboxedSite(child), manners.hold, note)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(runner, "draining", True))
    _log.info("site %s serves bundle %s", settings.site.name, settings.runner.bundle[:12])
    if integrity.note:
        _log.warning("the installed code is not proven: %s", integrity.note)
    try:
        child.start()
        if child.walls and not child.walls.complete:
            _log.warning("training is not walled in: %s", child.walls.why)
        runner.run()
        _log.info("stopped; no task was in hand")
    except KeyboardInterrupt:
        _log.info("stopped")
    finally:
        count_with()
        runner.close()
        lock.release()


def _caps(settings: NodeSettings) -> Caps:
    import psutil

    part = settings.sandbox
    return Caps(
        memory=part.memory_gib * GIB or 0.9 * psutil.virtual_memory().total,
        seconds=3600 * part.request_hours,
        isolate=part.isolation != "off",
        require_walls=part.isolation == "required",
    )
