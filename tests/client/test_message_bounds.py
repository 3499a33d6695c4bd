# SPDX-License-Identifier: Apache-2.0
"""What a coordinator sends to fill the node's memory, before the contract can judge it: real HTTP, real Runtime API."""

import gzip
import http.server
import json
import secrets
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate import nodestate_factory

from fedneuro.client import message_bounds
from fedneuro.client.lost_tasks import RunnerWatch, answer_lost_tasks
from fedneuro.client.message_bounds import bound_answers, bound_messages, bound_unfolding, largest_message
from fedneuro.client.node_settings import NodeSettings, load_node_settings
from fedneuro.client.policy_edit import write_policy
from fedneuro.client.runner import Runner
from fedneuro.client.site import Site
from fedneuro.privacy.contract import Request, Role
from fedneuro.privacy.errors import Reason
from fedneuro.privacy.processes import claim_port
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import encode_request
from fedneuro.server.bundle import bundle_hash
from tests.client.flower_node import BUNDLE, SuperNode, tampered

STUDY = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}})
HELLO = encode_request(Request(kind="hello", study=STUDY))
MB = 10**6


# -- answers of the SuperLink ------------------------------------------------------------------------------------


@contextmanager
def superlink(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[tuple[int, list[str]]]:
    """An HTTP server that answers so; its port, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield int(server.server_address[1]), asked
        server.shutdown()


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def pull(port: int, *, bounded: bool = True) -> Any:
    """Ask for messages as the SuperNode does."""
    stock = vars(fleet_http_connection)["FleetHttpClient"]
    try:
        if bounded:
            bound_answers()
        made: Any = vars(fleet_http_connection)["FleetHttpClient"]
        with made.from_server_address(f"127.0.0.1:{port}", True, None, interceptors=[]) as client:
            return client.PullMessages(PullMessagesRequest())
    finally:
        fleet_http_connection.__dict__["FleetHttpClient"] = stock


def test_a_compressed_answer_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(100 * MB), 1)
    with superlink(lambda handler: send(handler, bomb, content_encoding="gzip")) as (port, _):
        tracemalloc.start()
        with pytest.raises(httpx.DecodingError, match="is compressed"):
            pull(port)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5 * MB


def test_a_long_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_bounds, "LARGEST_ANSWER", 2**20)
    long = superlink(lambda handler: send(handler, bytes(2**20 + 1)))
    with long as (port, _), pytest.raises(httpx.DecodingError, match="more than 1 MiB"):
        pull(port)
    with superlink(lambda handler: send(handler, b"")) as (port, _):
        assert not pull(port).messages_list


def test_a_redirect_leads_nowhere() -> None:
    """To another machine of the hospital's network, with the node's signature in its headers."""
    with superlink(lambda handler: send(handler, b"")) as (inside, reached):
        target = f"http://127.0.0.1:{inside}/admin"
        with superlink(lambda handler: send(handler, b"", 307, location=target)) as (port, _):
            pull(port, bounded=False)
            assert reached == ["/admin"], "Flower follows; once it does not, this can go"
            with pytest.raises(httpx.HTTPStatusError, match="307"):
                pull(port)
    assert reached == ["/admin"]


# -- messages ----------------------------------------------------------------------------------------------------


class Ward(Site):
    """A site that notes what is turned away."""

    def __init__(self, settings: NodeSettings) -> None:
        super().__init__(settings.site_settings())
        self.turned: list[Reason] = []

    def turn_away(self, kind: str, error: Exception) -> None:
        assert kind == ""
        self.turned.append(error.reason)  # type: ignore[attr-defined]


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    for name in ("ca.crt", "node.key", "runner.secret"):
        (tmp_path / name).write_bytes(secrets.token_bytes(32))
        (tmp_path / name).chmod(0o600)
    (tmp_path / "bids").mkdir()
    values: dict[str, dict[str, object]] = {
        "site": {"name": "A", "role": "train", "public_size": 5, "data": "bids", "state": "state"},
        "study": {"approved": [STUDY.hash]},
        "superlink": {"address": "127.0.0.1:1", "root_certificate": "ca.crt", "key": "node.key"},
        "runner": {"port": claim_port(), "secret": "runner.secret", "bundle": bundle_hash(BUNDLE)},
    }
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in part.items()) for name, part in values.items()
    ]
    (tmp_path / "node.toml").write_text("".join(lines))
    return load_node_settings(tmp_path / "node.toml")


@pytest.fixture
def node(settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperNode]:
    for owner, name in (
        (nodestate_factory, "InMemoryNodeState"),
        (start_client_internal, "_pull_and_store_message"),
        (inflatable_utils, "pull_objects"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])  # to be put back
    answer_lost_tasks()
    node = SuperNode(settings.runner.port, Path(settings.runner.secret).read_bytes())
    yield node
    node.stop()


def test_a_message_beyond_the_policy_is_not_fetched_to_its_end(node: SuperNode, settings: NodeSettings) -> None:
    """Two gigabytes in parts that are fetched one by one: the part that passes the limit is the last."""
    fetched: list[int] = []
    part = Array("uint8", (2**20,), "fedneuro.state", secrets.token_bytes(2**20))

    def fetch(_: str) -> bytes:
        fetched.append(2**20)
        return bytes(2**20)

    runner = Runner(settings, ward := Ward(settings))
    watch = RunnerWatch(Path(settings.runner.secret))
    bound_messages(lambda: 3 * 2**20, watch.refused)
    records = {f"r{i}": ArrayRecord({str(i): Array("uint8", (1,), "x", bytes([i]))}) for i in range(8)}
    assert node.receive(RecordDict({"big": ArrayRecord({"state": part}), **records}), "train", pull=fetch) == 5
    reply = node.reply()
    assert reply is not None and reply.error.reason == "contract-violation"
    assert len(fetched) <= 4 + 16, "those that other threads had under way"
    assert node.state.get_tasks(statuses=["pending"]) == []
    deadline = time.monotonic() + 30

    def hold() -> str:
        runner.draining = bool(ward.turned) or time.monotonic() > deadline
        return ""

    runner._hold = hold
    runner.run()
    runner.close()
    assert ward.turned == [Reason.CONTRACT_VIOLATION], "in the audit log"


def test_a_message_of_too_many_parts(node: SuperNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_bounds, "MOST_PARTS", 20)
    bound_messages(lambda: MB)
    records: dict[str, Any] = {f"r{i}": ArrayRecord({"a": Array("uint8", (1,), "x", bytes([i]))}) for i in range(8)}

    def fetch(_: str) -> bytes:
        raise AssertionError("nothing is fetched")

    assert node.receive(RecordDict(records), "train", pull=fetch) == 5
    reply = node.reply()
    assert reply is not None and reply.error.reason == "contract-violation"


def test_a_message_whose_parts_do_not_come_is_answered(node: SuperNode) -> None:
    bound_messages(lambda: MB)

    def fetch(key: str) -> bytes:
        raise inflatable_utils.ObjectPullError(key, "gone")

    assert node.receive(HELLO, "query.hello", pull=fetch) == 5
    reply = node.reply()
    assert reply is not None and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE and reply.error.reason == "lost"
    assert node.receive(HELLO, "query.hello") == 5 and len(node.state.get_tasks(statuses=["pending"])) == 1


def test_what_is_no_message_at_all_ends_nothing(node: SuperNode) -> None:
    bound_messages(lambda: MB)
    pulled: Any = vars(start_client_internal)["_pull_and_store_message"]

    def receive() -> Any:
        raise IndexError("no tree")

    named = dict.fromkeys(("node_config", "get_run", "get_fab", "trusted_entities"))
    found = pulled(
        state=node.state, object_store=node.store, receive=receive, pull_object=None,
        confirm_message_received=None, **named,
    )  # fmt: skip
    assert found is None


def served(node: SuperNode, settings: NodeSettings) -> tuple[Message, Ward]:
    """What a real runner makes of the message that is there."""
    runner = Runner(settings, ward := Ward(settings))
    found: list[Message] = []
    deadline = time.monotonic() + 30

    def hold() -> str:
        if reply := node.reply():
            found.append(reply)
        runner.draining = bool(found) or time.monotonic() > deadline
        return "answered" if found else ""

    runner._hold = hold
    runner.run()
    runner.close()
    assert found, "the message stays without an answer"
    return found[0], ward


def test_an_array_that_names_one_part_again_and_again(node: SuperNode, settings: NodeSettings) -> None:
    """A kilobyte of indices, a gigabyte of array: in Flower's own form of arrays."""
    content = RecordDict({"arrays": ArrayRecord({"state": Array("uint8", (MB,), "x", secrets.token_bytes(MB))})})

    def repeat(body: bytes) -> bytes:
        return json.dumps(json.loads(body) | {"arraychunk_ids": [0] * 200}).encode()

    made = tampered(Message(content, 7, "train"), "Array", repeat)
    bound_unfolding(lambda: 10 * MB)
    node.receive(content, "train", made=made)
    tracemalloc.start()
    reply, ward = served(node, settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reply.has_error() and ward.turned == [Reason.CONTRACT_VIOLATION]
    assert peak < 20 * MB
    node.receive(content, "train")
    assert served(node, settings)[0].has_error()  # not the contract, but put together


@pytest.mark.parametrize(
    ("part", "body"),
    [
        ("ConfigRecord", b"\xff" * 40),
        ("RecordDict", b"{}"),
        ("RecordDict", b"[" * 100_000),
        ("Message", b"\x00\x01"),
    ],
    ids=["no record", "empty", "nested", "no message"],
)
def test_a_message_that_cannot_be_put_together(node: SuperNode, settings: NodeSettings, part: str, body: bytes) -> None:
    """The runner lives, the coordinator is answered, the audit log knows; Flower would wait for ever."""
    node.receive(HELLO, "query.hello", made=tampered(Message(HELLO, 7, "query.hello"), part, lambda _: body))
    reply, ward = served(node, settings)
    assert reply.has_error() and ward.turned == [Reason.CONTRACT_VIOLATION]


def test_how_large_a_message_may_be(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    largest = largest_message(policy)
    assert largest() == message_bounds.BESIDE_THE_MODEL, "there is no policy yet"
    write_policy(policy, role=Role.TRAIN, dataset="A")
    assert largest() == message_bounds.BESIDE_THE_MODEL + 4 * 200_000_000
    assert largest_message(None)() == message_bounds.WITHOUT_POLICY


def test_flower_puts_arrays_together_as_unfolded_bytes_counts() -> None:
    zeros = Array("uint8", (12 * MB,), "x", bytes(12 * MB))  # one part of 5 MiB, twice, and the rest
    parts = {key: value.deflate() for key, value in get_all_nested_objects(zeros).items()}
    assert sum(map(len, parts.values())) < 8 * MB
    counted = message_bounds.unfolded_bytes(parts)
    assert len(zeros.data) <= counted < len(zeros.data) + 1000
