# SPDX-License-Identifier: Apache-2.0
"""Taking tasks from Flower's Runtime API: what the hospital's and the coordinator's runner have in common.

Both stand in place of Flower's executor, which starts a new process per task and hands it the coordinator's
code. The Runtime API is the SuperNode's on the hospital's side and the SuperLink's on the coordinator's; a
shared secret proves that a runner may take tasks. Flower's own clients end their process by signal when a
run is stopped or a request is refused; a runner lives longer than a run, so these do not.
"""

import hashlib
import logging
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from .errors import BadInput

__all__ = ["TURNED_AWAY", "Doorbell", "RunnerLine", "TaskSource", "heartbeat", "quicken_transfers"]

HEARTBEAT_SECONDS = 10.0
"""Flower gives a task up after 30 s without a sign of life."""

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_log = logging.getLogger("fedneuro.tasks")


class TaskSource:
    """Where tasks of one kind come from.

    Args:
        address: host:port of the Runtime API.
        kind: which tasks to take.
        secret: file of the shared secret, read as raw bytes.
        root_certificate: PEM file that vouches for the address; None speaks plain HTTP, on this machine only.
    """

    def __init__(
        self,
        address: str,
        kind: Literal["flwr-clientapp", "flwr-serverapp"],
        secret: Path,
        root_certificate: Path | None = None,
    ) -> None:
        self.address = address
        self.root = None if root_certificate is None else root_certificate.read_bytes()
        self._kind = kind
        self._secret = secret
        proof = SuperExecAuthHttpInterceptor(master_secret=secret.read_bytes(), protected_methods=_ACQUIRE)
        self._client = self._connect("SuperExec", proof)

    def acquire(self) -> str:
        """Token of a task that waits, or an empty text; also while the Runtime API is not up.

        Raises:
            BadInput: the Runtime API does not accept the shared secret.
        """
        try:
            response = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._kind]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                text = f"{self.address} refuses the shared secret in {self._secret}; give both sides the same file"
                raise BadInput(text) from error
            _log.warning("%s answers with status %s", self.address, error.response.status_code)
            return ""
        except httpx.TransportError:
            return ""
        return str(response.token) if response.HasField("task") else ""

    def task_client(self, token: str) -> RuntimeHttpClient:
        """A client that may read and answer the task of ``token``; the caller closes it."""
        return self._connect(self._kind, RuntimeTokenHttpInterceptor(token))

    def close(self) -> None:
        """Release the connection."""
        self._client.close()

    def _connect(self, component: str, proof: ProtobufClientInterceptor) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name=component)
        return RuntimeHttpClient.from_server_address(
            self.address, self.root is None, self.root, interceptors=[version, proof]
        )


def _bell_name(secret: Path) -> str:
    """An abstract socket name (unix(7)) that only who knows the secret can tell."""
    return f"\0fedneuro-bell-{hashlib.sha256(b'bell' + secret.read_bytes()).hexdigest()[:32]}"


TURNED_AWAY = b"turned away"
"""What a ring says of a message that the SuperNode did not take in; any other ring announces a task."""


class Doorbell:
    """Where a runner waits: a task is announced here as soon as all of its parts are there.

    Nothing is carried but the news; a lost ring costs one look's pause. Without abstract sockets (not Linux), or where
    another runner waits already, it never rings.

    Args:
        secret: file of the secret that SuperNode and runner share.

    Attributes:
        there: whether it can ring.
        turned_away: messages that were turned away, and that nobody has written down yet.
    """

    def __init__(self, secret: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.there, self.turned_away = False, 0
        with suppress(OSError):
            self._socket.bind(_bell_name(secret))
            self.there = True

    def wait(self, seconds: float) -> bool:
        """Wait for a ring, at most so long; whether there was one."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return False
        with suppress(OSError):
            while word := self._socket.recv(16):
                self.turned_away += word == TURNED_AWAY
        return True

    def close(self) -> None:
        """Nobody waits any more."""
        self._socket.close()


class RunnerLine:
    """A line to the :class:`Doorbell` of one process: rings it, and tells when that very process is gone.

    The kernel tells (unix(7): a socket that was connected to one which is no more gets ``ECONNREFUSED``), at once, and
    also where another process waits under the same name by then.

    Args:
        secret: file of the secret that both sides share.
    """

    def __init__(self, secret: Path) -> None:
        self._name = _bell_name(secret)
        self._socket: socket.socket | None = None

    def ring(self, word: bytes = b"!") -> bool:
        """Ring who waits; false, once, where the process that was reached before is gone."""
        if self._socket is None:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            line.setblocking(False)
            try:
                line.connect(self._name)
            except OSError:  # nobody waits
                line.close()
                return True
            self._socket = line
        try:
            self._socket.send(word)
        except BlockingIOError:  # it is busy, and has not heard the rings before
            return True
        except OSError:
            self.close()
            return False
        return True

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


PART_TRIES = 40
"""Looks for one part of a message: about five minutes."""


def quicken_transfers(first_pause: float = 0.02) -> None:
    """Look for a part of a message that is still on its way after ``first_pause`` seconds, not after one second.

    A message is announced before its parts are sent, so who looks often always meets such a part. Flower
    doubles the pause at each look, up to ten seconds; where it begins is changed here, in this process, and when it
    ends: a message whose coordinator died on the way never becomes whole, and Flower would wait two hours for it.
    """
    from flwr.supercore.inflatable import inflatable_utils

    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = function.__kwdefaults__ or {}
        defaults["initial_backoff"] = first_pause
        defaults["max_tries_per_object"] = PART_TRIES


@contextmanager
def heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """Signs of life while a task lasts."""
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
