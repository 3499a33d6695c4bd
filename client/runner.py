# SPDX-License-Identifier: Apache-2.0
"""The hospital's own runner: ``fedneuro-node run --config NODE.toml``.

It stands in place of Flower's executor beside a SuperNode that was started with ``--isolation process`` and a
shared secret. Flower's executor unpacks the coordinator's bundle and runs the code in it, in a new process per
message. This runner lives on between rounds and runs only what the hospital installed:

    1. take a task from the SuperNode on this machine; prove knowledge of the shared secret
    2. refuse it unless its bundle has the one hash that the hospital's settings name; never unpack the bundle
    3. decode the request strictly, let the :class:`Site` gate and handle it, encode the reply
    4. hand the reply to the SuperNode; of an error, only the reason code

Data, network and optimiser stay in memory between messages. SIGTERM and SIGINT end it, also in the middle of
a round: the coordinator is told that the site is lost, and what was saved before stays whole.
"""

import logging
import signal
import sys
import time
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from ..privacy.errors import Reason, Refused
from ..privacy.flower_tasks import TaskSource, heartbeat, quicken_transfers
from ..privacy.pace import Pace
from .app import answer, masked
from .node_settings import NodeSettings
from .site import Site

__all__ = ["Runner", "serve"]

_log = logging.getLogger("fedneuro.runner")


class Runner:
    """Serves one site's tasks, one after another.

    Args:
        settings: the hospital's node file.
        site: who handles the requests.
    """

    def __init__(self, settings: NodeSettings, site: Site) -> None:
        self._bundle = settings.runner.bundle
        self._site = site
        self._source = TaskSource(f"127.0.0.1:{settings.runner.port}", "flwr-clientapp", Path(settings.runner.secret))

    def run(self) -> None:
        """Serve until a :class:`KeyboardInterrupt`.

        Raises:
            BadInput: the SuperNode does not accept the shared secret.
        """
        pace = Pace(longest=0.25)
        while True:
            if token := self._source.acquire():
                self._serve(token)
                pace.news()
            else:
                time.sleep(pace.pause())

    def close(self) -> None:
        """Release the connection."""
        self._source.close()

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
        except (httpx.HTTPError, RuntimeError, ValueError) as error:
            # The run was stopped, the SuperNode went away, or the message cannot be read at all.
            _log.warning("a task was given up: %s: %s", type(error).__name__, error)
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
            reply = masked(message, error)
        kind, number, seconds = message.metadata.message_type, message.metadata.group_id, time.monotonic() - started
        outcome = "refused" if reply.has_error() else "answered"
        _log.info("%s of round %s %s in %.2f s", kind[:40], number[:10], outcome, seconds)
        return reply


def serve(settings: NodeSettings) -> None:
    """Serve the node of ``settings`` until SIGTERM or SIGINT.

    Raises:
        BadInput: the SuperNode does not accept the shared secret.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    quicken_transfers()
    runner = Runner(settings, Site(settings.site_settings()))
    _log.info("site %s serves bundle %s", settings.site.name, settings.runner.bundle[:12])
    try:
        runner.run()
    except KeyboardInterrupt:
        _log.info("stopped")
    finally:
        runner.close()
