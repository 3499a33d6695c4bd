# SPDX-License-Identifier: Apache-2.0
"""A runner that dies or gives up: the message is answered within a second, by Flower's real state and Runtime API.

Each stage of a task is one in which the runner can be killed. Without :mod:`fedneuro.client.lost_tasks` the answer
comes after a minute (fetched) or never (all the others, with Flower 1.41).
"""

import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supernode.nodestate import nodestate_factory
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedneuro.client.lost_tasks import AnsweringNodeState, RunnerWatch, answer_lost_tasks
from fedneuro.privacy.contract import Request
from fedneuro.privacy.flower_tasks import TaskSource
from fedneuro.privacy.processes import claim_port
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import encode_request
from tests.client.flower_node import SuperNode

HELLO = encode_request(
    Request(kind="hello", study=Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}}))
)
_RUNNER = """
import sys, time
from pathlib import Path
from fedneuro.privacy.flower_tasks import Doorbell, TaskSource
from flwr.supernode.runtime.run_clientapp import pull_task_input
secret = Path(sys.argv[2])
bell, source = Doorbell(secret), TaskSource(f"127.0.0.1:{sys.argv[1]}", "flwr-clientapp", secret)
print("waits", flush=True)
bell.wait(60)
pull_task_input(source.task_client(source.acquire()))
print("works", flush=True)
time.sleep(600)
"""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "runner.secret"
    path.write_bytes(secrets.token_bytes(32))
    return path


@pytest.fixture
def node(secret: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperNode]:
    monkeypatch.setattr(nodestate_factory, "InMemoryNodeState", vars(nodestate_factory)["InMemoryNodeState"])
    answer_lost_tasks()
    node = SuperNode(claim_port(), secret.read_bytes())
    yield node
    node.stop()


@pytest.fixture
def source(node: SuperNode, secret: Path) -> Iterator[TaskSource]:
    with closing(TaskSource(f"127.0.0.1:{node.server.config.port}", "flwr-clientapp", secret)) as source:
        yield source


def lost(node: SuperNode) -> None:
    """The message was answered, once, with "lost", and nothing is left of it."""
    reply = node.reply()
    assert reply is not None and reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert node.reply() is None
    assert node.state.get_tasks(statuses=["pending", "starting", "running"]) == []


def test_a_killed_runner_is_missed_at_once(node: SuperNode, secret: Path) -> None:
    words = [sys.executable, "-c", _RUNNER, str(node.server.config.port), str(secret)]
    runner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None and runner.stdout.readline() == "waits\n"
    watch = RunnerWatch(secret)
    node.receive(HELLO, "query.hello")
    watch.taken(node.state)
    assert runner.stdout.readline() == "works\n"
    for _ in range(20):  # more rings than its queue holds: it works, and hears none of them
        watch._again = 0.0
        watch.wait(0.0)
    assert node.reply() is None
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    started = time.monotonic()
    while not (reply := node.reply()):
        assert time.monotonic() - started < 10, "Flower notices after a minute"
        watch.wait(0.01)
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED


def test_an_answer_is_waited_for_and_not_looked_for(node: SuperNode, source: TaskSource, secret: Path) -> None:
    watch = RunnerWatch(secret)
    node.receive(HELLO, "query.hello")
    watch.taken(node.state)
    waited: list[float] = []

    def main_loop() -> None:
        started = time.monotonic()
        watch.wait(30.0)
        waited.append(time.monotonic() - started)

    loop = threading.Thread(target=main_loop)
    with closing(source.task_client(source.acquire())) as client:
        message, context, _, _ = pull_task_input(client)
        loop.start()
        push_message(client, Message(RecordDict(), reply_to=message), context)
        loop.join()
        reply = node.reply()
        assert reply is not None and reply.has_content() and waited[0] < 10
        push_task_output(client, context, "completed", "")


def test_a_task_that_was_only_claimed_goes_to_the_next_runner(node: SuperNode, source: TaskSource) -> None:
    node.receive(HELLO, "query.hello")
    assert source.acquire()
    state: Any = node.state
    state.expire_claims()
    assert node.reply() is None
    token = source.acquire()
    assert token, "it waits again"
    with closing(source.task_client(token)) as client:
        message, context, _, _ = pull_task_input(client)
        push_message(client, Message(RecordDict(), reply_to=message), context)
        push_task_output(client, context, "completed", "")
    reply = node.reply()
    assert reply is not None and reply.has_content()


def test_a_task_that_was_begun_but_whose_message_was_not_fetched(node: SuperNode, source: TaskSource) -> None:
    node.receive(HELLO, "query.hello")
    with closing(source.task_client(source.acquire())) as client:
        client.PullTaskInput(PullTaskInputRequest())
    state: Any = node.state
    state.expire_claims()
    lost(node)


@pytest.mark.parametrize("ending", ["killed", "gave up"])
def test_half_an_answer_is_thrown_away(
    node: SuperNode, source: TaskSource, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Handed over, but for its parts: Flower would send it on, and wait for them for ever."""
    node.receive(HELLO, "query.hello")
    with closing(source.task_client(source.acquire())) as client:
        message, context, _, _ = pull_task_input(client)
        with monkeypatch.context() as patch:
            patch.setattr(run_clientapp, "push_objects", lambda *_, **__: None)
            push_message(client, Message(RecordDict(), reply_to=message), context)
        assert node.reply() is None, "held back"
        state: Any = node.state
        if ending == "killed":
            state.expire_claims()
        else:
            push_task_output(client, None, "failed", "")
    lost(node)


def test_a_task_that_was_given_up_is_answered(node: SuperNode, source: TaskSource) -> None:
    node.receive(HELLO, "query.hello")
    with closing(source.task_client(source.acquire())) as client:
        pull_task_input(client)
        push_task_output(client, None, "failed", "")
    lost(node)


def test_an_error_of_ours_is_answered_once(node: SuperNode, source: TaskSource) -> None:
    from flwr.app import Error

    node.receive(HELLO, "query.hello")
    with closing(source.task_client(source.acquire())) as client:
        message, context, _, _ = pull_task_input(client)
        assert isinstance(context, Context)
        push_message(client, Message(Error(2, "policy-refused"), reply_to=message), context)
        push_task_output(client, context, "failed", "")
    reply = node.reply()
    assert reply is not None and reply.error.reason == "policy-refused"
    assert node.reply() is None


def test_flower_still_leaves_it_without_an_answer(secret: Path) -> None:
    """Once it does not, AnsweringNodeState can go."""
    stock = SuperNode(claim_port(), secret.read_bytes())
    assert not isinstance(stock.state, AnsweringNodeState)
    stock.receive(HELLO, "query.hello")
    with closing(TaskSource(f"127.0.0.1:{stock.server.config.port}", "flwr-clientapp", secret)) as source:
        with closing(source.task_client(source.acquire())) as client:
            pull_task_input(client)
            push_task_output(client, None, "failed", "")
        assert stock.reply() is None and source.acquire() == ""
    stock.stop()
