# SPDX-License-Identifier: Apache-2.0
"""A link that breaks after a request and before its answer costs the seconds of asking again, and nothing else.

Flower's SuperLink behind a real socket, Flower's SuperNode loop and Grid, our transport; between them and the SuperLink
a proxy that swallows the answer to one request of a kind. The same with Flower's own SuperLink shows what is mended.
"""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import SqlLinkState, sql_linkstate
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink import main as application
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from sqlalchemy import text

from fedneuro.privacy.contract import Refusal, Reply, Request, TrainReply
from fedneuro.privacy.errors import Reason
from fedneuro.privacy.flower_tasks import heartbeat
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import encode_reply
from fedneuro.server import flower_transport, held_looks
from fedneuro.server.flower_transport import FlowerTransport
from fedneuro.server.held_looks import News
from fedneuro.server.lost_answers import KeepsGiven, LostAnswers, present_or_answered
from fedneuro.server.superlink import answer_again, hold_looks, make_deliveries_again
from tests.flower_link import Link

SITE = "north"
ARRAYS = {f"w{n}": np.full(300, n, np.float32) for n in range(3)}
REQUEST = Request(
    kind="train", round=1, arrays=ARRAYS,
    study=Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}}),
)  # fmt: skip
LOOK, TAKEN = "/v1/runtime/pull-messages", "/v1/fleet/confirm-message-received"
FEW_SECONDS = 6.0
AVAILABLE = "check_node_availability_for_in_message"


def at_any_time() -> bool:
    return True


class Wire(ThreadingHTTPServer):
    """Forwards requests to a port of this machine; the answer to one of a kind is lost.

    Attributes:
        swallow: path of that request; empty once its answer was lost.
        only: whether it is the one.
        until: its asker hears that the link broke when this holds.
        asked: requests that were answered, by path; ``then``: when that one was.
    """

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.target, self.swallow, self.guard = target, "", threading.Lock()
        self.asked, self.then = Counter[str](), Counter[str]()
        self.only: Callable[[], bool] = at_any_time
        self.until: Callable[[], bool] = at_any_time

    def loses(self, path: str) -> bool:
        with self.guard:
            self.asked[path] += 1
            if path != self.swallow or not self.only():
                return False
            self.swallow, self.then = "", self.asked.copy()
        wait(self.until)
        return True


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        wire = self.server
        assert isinstance(wire, Wire)
        body = self.rfile.read(int(self.headers["content-length"]))
        with closing(http.client.HTTPConnection("127.0.0.1", wire.target, timeout=30)) as link:
            link.request("POST", self.path, body, dict(self.headers))
            answer = link.getresponse()
            content = answer.read()
        if wire.loses(self.path):
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("content-type", answer.getheader("content-type", ""))
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *_: Any) -> None:  # noqa: A002 - its name
        pass


class Scene:
    """A SuperLink, a node that answers, and the coordinator's transport."""

    def __init__(self, link: Link, wire: Wire, transport: FlowerTransport) -> None:
        self.link, self.wire, self.transport = link, wire, transport

    def exchange(
        self, lost: str = "", only: Callable[[], bool] = at_any_time, until: Callable[[], bool] = at_any_time
    ) -> Reply:
        """One round, in which the answer to a request at ``lost`` is lost; see :class:`Wire`."""
        self.wire.only, self.wire.until = only, until
        self.wire.swallow = f"/v1/{lost}" if lost else ""
        started = time.monotonic()
        (reply,) = self.transport.exchange({SITE: REQUEST}, 30.0)
        assert time.monotonic() - started < FEW_SECONDS
        assert not self.wire.swallow, "it was not asked"
        return reply

    def left(self, table: str) -> int:
        """Rows of a table of the SuperLink's."""
        assert isinstance(self.link.state, SqlLinkState)
        with self.link.state.session() as session:
            return int(session.scalar(text(f"SELECT COUNT(*) FROM {table}")) or 0)  # noqa: S608 - a word of this file


@contextmanager
def scene(folder: Path, *, ours: bool) -> Iterator[Scene]:
    """Everything, with our launcher's changes or with Flower's own SuperLink."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if ours:
            keep_flower(patch)
            make_deliveries_again()
            answer_again()
            hold_looks(News())
            patch.setattr(held_looks, "GRID_SECONDS", 0.3)
            patch.setattr(held_looks, "NODE_SECONDS", 1.0)
        invoker = vars(fleet_http_connection)["make_simple_http_retry_invoker"]
        patch.setitem(vars(fleet_http_connection), "make_simple_http_retry_invoker", lambda: at_once(invoker()))
        for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
            for name, value in (("initial_backoff", 0.02), ("backoff_cap", 0.2), ("max_tries_per_object", 12)):
                patch.setitem(function.__kwdefaults__ or {}, name, value)
        link = Link(folder / "superlink.db")
        stack.callback(link.close)
        patch.setattr(application, "get_objectstore_linkstate_factories", lambda *_: (None, link.factory))
        port = serve(application.create_app(), stack)
        wire = Wire(port)
        threading.Thread(target=wire.serve_forever, args=(0.05,), daemon=True).start()
        stack.callback(wire.server_close)
        stack.callback(wire.shutdown)
        address = f"127.0.0.1:{wire.server_port}"
        node = stack.enter_context(answering_node(address, link.run))
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        proofs = (version, RuntimeTokenHttpInterceptor(link.token or ""))
        client = RuntimeHttpClient.from_server_address(f"127.0.0.1:{port}", True, None, interceptors=proofs)
        stack.enter_context(closing(client))
        stack.enter_context(heartbeat(client))
        grid = HttpGrid(address, True, token=link.token or "")
        grid._retry_invoker = at_once(grid._retry_invoker)
        grid.set_run(node[1])
        stack.callback(grid.close)
        found = Scene(link, wire, FlowerTransport(grid, nodes=lambda _: {SITE: node[0]}))
        assert isinstance(found.exchange(), TrainReply)
        yield found


def keep_flower(patch: pytest.MonkeyPatch) -> None:
    """Flower is as it was, afterwards."""
    names = ("pull_messages", "push_messages", "push_object", "confirm_message_received")
    for module in (fleet_handlers, runtime_handlers):
        for name in names:
            patch.setattr(module, name, vars(module)[name])
    for name in ("activate_node", "deactivate_node"):
        patch.setattr(fleet_handlers, name, vars(fleet_handlers)[name])
    patch.setattr(sql_linkstate, AVAILABLE, vars(sql_linkstate)[AVAILABLE])
    patch.setattr(application, "_get_middleware", vars(application)["_get_middleware"])
    patch.setattr(uvicorn.Server, "handle_exit", uvicorn.Server.handle_exit)


def at_once(invoker: Any) -> Any:
    """Flower's way to ask again, without the random pause."""
    invoker.jitter = lambda _: 0.02
    return invoker


def serve(app: Any, stack: ExitStack) -> int:
    """Serve the SuperLink's application from a thread; its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    stack.callback(thread.join, 20)
    stack.callback(setattr, server, "should_exit", True)
    wait(lambda: server.started)
    return int(server.servers[0].sockets[0].getsockname()[1])


@contextmanager
def answering_node(address: str, run: int) -> Iterator[tuple[int, Any]]:
    """Flower's SuperNode loop, whose app answers each message; its number, and the run."""
    ended, known = threading.Event(), list[tuple[int, Any]]()

    def live() -> None:
        loop, store = vars(start_client_internal), InMemoryObjectStore()
        state = InMemoryNodeState(store)
        with fleet_http_connection.http_request_response(address, insecure=True) as connection:
            number, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
            state.set_node_id(number)
            state.store_run(get_run(run))
            known.append((number, state.get_run(run)))
            while not ended.is_set():
                taken = loop["_pull_and_store_message"](
                    state=state, object_store=store, node_config={}, receive=receive, get_run=get_run, get_fab=get_fab,
                    pull_object=pull_object, confirm_message_received=confirm, trusted_entities=None,
                )  # fmt: skip
                if taken is None:
                    time.sleep(0.02)
                    continue
                (asked,) = state.get_messages_legacy(is_reply=False)
                state.record_message_processing_start(asked.metadata.message_id)
                state.record_message_processing_end(asked.metadata.message_id)
                reply = TrainReply(site=SITE, round=1, arrays=ARRAYS, steps=1, seconds=0.1)
                loop["_insert_message"](Message(encode_reply(reply), reply_to=asked), state, store)
                loop["_push_messages"](state=state, object_store=store, send=send, push_object=push_object)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    wait(lambda: known)
    yield known[0]
    ended.set()
    thread.join(20)


def wait(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_mended_is_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once Flower's own SuperLink bears one of these, that part of lost_answers can go. First, before ours is there."""
    lost = Refusal(site=SITE, kind="train", round=1, reason=Reason.LOST)
    with scene(tmp_path, ours=False) as stock:
        assert stock.exchange("fleet/push-messages", until=lambda: stock.left("message_res") == 0) == lost
        assert stock.exchange("fleet/push-object") == lost
        assert stock.exchange("runtime/pull-messages", only=lambda: stock.left("message_ins") == 0) == lost
        monkeypatch.setattr(flower_transport, "PUSHES", 1)
        assert stock.exchange("runtime/push-object") == lost


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("ours"), ours=True) as found:
        yield found


@pytest.mark.parametrize("side", ["runtime", "fleet"])
@pytest.mark.parametrize(
    "asked", ["push-messages", "push-object", "pull-messages", "pull-object", "confirm-message-received"]
)
def test_an_answer_that_is_lost_costs_seconds(mended: Scene, side: str, asked: str) -> None:
    """Also where the coordinator looks for the reply while the node is about to ask again."""
    wire, only, until = mended.wire, at_any_time, at_any_time
    if (side, asked) == ("fleet", "push-messages"):
        until = lambda: wire.asked[LOOK] >= wire.then[LOOK] + 2  # noqa: E731
    elif (side, asked) == ("runtime", "pull-messages"):
        only = lambda: mended.left("message_res WHERE delivered_at != ''") == 1  # noqa: E731
    reply = mended.exchange(f"{side}/{asked}", only, until)
    assert isinstance(reply, TrainReply)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(reply.arrays[name], array)
    assert [mended.left(table) for table in ("message_ins", "message_res", "object_push_session_pending")] == [0, 0, 0]


@pytest.mark.parametrize("pushes", [2, 1])
def test_a_part_may_be_sent_again_after_the_node_has_taken_it(
    mended: Scene, monkeypatch: pytest.MonkeyPatch, pushes: int
) -> None:
    """The SuperLink has it no more and refuses it: the whole message is sent again."""
    monkeypatch.setattr(flower_transport, "PUSHES", pushes)
    taken = mended.wire.asked[TAKEN]
    reply = mended.exchange(
        "runtime/push-object",
        only=lambda: mended.left("object_push_session_pending") == 0,  # the last one
        until=lambda: mended.wire.asked[TAKEN] > taken,
    )
    lost = Refusal(site=SITE, kind="train", round=1, reason=Reason.LOST)
    assert isinstance(reply, TrainReply) if pushes > 1 else reply == lost


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_whole_reply_counts_though_its_node_has_left_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool, whole: bool
) -> None:
    """Flower throws it away, and with it a round that patients paid for; half a reply is none for us either."""
    if ours:
        monkeypatch.setattr(sql_linkstate, AVAILABLE, present_or_answered(vars(sql_linkstate)[AVAILABLE]))
    with closing(Link(tmp_path / "superlink.db")) as link:
        assert isinstance(link.state, SqlLinkState)
        client, node = link.client()(), Node(node_id=link.node)
        client.ActivateNode(ActivateNodeRequest(public_key=b"key", heartbeat_interval=30))
        asked = link.ask()
        given = client.PullMessages(PullMessagesRequest(node=node)).messages_list[0]
        reply = Message(RecordDict({"c": ConfigRecord({"x": 1})}), reply_to=message_from_proto(given))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        head = message_to_proto(remove_content_from_message(reply))
        tree = get_object_tree(reply)
        taken = client.PushMessages(
            PushMessagesRequest(
                node=node, clientapp_runtime_list=[0.0], messages_list=[head], message_object_trees=[tree]
            )
        )
        for name in taken.objects_to_push[0 if whole else 1 :]:
            part = {"object_id": name, "object_content": parts[name], "session_id": taken.session_id}
            client.PushObject(PushObjectRequest(node=node, run_id=link.run, **part))
        client.DeactivateNode(DeactivateNodeRequest(node_id=link.node))
        state: Any = KeepsGiven(link.state, LostAnswers(link.state)) if ours else link.state
        (found,) = state.get_message_res({asked}, link.run)
        assert found.has_error() is not (ours and whole)
