# SPDX-License-Identifier: Apache-2.0
"""What our launcher of Flower's SuperLink changes: held looks, second deliveries, layers that are left out.

Flower's state, handlers and application are the real ones. Over real processes all of it is at work in every test of a
rehearsal or a deployment.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.dependencies import utils
from fastapi.testclient import TestClient
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink import main as application
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.middleware.base import BaseHTTPMiddleware

from fedneuro.server import held_looks
from fedneuro.server.held_looks import GRID_PULL, NODE_PULL, HeldLooks, News
from fedneuro.server.second_delivery import MOST_TIMES
from fedneuro.server.superlink import do_less_around_requests, hold_looks, idle_layers, make_deliveries_again
from tests.flower_link import Link

NODE = PullMessagesRequest(node=Node(node_id=7)).SerializeToString()


# -- held looks ----------------------------------------------------------------------------------------------


class Asker:
    """One who sends requests to the layer; the layer below answers with ``answer`` and notes when."""

    def __init__(self, news: News, answer: bytes = b"", status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.reached: list[float] = []
        self.layer = HeldLooks(self._below, news)

    async def _below(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        self.body = body
        self.reached.append(time.monotonic())
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.answer})

    async def ask(self, path: str, body: bytes, hang_up: float = 60.0) -> float:
        """Send it in two parts; seconds until it was let through, or dropped."""
        parts = [
            {"type": "http.request", "body": body[:2], "more_body": True},
            {"type": "http.request", "body": body[2:], "more_body": False},
        ]

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop(0)
            await asyncio.sleep(hang_up)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        started = time.monotonic()
        await self.layer({"type": "http", "path": path, "headers": []}, receive, send)
        return time.monotonic() - started


def later(seconds: float, call: Callable[[], None]) -> None:
    """From another thread, as Flower's handlers do."""
    loop = asyncio.get_running_loop()
    loop.call_later(seconds, lambda: loop.run_in_executor(None, call))


def run(scene: Callable[[News], Awaitable[None]]) -> None:
    news = News()

    async def play() -> None:
        await scene(news)
        assert news.held() == 0

    asyncio.run(play())


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_looks, "NODE_SECONDS", 0.4)
    monkeypatch.setattr(held_looks, "GRID_SECONDS", 0.4)


def test_a_second_look_waits_for_news_and_no_longer() -> None:
    async def scene(news: News) -> None:
        asker = Asker(news)
        assert await asker.ask(NODE_PULL, NODE) < 0.2, "it may find something"
        later(0.1, lambda: news.tell(GRID_PULL))  # not for nodes
        later(0.2, lambda: news.tell(NODE_PULL))
        assert 0.15 < await asker.ask(NODE_PULL, NODE) < 0.38
        assert asker.body == NODE, "the request goes on whole"
        assert 0.35 < await asker.ask(NODE_PULL, NODE) < 1.0, "nothing came"
        assert len(asker.reached) == 3, "each look reaches Flower in the end"

    run(scene)


def test_news_between_two_looks_are_not_missed() -> None:
    async def scene(news: News) -> None:
        asker = Asker(news)
        await asker.ask(NODE_PULL, NODE)
        news.tell(NODE_PULL)
        assert await asker.ask(NODE_PULL, NODE) < 0.2

    run(scene)


@pytest.mark.parametrize(("answer", "status"), [(b"a message", 200), (b"", 401)])
def test_who_was_given_a_message_or_an_error_is_not_held(answer: bytes, status: int) -> None:
    """More messages may wait; and who is not let in must not make the one wait who is."""

    async def scene(news: News) -> None:
        asker = Asker(news, answer, status)
        for _ in range(3):
            assert await asker.ask(NODE_PULL, NODE) < 0.2

    run(scene)


def test_an_answer_to_one_message_lets_looks_for_others_wait() -> None:
    async def scene(news: News) -> None:
        asker = Asker(news, b"an answer")
        one = PullAppMessagesRequest(message_ids=["a"]).SerializeToString()
        both = PullAppMessagesRequest(message_ids=["a", "b"]).SerializeToString()
        other = PullAppMessagesRequest(message_ids=["b"]).SerializeToString()
        news.not_there(GRID_PULL, ["a", "b"])  # as when they are sent
        later(0.1, lambda: news.tell(GRID_PULL))
        assert 0.05 < await asker.ask(GRID_PULL, both) < 0.35
        assert await asker.ask(GRID_PULL, other) > 0.35, "it was asked for just now, and nothing came"
        news.tell(GRID_PULL)
        assert await asker.ask(GRID_PULL, one) < 0.2
        assert await asker.ask(GRID_PULL, other) < 0.2

    run(scene)


def test_who_hangs_up_is_given_nothing() -> None:
    async def scene(news: News) -> None:
        asker = Asker(news)
        await asker.ask(NODE_PULL, NODE)
        later(0.25, lambda: news.tell(NODE_PULL))
        assert await asker.ask(NODE_PULL, NODE, hang_up=0.1) < 0.2
        await asyncio.sleep(0.3)
        assert len(asker.reached) == 1

    run(scene)


def test_what_cannot_be_held_goes_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(news: News) -> None:
        asker = Asker(news)
        for path, body in (
            ("/v1/fleet/push-messages", NODE),
            (NODE_PULL, b"\xff" * 64),
            (NODE_PULL, NODE + b"\0" * held_looks.LARGEST_LOOK),
        ):
            for _ in range(2):
                assert await asker.ask(path, body) < 0.2
                assert asker.body == body
        await asker.ask(NODE_PULL, NODE)
        with monkeypatch.context() as patch:
            patch.setattr(held_looks, "MOST_HELD", 0)
            assert await asker.ask(NODE_PULL, NODE) < 0.2
        later(0.1, news.close)
        assert await asker.ask(NODE_PULL, NODE) < 0.35, "the SuperLink ends"
        assert await asker.ask(NODE_PULL, NODE) < 0.2

    run(scene)


def test_there_is_news_when_a_message_is_whole() -> None:
    news = News()
    news.announced(NODE_PULL, "s", {"a", "b"})
    news.arrived(NODE_PULL, "s", "a")
    news.arrived(NODE_PULL, "another", "b")
    assert news.count(NODE_PULL) == 0
    news.arrived(NODE_PULL, "s", "b")
    assert (news.count(NODE_PULL), news.count(GRID_PULL)) == (1, 0)
    news.announced(GRID_PULL, "t", set())
    assert news.count(GRID_PULL) == 1


# -- with Flower's state and handlers ------------------------------------------------------------------------


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower is as it was, afterwards."""
    for module in (fleet_handlers, runtime_handlers):
        for name in ("pull_messages", "push_messages", "push_object"):
            monkeypatch.setattr(module, name, vars(module)[name])
    for name in ("activate_node", "deactivate_node"):
        monkeypatch.setattr(fleet_handlers, name, vars(fleet_handlers)[name])
    monkeypatch.setattr(application, "_get_middleware", vars(application)["_get_middleware"])
    monkeypatch.setattr(uvicorn.Server, "handle_exit", uvicorn.Server.handle_exit)
    monkeypatch.setattr(utils, "run_in_threadpool", vars(utils)["run_in_threadpool"])
    monkeypatch.setattr(BaseHTTPMiddleware, "__call__", BaseHTTPMiddleware.__call__)


@pytest.fixture
def link(tmp_path: Path, _restored: None) -> Iterator[Link]:
    """One with SQLite, whose handlers are changed as by the launcher."""
    make_deliveries_again()
    link = Link(tmp_path / "superlink.db")
    link.client()().ActivateNode(ActivateNodeRequest(public_key=b"key", heartbeat_interval=30))
    yield link
    link.close()


def pull(link: Link) -> Any:
    request = PullMessagesRequest(node=Node(node_id=link.node))
    response: PullMessagesResponse = link.client()().PullMessages(request)
    return response.messages_list[0] if response.messages_list else None


def confirm(link: Link, message: str) -> None:
    link.client()().ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=Node(node_id=link.node), run_id=link.run, message_object_id=message)
    )


def reply(link: Link, given: Any, parts: int) -> dict[str, bytes]:
    """Answer ``given``, and send so many of the answer's parts; those that were not sent."""
    answer = Message(RecordDict({"c": ConfigRecord({"x": 1})}), reply_to=message_from_proto(given))
    answer.metadata.__dict__["_message_id"] = answer.object_id
    whole = {key: part.deflate() for key, part in get_all_nested_objects(answer).items()}
    node = Node(node_id=link.node)
    request = PushMessagesRequest(
        node=node,
        clientapp_runtime_list=[0.0],
        message_object_trees=[get_object_tree(answer)],
        messages_list=[message_to_proto(remove_content_from_message(answer))],
    )
    response = link.client()().PushMessages(request)
    for key in list(whole)[:parts]:
        part = PushObjectRequest(
            node=node, run_id=link.run, session_id=response.session_id, object_id=key, object_content=whole.pop(key)
        )
        assert link.client()().PushObject(part).stored
    return whole


def test_what_did_not_reach_the_node_is_given_out_again(link: Link) -> None:
    asked = link.ask()
    assert pull(link).metadata.message_id == asked
    assert pull(link).metadata.message_id == asked, "it asks, so it has none in hand"
    confirm(link, asked)
    assert pull(link) is None, "it has it"
    second = link.ask()
    given = pull(link)
    assert given.metadata.message_id == second
    reply(link, given, 0)
    assert pull(link) is None, "it answers it"


def test_what_a_node_cannot_take_in_is_not_given_out_for_ever(link: Link) -> None:
    link.ask()
    assert [pull(link) is not None for _ in range(MOST_TIMES + 2)] == [True] * MOST_TIMES + [False] * 2


def test_half_an_answer_goes_with_its_node(link: Link) -> None:
    asked = link.ask()
    given = pull(link)
    confirm(link, asked)
    assert reply(link, given, 1)
    assert link.state.num_message_res() == 1
    link.client()().DeactivateNode(DeactivateNodeRequest(node_id=link.node))
    assert link.state.num_message_res() == 0
    assert link.state.object_store.get(given.metadata.message_id) is None
    link.client()().ActivateNode(ActivateNodeRequest(public_key=b"key", heartbeat_interval=30))
    assert not reply(link, given, 99), "it may be answered anew"
    answer = link.answer(asked)
    assert answer is not None and not answer.has_error()


def test_a_whole_answer_stays(link: Link) -> None:
    asked = link.ask()
    given = pull(link)
    confirm(link, asked)
    reply(link, given, 99)
    link.client()().DeactivateNode(DeactivateNodeRequest(node_id=link.node))
    assert link.state.num_message_res() == 1


def test_flower_still_gives_a_message_out_once(tmp_path: Path) -> None:
    """Once it does not, second_delivery can go."""
    link = Link(tmp_path / "stock.db")
    link.client()().ActivateNode(ActivateNodeRequest(public_key=b"key", heartbeat_interval=30))
    link.ask()
    assert pull(link) is not None and pull(link) is None
    link.close()


def test_the_handlers_tell_what_comes(link: Link) -> None:
    news = News()
    hold_looks(news)
    message = Message(RecordDict({"c": ConfigRecord({"x": 2})}), link.node, "train", ttl=3600.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    request = PushAppMessagesRequest(
        messages_list=[message_to_proto(remove_content_from_message(message))],
        message_object_trees=[get_object_tree(message)],
    )
    task = link.state.get_tasks(run_ids=[link.run])[0]
    response = vars(runtime_handlers)["push_messages"](request, link.state, task)
    assert news.unanswered(GRID_PULL, response.message_ids) == 0, "it cannot be answered yet"
    for key, part in get_all_nested_objects(message).items():
        assert news.count(NODE_PULL) == 0
        sent = PushObjectRequest(
            node=Node(node_id=1), run_id=link.run, session_id=response.session_id, object_id=key,
            object_content=part.deflate(),
        )  # fmt: skip
        assert vars(runtime_handlers)["push_object"](sent, link.state, task).stored
    assert (news.count(NODE_PULL), news.count(GRID_PULL)) == (1, 0)
    given = pull(link)
    confirm(link, given.metadata.message_id)
    reply(link, given, 1)
    assert news.count(GRID_PULL) == 0
    link.client()().DeactivateNode(DeactivateNodeRequest(node_id=link.node))
    assert news.count(GRID_PULL) == 1, "its messages are answered by the SuperLink now"


# -- layers --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_restored")
def test_layers_are_left_out_for_whom_they_do_nothing() -> None:
    """The list is Flower 1.41's: one that is new is seen here, and kept until somebody has looked at it."""
    before = [layer.cls.__name__ for layer in vars(application)["_get_middleware"]()]
    assert before == [
        "ControlSensitiveResponseMiddleware", "BaseHTTPMiddleware", "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware", "ProtobufTranslationMiddleware", "RuntimeTracingMiddleware",
        "ControlEventLogMiddleware", "NodeAuthMiddleware", "FleetEventLogMiddleware",
    ]  # fmt: skip
    fleet, runtime = "/v1/fleet/", "/v1/runtime/"
    kept = {"BaseHTTPMiddleware", "ProtobufTranslationMiddleware"}  # errors and messages, for all
    assert {layer.__name__: paths for layer, paths in idle_layers().items()} == {
        **dict.fromkeys(set(before) - kept, (fleet, runtime)),
        "NodeAuthMiddleware": (runtime,),
    }


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("light", [False, True])
def test_the_application_answers_as_flowers_own(light: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same requests, refused and let in, with and without."""
    if light:
        do_less_around_requests()
        hold_looks(News())
    link = Link(tmp_path / "superlink.db")
    factory = link.factory
    monkeypatch.setattr(application, "get_objectstore_linkstate_factories", lambda *_: (None, factory))
    app = application.create_app()
    app.state.enable_supernode_auth = True
    keys, others = generate_key_pairs(), generate_key_pairs()
    key = public_key_to_bytes(keys[1])
    link.node = link.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)

    with TestClient(app) as http:

        def connect(kind: Any, *proofs: Any) -> Any:
            client = kind("http://testserver", interceptors=proofs)
            client._client = http
            return client

        def refused(call: Callable[[Any], Any], request: Any) -> int:
            with pytest.raises(httpx.HTTPStatusError) as error:
                call(request)
            return error.value.response.status_code

        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        node = connect(FleetHttpClient, version, NodeAuthHttpInterceptor(*keys))
        stranger = connect(FleetHttpClient, version, NodeAuthHttpInterceptor(*others))
        assert node.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30)).node_id == link.node
        look = PullMessagesRequest(node=Node(node_id=link.node))
        assert not node.PullMessages(look).messages_list
        asked = link.ask()
        assert refused(stranger.PullMessages, look) == 401
        assert refused(connect(FleetHttpClient, version).PullMessages, look) == 401
        assert refused(node.PullMessages, PullMessagesRequest(node=Node(node_id=5))) == 401
        assert node.PullMessages(look).messages_list[0].metadata.message_id == asked
        assert refused(node.GetRun, GetRunRequest(node=Node(node_id=link.node), run_id=1)) >= 400
        runner = connect(RuntimeHttpClient, version, RuntimeTokenHttpInterceptor(link.token or ""))
        assert runner.GetNodes(GetNodesRequest()).nodes[0].node_id == link.node
        wrong = connect(RuntimeHttpClient, version, RuntimeTokenHttpInterceptor("x"))
        assert refused(wrong.GetNodes, GetNodesRequest()) == 401
        assert refused(connect(RuntimeHttpClient, version).GetNodes, GetNodesRequest()) == 401
        codes = [
            http.post("/v1/fleet/pull-messages", content=b"", headers={"content-type": "text/plain"}).status_code,
            http.post("/v1/fleet/nothing").status_code, http.get("/v1/runtime/get-nodes").status_code,
            http.get("/health").status_code,
        ]  # fmt: skip
        assert codes == [415, 404, 405, 200]
    link.close()
