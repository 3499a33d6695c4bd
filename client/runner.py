# SPDX-License-Identifier: Apache-2.0
"""The hospital's own runner: ``python -m fedneuro.client.runner NODE.toml``.

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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from ..privacy.errors import BadInput, FedNeuroError, Reason, Refused
from ..privacy.pace import Pace
from .app import answer, masked
from .node_settings import NodeSettings, read_node_settings
from .site import Site

__all__ = ["Runner", "main"]

HEARTBEAT_SECONDS = 10.0
"""Flower gives a task up after 30 s without a sign of life."""
RECONNECT_SECONDS = 1.0

_log = logging.getLogger("fedneuro.runner")


class Runner:
    """Serves one site's tasks, one after another.

    Args:
        settings: the hospital's node file.
        site: who handles the requests.
    """

    def __init__(self, settings: NodeSettings, site: Site) -> None:
        self._bundle = settings.runner.bundle
        self._address = f"127.0.0.1:{settings.runner.port}"
        self._site = site
        secret = SuperExecAuthHttpInterceptor(
            master_secret=load_superexec_auth_secret(secret_file=settings.runner.secret),
            protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
        )
        self._tasks = self._client("SuperExec", secret)

    def run(self) -> None:
        """Serve until a :class:`KeyboardInterrupt`.

        Raises:
            BadInput: the SuperNode does not accept the shared secret.
        """
        pace = Pace(longest=0.25)
        while True:
            try:
                token = self._acquire()
            except httpx.TransportError:
                time.sleep(RECONNECT_SECONDS)  # the SuperNode is not up yet, or restarts
                continue
            if token:
                self._serve(token)
                pace.news()
            else:
                time.sleep(pace.pause())

    def close(self) -> None:
        """Release the connection."""
        self._tasks.close()

    def _acquire(self) -> str:
        """Token of a task that waits, or an empty text."""
        try:
            response = self._tasks.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                text = f"the SuperNode on {self._address} refuses the secret in runner.secret; give both the same file"
                raise BadInput(text) from error
            _log.warning("the SuperNode answers with status %s", error.response.status_code)
            return ""
        return str(response.token) if response.HasField("task") else ""

    def _serve(self, token: str) -> None:
        """Steps 2 to 4 for one task. Never raises for what the task holds."""
        client = self._client("flwr-clientapp", RuntimeTokenHttpInterceptor(token))
        message: Message | None = None
        context: Context | None = None
        status = SubStatus.FAILED
        try:
            with _heartbeat(client):
                message, context, _, bundle = pull_task_input(client)
                reply = self._reply(message, bundle.hash_str)
                push_message(client, reply, context)
                status = SubStatus.FAILED if reply.has_error() else SubStatus.COMPLETED
        except KeyboardInterrupt:
            # The hospital stops its node: let the coordinator know at once, then go.
            if message is not None and context is not None:
                push_message(
                    client, Message(Error(ErrorCode.NODE_UNAVAILABLE, Reason.LOST.value), reply_to=message), context
                )
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

    def _client(self, component: str, proof: object) -> RuntimeHttpClient:
        """A client of the SuperNode's Runtime API, without Flower's retries: those end the process by signal."""
        version = RuntimeVersionHttpInterceptor(component_name=component)
        return RuntimeHttpClient.from_server_address(self._address, True, None, interceptors=[version, proof])


@contextmanager
def _heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """Signs of life while a task lasts. Flower's own sender would end this process when a run is stopped."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            try:
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (httpx.HTTPError, RuntimeError) as error:
                _log.warning("no heartbeat: %s", error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(arguments: list[str]) -> int:
    """Run the runner of the node file that is named on the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if len(arguments) != 1:
            raise BadInput("usage: python -m fedneuro.client.runner NODE.toml")
        settings = read_node_settings(Path(arguments[0]))
        runner = Runner(settings, Site(settings.site_settings()))
        try:
            _log.info("site %s serves bundle %s", settings.site.name, settings.runner.bundle[:12])
            runner.run()
        finally:
            runner.close()
    except KeyboardInterrupt:
        _log.info("stopped")
    except FedNeuroError as error:
        _log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
