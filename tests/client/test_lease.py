# SPDX-License-Identifier: Apache-2.0
"""A SuperNode that died is given up at once by the next one: against Flower's real handlers and state of a SuperLink.

Only HTTP is left out: the client's calls are the handlers'. The node that is killed under real processes is
``fedneuro-sim bench chaos-node --kind supernode``.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode import fleet_http_connection

from fedneuro.client.lease import LEASE_SECONDS, Lease, end_lost_lease
from tests.flower_link import Link


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


class Nodes:
    """SuperNodes of one hospital, one after another."""

    def __init__(self, link: Link, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.link, self.path, self._patch = link, path, patch

    def start(self) -> tuple[Any, Lease]:
        """A SuperNode's connection before it is up, and its note."""
        self._patch.setitem(fleet_http_connection.__dict__, "FleetHttpClient", self.link.client())
        lease = end_lost_lease(self.path)
        return vars(fleet_http_connection)["FleetHttpClient"](), lease

    def live(self) -> tuple[Any, Lease]:
        """One that is connected."""
        client, lease = self.start()
        assert client.ActivateNode(ACTIVATE).node_id == self.link.node
        return client, lease


@pytest.fixture
def nodes(link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(link, tmp_path / "run" / "lease.json", monkeypatch)


ACTIVATE = ActivateNodeRequest(public_key=b"key", heartbeat_interval=30)


def pull(client: Any, node: int) -> Any:
    return client.PullMessages(PullMessagesRequest(node=Node(node_id=node))).messages_list[0]


def test_the_next_one_answers_and_connects_at_once(link: Link, nodes: Nodes) -> None:
    client, lease = nodes.live()
    asked = link.ask()
    assert pull(client, link.node).metadata.message_id == asked
    lease.close()  # kill -9
    nodes.live()
    answer = link.answer(asked)
    assert answer is not None and answer.error.code == ErrorCode.NODE_UNAVAILABLE and answer.error.reason == "lost"
    assert answer.metadata.src_node_id == link.node, "its own answer, not one that the SuperLink made up"


def test_an_answer_that_was_given_is_not_replaced(link: Link, nodes: Nodes) -> None:
    """It is its own as soon as all of its parts are there, and not before."""
    client, lease = nodes.live()
    asked = link.ask()
    given = message_from_proto(pull(client, link.node))
    reply = Message(RecordDict({"c": ConfigRecord({"x": 1})}), reply_to=given)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    parts = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
    request = PushMessagesRequest(
        node=Node(node_id=link.node), clientapp_runtime_list=[0.0],
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )  # fmt: skip
    response = client.PushMessages(request)
    assert len(response.objects_to_push) == len(parts) > 1
    for key in response.objects_to_push:
        assert json.loads(nodes.path.read_text())["message"], "half an answer is none"
        part = PushObjectRequest(
            node=Node(node_id=link.node), run_id=link.run, session_id=response.session_id, object_id=key,
            object_content=parts[key],
        )  # fmt: skip
        assert client.PushObject(part).stored
    assert not json.loads(nodes.path.read_text())["message"]
    lease.close()
    nodes.live()
    answer = link.answer(asked)
    assert answer is not None and not answer.has_error()


def test_a_run_that_ended_meanwhile_is_no_hindrance(link: Link, nodes: Nodes) -> None:
    client, lease = nodes.live()
    link.ask()
    pull(client, link.node)
    lease.close()
    task = link.state.get_tasks(run_ids=[link.run])[0]
    assert link.state.finish_task(task.task_id, SubStatus.STOPPED, "")
    nodes.live()


def test_a_superlink_that_is_gone_meanwhile_is_told_later(
    link: Link, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, lease = nodes.live()
    asked = link.ask()
    pull(client, link.node)
    lease.close()
    second, _ = nodes.start()

    def gone(**_: Any) -> Any:
        raise httpx.ConnectError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(fleet_handlers, "push_messages", gone)
        patch.setattr(fleet_handlers, "activate_node", gone)
        with pytest.raises(httpx.ConnectError):
            second.ActivateNode(ACTIVATE)
    second.ActivateNode(ACTIVATE)
    answer = link.answer(asked)
    assert answer is not None and answer.metadata.src_node_id == link.node


def test_one_that_left_as_it_should_leaves_no_note(link: Link, nodes: Nodes) -> None:
    client, lease = nodes.live()
    client.DeactivateNode(DeactivateNodeRequest(node_id=link.node))
    assert not nodes.path.exists()
    lease.close()
    nodes.live()


@pytest.mark.parametrize("case", ["alive", "another boot", "old", "no note", "half a note", "of another machine"])
def test_who_is_not_surely_dead_is_never_given_up(
    link: Link, nodes: Nodes, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A second node with the same key is refused, as by Flower alone (contract: it still refuses)."""
    client, lease = nodes.live()
    if case != "alive":
        lease.close()
    text = nodes.path.read_text()
    changed = {
        "another boot": text.replace(json.loads(text)["boot"], "0" * 36),
        "half a note": text[: len(text) // 2],
        "of another machine": "{}",
    }
    nodes.path.write_text(changed.get(case, text))
    if case == "no note":
        nodes.path.unlink()
    if case == "old":
        now = time.monotonic()
        monkeypatch.setattr("fedneuro.client.lease.time.monotonic", lambda: now + LEASE_SECONDS)
    second, _ = nodes.start()
    with pytest.raises(httpx.HTTPStatusError):
        second.ActivateNode(ACTIVATE)
    beat = SendNodeHeartbeatRequest(node=Node(node_id=link.node), heartbeat_interval=30)
    assert client.SendNodeHeartbeat(beat).success


def test_a_sign_of_life_renews_the_note(link: Link, nodes: Nodes) -> None:
    client, _ = nodes.live()
    before = json.loads(nodes.path.read_text())["seen"]
    client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=Node(node_id=link.node), heartbeat_interval=30))
    assert json.loads(nodes.path.read_text())["seen"] > before
