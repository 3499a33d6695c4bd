# SPDX-License-Identifier: Apache-2.0
"""Exactly one reply per site over Flower's Grid, whatever the nodes answer or do not answer."""

import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedneuro.models.state import digest
from fedneuro.privacy.contract import EvaluateReply, HelloReply, Refusal, Reply, Request, Role, TrainReply
from fedneuro.privacy.errors import EnvironmentProblem, Reason
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import decode_request, encode_reply
from fedneuro.privacy.wire_bytes import MAX_SQUEEZED, unsqueeze
from fedneuro.server.flower_transport import SMALL_AT_ONCE, FlowerTransport, registered_nodes

STUDY = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}})
ARRAYS = {"w": np.arange(4, dtype=np.float32)}
Answer = Callable[[Message, Request], Message | None]


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, None)


class Nodes:
    """A Grid whose nodes answer from this process; they see serialised contents only."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = dict(enumerate(answers.values(), start=10))
        self.nodes = [
            SimpleNamespace(node_id=number, name=name, status="online") for number, name in enumerate(answers, start=10)
        ]
        self.replies: dict[str, Message | None] = {}
        self.asked: list[list[str]] = []

    def get_nodes(self) -> Iterable[Any]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = f"m{len(self.replies)}"
            message.metadata.__dict__["_message_id"] = name
            self.replies[name] = self.answers[message.metadata.dst_node_id](
                message, decode_request(unsqueeze(message.content))
            )
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked.append(list(message_ids))
        return [reply for name in self.asked[-1] if (reply := self.replies[name]) is not None]


def says(make: Callable[[Request], Reply]) -> Answer:
    return lambda message, request: Message(encode_reply(make(request)), reply_to=message)


def fails(code: int, reason: str) -> Answer:
    return lambda message, _: Message(Error(code, reason), reply_to=message)


def trained(site: str, number: int = 1) -> Answer:
    return says(lambda r: TrainReply(site=site, round=number, arrays=dict(r.arrays or {}), steps=1, seconds=0.1))


def exchange(answers: dict[str, Answer], timeout: float = 0.3, kind: Any = "train") -> dict[str, Reply]:
    grid = Nodes(answers)
    request = Request(kind=kind, study=STUDY, round=int(kind != "hello"), arrays=None if kind == "hello" else ARRAYS)
    replies = list(FlowerTransport(grid).exchange(dict.fromkeys([*answers], request), timeout))  # type: ignore[arg-type]
    assert all(len(ids) <= SMALL_AT_ONCE for ids in grid.asked)
    assert sorted(r.site for r in replies) == sorted(answers)
    return {reply.site: reply for reply in replies}


def test_an_exchange_is_cut_short() -> None:
    """A answered, B never will: where enough have answered, B is not waited for to the end of the hour."""
    grid, started = Nodes({"A": trained("A"), "B": lambda *_: None}), time.monotonic()
    request = Request(kind="train", study=STUDY, round=1, arrays=ARRAYS)
    transport = FlowerTransport(grid, cut=lambda: started + 0.2)  # type: ignore[arg-type]
    replies = {reply.site: reply for reply in transport.exchange(dict.fromkeys("AB", request), 3600.0)}
    assert isinstance(replies["A"], TrainReply)
    assert isinstance(replies["B"], Refusal) and replies["B"].reason is Reason.TIMEOUT
    assert time.monotonic() - started < 5


def test_replies_of_large_models_are_fetched_one_at_a_time_and_small_ones_together() -> None:
    names = [f"S{number}" for number in range(SMALL_AT_ONCE + 2)]
    for size, most in ((4, SMALL_AT_ONCE), (MAX_SQUEEZED // 4 + 1, 1)):
        grid = Nodes({name: trained(name) for name in names})
        request = Request(kind="train", study=STUDY, round=1, arrays={"w": np.zeros(size, np.float32)})
        transport = FlowerTransport(grid)  # type: ignore[arg-type]
        replies = list(transport.exchange(dict.fromkeys(names, request), 30.0))
        assert sorted(reply.site for reply in replies) == sorted(names)
        assert not any(isinstance(reply, Refusal) for reply in replies)
        assert max(map(len, grid.asked)) == most


def test_a_site_that_holds_the_large_model_is_sent_nothing_and_its_reply_is_large_all_the_same() -> None:
    """What :class:`~fedneuro.server.downlink.Downlink` makes of training that starts from the weights just judged."""
    names, model = [f"S{number}" for number in range(3)], {"w": np.zeros(MAX_SQUEEZED // 4 + 1, np.float32)}
    grid = Nodes({name: _judges_then_trains(name, model) for name in names})
    transport = FlowerTransport(grid)  # type: ignore[arg-type]
    whole = Request(kind="evaluate", study=STUDY, round=1, arrays=model)
    list(transport.exchange(dict.fromkeys(names, whole), 30.0))
    grid.asked.clear()
    held = Request(kind="train", study=STUDY, round=1, held=digest(model))
    replies = list(transport.exchange(dict.fromkeys(names, held), 30.0))
    assert [type(reply) for reply in replies] == [TrainReply] * len(names)
    assert max(map(len, grid.asked)) == 1


def _judges_then_trains(site: str, model: dict[str, Any]) -> Answer:
    def reply(request: Request) -> Reply:
        if request.kind == "evaluate":
            return EvaluateReply(site=site, round=request.round, metrics={}, seconds=0.0)
        return TrainReply(site=site, round=request.round, arrays=model, steps=1, seconds=0.1)

    return says(reply)


def test_each_kind_of_reply_arrives() -> None:
    hello = says(lambda _: HelloReply(site="A", role=Role.TRAIN, public_size=5))
    assert isinstance(exchange({"A": hello}, kind="hello")["A"], HelloReply)
    reply = exchange({"A": trained("A"), "B": trained("B")})
    assert isinstance(reply["A"], TrainReply)
    assert isinstance(reply["B"], TrainReply)
    np.testing.assert_array_equal(reply["B"].arrays["w"], ARRAYS["w"])
    evaluated = says(lambda r: EvaluateReply(site="A", round=r.round, metrics={}, seconds=0.0))
    assert isinstance(exchange({"A": evaluated}, kind="evaluate")["A"], EvaluateReply)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (fails(5, "Node unavailable"), Reason.LOST),
        (fails(8, "ClientApp stopped responding."), Reason.LOST),
        (fails(3, "x"), Reason.LOST),
        (fails(2, "data-invalid"), Reason.DATA_INVALID),
        (fails(2, "<class 'KeyError'>:<'patient 17'>"), Reason.INTERNAL),
        (fails(7, "The FAB could not be verified."), Reason.INTERNAL),
        (trained("B"), Reason.CONTRACT_VIOLATION),
        (trained("A", number=2), Reason.CONTRACT_VIOLATION),
        (lambda m, _: Message(RecordDict({"reply": ConfigRecord({"x": 1})}), reply_to=m), Reason.CONTRACT_VIOLATION),
        (lambda m, _: Message(RecordDict(), reply_to=m), Reason.CONTRACT_VIOLATION),
        (lambda _, __: None, Reason.TIMEOUT),
        (says(lambda r: Refusal(site="A", kind=r.kind, round=r.round, reason=Reason.NON_FINITE)), Reason.NON_FINITE),
    ],
)
def test_whatever_else_comes_is_one_refusal_of_that_site(answer: Answer, reason: Reason) -> None:
    replies = exchange({"A": answer, "C": trained("C")})
    assert replies["A"] == Refusal(site="A", kind="train", round=1, reason=reason)
    assert isinstance(replies["C"], TrainReply)


def test_the_deadline_holds() -> None:
    started = time.monotonic()
    exchange({"A": lambda _, __: None, "B": lambda _, __: None}, timeout=0.2)
    assert 0.2 <= time.monotonic() - started < 1.0


def test_a_site_that_is_not_online_is_lost_at_once() -> None:
    grid = Nodes({"A": trained("A"), "B": trained("B")})
    grid.nodes[1].status = "offline"
    transport = FlowerTransport(grid)  # type: ignore[arg-type]
    assert transport.sites() == ["A"]
    request = Request(kind="train", study=STUDY, round=1, arrays=ARRAYS)
    started = time.monotonic()
    replies = {r.site: r for r in transport.exchange({"A": request, "B": request}, 60.0)}
    assert replies["B"] == Refusal(site="B", kind="train", round=1, reason=Reason.LOST)
    assert isinstance(replies["A"], TrainReply)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("step", ["get_nodes", "push_messages", "pull_messages"])
def test_a_superlink_that_is_gone_loses_every_site(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Nodes({"A": trained("A"), "B": trained("B")})

    def gone(*_: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(grid, step, gone)
    request = Request(kind="train", study=STUDY, round=1, arrays=ARRAYS)
    replies = list(FlowerTransport(grid).exchange({"A": request, "B": request}, 60.0))  # type: ignore[arg-type]
    assert [(r.site, r.reason) for r in replies if isinstance(r, Refusal)] == [("A", Reason.LOST), ("B", Reason.LOST)]


def test_a_message_that_flower_does_not_take_is_a_lost_site(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Nodes({"A": trained("A")})
    monkeypatch.setattr(grid, "push_messages", lambda _: [None])
    request = Request(kind="train", study=STUDY, round=1, arrays=ARRAYS)
    (reply,) = FlowerTransport(grid).exchange({"A": request}, 60.0)  # type: ignore[arg-type]
    assert reply == Refusal(site="A", kind="train", round=1, reason=Reason.LOST)


def test_two_nodes_of_one_name_are_refused() -> None:
    grid = Nodes({"A": trained("A"), "B": trained("B")})
    grid.nodes[1].name = "A"
    with pytest.raises(EnvironmentProblem, match="two nodes are registered under the name A"):
        registered_nodes(grid)  # type: ignore[arg-type]
