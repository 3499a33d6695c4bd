# SPDX-License-Identifier: Apache-2.0
"""A SuperNode that died without a word: the next one on this machine says it for it, at once.

The SuperLink takes a node for connected until a minute after its last sign of life (two heartbeats of 30 s). For so
long it refuses the node that was started again, and whoever waits for the dead one's answer waits. Our node knows
better: SuperNodes of one node follow one another. So a SuperNode keeps a note (``state/run/lease.json``) of its number
and of the message that it has in hand, and the one that comes after it, with the same key,

    1. tells the SuperLink that the node is gone, which throws half an answer away (``server/second_delivery.py``),
    2. answers that message with "lost",
    3. connects. A message that the dead one was given but could not note any more is given out again.

Only where the note is sure to be a dead predecessor's: the note is locked with flock(2) by the SuperNode that lives; it
names this boot of this machine; and it is younger than the minute. Otherwise nothing is said, and the minute passes as
before: a second node with the same key, on another machine, is refused as ever.

Nothing here touches the privacy ledger: what the dead one was charged stays charged.
"""

import base64
import fcntl
import json
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from google.protobuf.message import DecodeError

from ..privacy.errors import Reason

__all__ = ["LEASE_SECONDS", "Lease", "end_lost_lease"]

LEASE_SECONDS = float(HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL)
_ACTIVATE, _DEACTIVATE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
_HEARTBEAT, _PULL = "/v1/fleet/send-node-heartbeat", "/v1/fleet/pull-messages"
_PUSH, _PART = "/v1/fleet/push-messages", "/v1/fleet/push-object"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, DecodeError)
_log = logging.getLogger("fedneuro.supernode")


class Lease:
    """The note of the SuperNode that lives, or of the one that died.

    Args:
        path: the note; beside it ``NAME.lock`` is held while this process lives.

    Attributes:
        ours: whether this process may read and write it; never, where another one lives, or not on Linux.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._guard = path, threading.Lock()
        self._note: dict[str, Any] = {}
        self._descriptor = -1
        self._boot = ""
        with suppress(OSError):
            self._boot = _BOOT.read_text(encoding="ascii").strip()
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.ours = True
            return
        self.close()
        self.ours = False

    def left_behind(self) -> tuple[int, bytes] | None:
        """Number of the node that died, and its message or nothing; None if the SuperLink has forgotten it anyway."""
        if not self.ours:
            return None
        try:
            note = json.loads(self._path.read_text(encoding="utf-8"))
            if note["boot"] != self._boot or not 0 <= time.monotonic() - note["seen"] < LEASE_SECONDS:
                return None
            return int(note["node"]), base64.b64decode(note["message"], validate=True)
        except _UNREADABLE:  # none, or half of one: a full disk
            return None

    def begin(self, node: int) -> None:
        """The SuperLink took this node up."""
        self._write(node=str(node), message="")

    def seen(self, message: bytes | None = None) -> None:
        """The SuperLink heard from this node, which has ``message`` in hand (empty: none; None: as before)."""
        if self._note:
            self._write(**({} if message is None else {"message": base64.b64encode(message).decode("ascii")}))

    def end(self) -> None:
        """The SuperLink let this node go."""
        with self._guard:
            if self._note:  # not that of the one before, which is still to be spoken for
                self._path.unlink(missing_ok=True)
            self._note = {}

    def close(self) -> None:
        """Let go of the lock, as the kernel does when the process dies."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, **values: str) -> None:
        """Replace the note; it need not outlive the machine, so it is not flushed."""
        if not self.ours:
            return
        with self._guard, suppress(OSError):
            self._note = {"boot": self._boot, **self._note, **values, "seen": time.monotonic()}
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self._note) + "\n", encoding="utf-8")
            part.replace(self._path)


def end_lost_lease(path: Path) -> Lease:
    """From now on the SuperNode of this process speaks for the one before it, and keeps a note for the one after it."""
    from flwr.supernode import fleet_http_connection as connection

    lease = Lease(path)
    stock = connection.__dict__["FleetHttpClient"]
    left: set[str] = set()  # parts of the answer that is on its way

    class LeasedFleetHttpClient(stock):  # type: ignore[misc,valid-type]
        def _unary_unary(self, *, path: str, request: Any, **named: Any) -> Any:
            if path == _ACTIVATE and (note := lease.left_behind()) is not None:
                _speak_for(self, *note)
            response = super()._unary_unary(path=path, request=request, **named)
            if path == _ACTIVATE:
                lease.begin(response.node_id)
            elif path == _DEACTIVATE:
                lease.end()
            elif path == _HEARTBEAT:
                lease.seen()
            elif path == _PULL and response.messages_list:
                lease.seen(response.messages_list[0].SerializeToString())
            elif path == _PUSH:
                left.clear()
                left.update(response.objects_to_push)
            elif path == _PART:
                left.discard(request.object_id)
            if path in (_PUSH, _PART) and not left:
                lease.seen(b"")
            return response

    connection.__dict__["FleetHttpClient"] = LeasedFleetHttpClient
    return lease


def _speak_for(client: Any, node: int, message: bytes) -> None:
    """Steps 1 and 2; where the coordinator does not take one of them, the minute passes as before."""
    try:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
        _log.warning("the SuperNode before this one died; the SuperLink was told")
    except (httpx.HTTPError, RuntimeError) as error:
        _log.warning("the SuperLink was not told that the SuperNode before is gone: %s", error)
    if message:
        try:
            _answer_lost(client, node, message)
        except (httpx.HTTPError, *_UNREADABLE) as error:  # the run has ended
            _log.warning("the message that the SuperNode before had in hand was not answered: %s", error)


def _answer_lost(client: Any, node: int, content: bytes) -> None:
    message = message_from_proto(ProtoMessage.FromString(content))
    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, Reason.LOST.value), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    answer = client.PushMessages(
        PushMessagesRequest(
            node=Node(node_id=node),
            messages_list=[message_to_proto(reply)],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[0.0],
        )
    )
    for key in answer.objects_to_push:
        client.PushObject(
            PushObjectRequest(
                node=Node(node_id=node),
                run_id=reply.metadata.run_id,
                session_id=answer.session_id,
                object_id=key,
                object_content=reply.deflate(),
            )
        )
