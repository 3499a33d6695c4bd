# SPDX-License-Identifier: Apache-2.0
"""The hospital's runner against Flower's real Runtime API, and the parts of Flower that our edges lean on."""

import ast
import inspect
import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.dependencies import utils as dependencies
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import main as supernode_app
from flwr.supernode import start_client_internal
from starlette.middleware.base import BaseHTTPMiddleware

from fedneuro.client import supernode
from fedneuro.client.lost_tasks import RunnerWatch
from fedneuro.client.node_settings import NodeSettings, load_node_settings
from fedneuro.client.runner import Runner
from fedneuro.client.site import Site
from fedneuro.privacy.contract import HelloReply, Refusal, Reply, Request, Role
from fedneuro.privacy.errors import BadInput, Reason
from fedneuro.privacy.flower_tasks import Doorbell, RunnerLine, quicken_transfers
from fedneuro.privacy.light_layers import lighten_layers, take_values_at_once
from fedneuro.privacy.study import Study
from fedneuro.privacy.wire import decode_reply, encode_request
from fedneuro.privacy.wire_bytes import squeeze, unsqueeze
from fedneuro.server.bundle import bundle, bundle_hash
from tests.client.flower_node import BUNDLE, SuperNode

STUDY = Study.parse({"study": {"name": "toy"}, "training": {"local_steps": 1}})
HELLO = Request(kind="hello", study=STUDY)


class Ward(Site):
    """A site whose work is one function."""

    def __init__(self, settings: NodeSettings, work: Callable[[Request], Reply]) -> None:
        super().__init__(settings.site_settings())
        self.work = work
        self.asked: list[Request] = []

    def handle(self, request: Request) -> Reply:
        self.asked.append(request)
        return self.work(request)


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "bids").mkdir()
    for name in ("ca.crt", "node.key", "runner.secret"):
        (tmp_path / name).write_bytes(secrets.token_bytes(32))
        (tmp_path / name).chmod(0o600)
    parts: dict[str, dict[str, object]] = {
        "site": {"name": "A", "role": "train", "public_size": 5, "data": "bids", "state": "state"},
        "study": {"approved": [STUDY.hash]},
        "superlink": {"address": "127.0.0.1:1", "root_certificate": "ca.crt", "key": "node.key"},
        "runner": {"port": port, "secret": "runner.secret", "bundle": bundle_hash(BUNDLE)},
    }
    text = "\n".join(
        f"[{p}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in part.items()) for p, part in parts.items()
    )
    (tmp_path / "node.toml").write_text(text)
    return load_node_settings(tmp_path / "node.toml")


@pytest.fixture
def node(settings: NodeSettings) -> Iterator[SuperNode]:
    node = SuperNode(settings.runner.port, Path(settings.runner.secret).read_bytes())
    yield node
    node.stop()


def answered(node: SuperNode, settings: NodeSettings, work: Callable[[Request], Reply]) -> tuple[Message, Ward]:
    """Let a runner serve until a reply is there, then stop it as the hospital would."""
    ward = Ward(settings, work)
    runner = Runner(settings, ward)
    found: list[Message] = []

    class Source:
        """The runner's own source; Ctrl-C comes when the reply has been handed over."""

        def __init__(self) -> None:
            self.real = runner._source
            self.close, self.task_client = self.real.close, self.real.task_client

        def acquire(self) -> str:
            if reply := node.reply():
                found.append(reply)
                raise KeyboardInterrupt
            return self.real.acquire()

    runner._source = Source()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    runner.close()
    reply = found[0] if found else node.reply()
    assert reply is not None
    return reply, ward


def hello(request: Request) -> Reply:
    assert request == HELLO
    return HelloReply(site="A", role=Role.TRAIN, public_size=5)


def test_a_request_is_answered(node: SuperNode, settings: NodeSettings) -> None:
    node.receive(encode_request(HELLO), "query.hello")
    reply, ward = answered(node, settings, hello)
    assert decode_reply(reply.content) == HelloReply(site="A", role=Role.TRAIN, public_size=5)
    assert len(ward.asked) == 1


def test_a_request_is_answered_through_fewer_layers(settings: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher makes them; the layers are Flower 1.41's, and what they refuse they refuse."""
    assert [getattr(layer.cls, "__name__", "") for layer in supernode_app.create_app().user_middleware] == [
        "BaseHTTPMiddleware", "ProtobufTranslationMiddleware", "RuntimeTracingMiddleware",
    ]  # fmt: skip
    monkeypatch.setattr(BaseHTTPMiddleware, "__call__", BaseHTTPMiddleware.__call__)
    monkeypatch.setattr(dependencies, "run_in_threadpool", vars(dependencies)["run_in_threadpool"])
    lighten_layers({})
    take_values_at_once()
    node = SuperNode(settings.runner.port, Path(settings.runner.secret).read_bytes())
    node.receive(encode_request(HELLO), "query.hello")
    reply, ward = answered(node, settings, hello)
    assert decode_reply(reply.content) == HelloReply(site="A", role=Role.TRAIN, public_size=5)
    assert len(ward.asked) == 1
    address = f"http://127.0.0.1:{settings.runner.port}/v1/runtime/"
    kind = {"content-type": "application/protobuf"}
    assert httpx.post(address + "acquire-task", content=b"", headers=kind).status_code == 401
    assert httpx.post(address + "pull-task-input", content=b"", headers=kind).status_code == 401
    node.stop()


@pytest.mark.parametrize("module", ["evil.py", "fedneuro/client/app.py", "sitecustomize.py"])
def test_another_bundle_is_refused_before_the_site_hears_of_it(
    node: SuperNode, settings: NodeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Code under a name of its own, in the place of ours, or run by Python itself: never unpacked, never imported."""
    from flwr.cli.build import build_fab_from_files

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    app = module.removesuffix(".py").replace("/", ".")
    project = b'[project]\nname = "fedneuro"\nversion = "0.1.0"\n[tool.flwr.app]\npublisher = "fedneuro"\n'
    project += f'[tool.flwr.app.components]\nserverapp = "{app}:app"\nclientapp = "{app}:app"\n'.encode()
    fab = build_fab_from_files({"pyproject.toml": project, module: b"raise SystemExit('ran')"})[0]
    before = set(sys.modules), list(sys.path)
    node.receive(encode_request(HELLO), "query.hello", fab)
    reply, ward = answered(node, settings, hello)
    assert reply.error.reason == "policy-refused"
    assert ward.asked == []
    assert not (tmp_path / "flower").exists()
    assert "evil" not in sys.modules and list(sys.path) == before[1]


def test_a_bundle_that_is_not_ours_is_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings would be read by the SuperNode itself: a gigabyte of zeros is a megabyte in a zip file."""
    import io
    import zipfile

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", bytes(64 * 2**20))
    opened: list[bytes] = []
    monkeypatch.setattr(start_client_internal, "get_fused_config_from_fab", lambda content, _: opened.append(content))
    supernode.open_only(bundle_hash(BUNDLE))
    read: Any = vars(start_client_internal)["get_fused_config_from_fab"]
    assert read(bomb.getvalue(), Run.create_empty(5)) == {} and opened == []
    read(BUNDLE, Run.create_empty(5))
    assert opened == [BUNDLE]


def test_a_task_rings_the_runners_bell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "runner.secret"
    secret.write_bytes(secrets.token_bytes(32))
    bell, second = Doorbell(secret), Doorbell(secret)
    assert bell.there and not second.there  # two runners of one node: the second looks instead of waiting
    found: list[int | None] = [None, 5]
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", lambda **_: found.pop(0))
    supernode.announce_tasks(RunnerWatch(secret))
    pull: Any = vars(start_client_internal)["_pull_and_store_message"]
    assert pull() is None and not bell.wait(0.05)
    assert pull() == 5 and bell.wait(1.0)
    assert not bell.wait(0.05)
    bell.close()
    second.close()
    assert RunnerLine(secret).ring()  # nobody waits: nothing happens


def test_no_look_right_after_a_reply_unless_messages_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int | None] = [None, 5, None, 5, 5, 5, None]
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", lambda **_: found.pop(0))
    supernode.rest_after_a_reply()
    pull: Any = vars(start_client_internal)["_pull_and_store_message"]
    looks = []
    while found:
        before = len(found)
        looks.append((pull(), before != len(found)))
    none, rest = (None, True), (None, False)
    assert looks == [none, (5, True), rest, none, (5, True), rest, (5, True), (5, True), none]


def test_a_message_whose_run_ends_on_the_way_is_put_aside(
    node: SuperNode, settings: NodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator's process is killed between a message and its parts; the runner has the task already."""
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", start_client_internal._pull_and_store_message)
    supernode.put_aside_ended_runs()
    taken: list[int | None] = []

    def ended(_: str) -> bytes:
        while not node.state.get_tasks(statuses=["running"]):
            time.sleep(0.01)
        raise RunNotRunningException

    def main_loop() -> None:
        taken.append(node.receive(encode_request(HELLO), "query.hello", pull=ended))
        taken.append(node.receive(encode_request(HELLO), "query.hello"))

    loop = threading.Thread(target=main_loop)
    loop.start()
    reply, ward = answered(node, settings, hello)
    loop.join()
    assert taken == [None, 5] and len(ward.asked) == 1
    assert decode_reply(reply.content) == HelloReply(site="A", role=Role.TRAIN, public_size=5)


def test_flower_still_leaves_the_task_of_an_ended_run(node: SuperNode) -> None:
    """Once it does not, put_aside_ended_runs can go."""

    def ended(_: str) -> bytes:
        raise RunNotRunningException

    assert node.receive(encode_request(HELLO), "query.hello", pull=ended) is None
    assert len(node.state.get_tasks(statuses=["pending"])) == 1


def test_a_paused_node_takes_no_task_and_a_draining_one_ends(node: SuperNode, settings: NodeSettings) -> None:
    node.receive(encode_request(HELLO), "query.hello")
    ward, notes = Ward(settings, hello), []
    held = ["paused", "paused", ""]

    def hold() -> str:
        return held.pop(0) if held else ""

    def note(last: dict[str, Any]) -> None:
        notes.append(last)
        runner.draining = True

    runner = Runner(settings, ward, hold, note)
    runner.run()
    runner.close()
    assert held == [] and len(ward.asked) == 1
    assert notes[0]["kind"] == "query.hello" and notes[0]["outcome"] == "answered"


def test_a_squeezed_request_gets_a_squeezed_reply(node: SuperNode, settings: NodeSettings) -> None:
    node.receive(squeeze(encode_request(HELLO)), "query.hello")
    reply, _ = answered(node, settings, hello)
    assert list(reply.content) == ["frame"]
    assert decode_reply(unsqueeze(reply.content)) == HelloReply(site="A", role=Role.TRAIN, public_size=5)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (RecordDict({"config": ConfigRecord({"x": 1})}), "train"),
        (RecordDict(), "query.hello"),
        (encode_request(HELLO), "train"),
        (encode_request(HELLO), "query.shell"),
    ],
)
def test_what_is_not_the_contract_never_reaches_the_site(
    node: SuperNode, settings: NodeSettings, content: RecordDict, kind: str
) -> None:
    node.receive(content, kind)
    reply, ward = answered(node, settings, hello)
    assert reply.error.reason == "contract-violation"
    assert ward.asked == []


def test_of_an_unexpected_error_only_a_code_leaves(node: SuperNode, settings: NodeSettings) -> None:
    def work(_: Request) -> Reply:
        raise KeyError("patient sub-017")

    node.receive(encode_request(HELLO), "query.hello")
    reply, _ = answered(node, settings, work)
    assert reply.error.reason == "internal-error"
    assert "sub-017" not in repr(reply) and "patient" not in repr(reply)


def test_a_refusal_and_a_reply_that_may_not_leave(node: SuperNode, settings: NodeSettings) -> None:
    refusal = Refusal(site="A", kind="hello", round=0, reason=Reason.DATA_INVALID)
    node.receive(encode_request(HELLO), "query.hello")
    reply, _ = answered(node, settings, lambda _: refusal)
    assert decode_reply(reply.content) == refusal


def test_a_node_that_is_stopped_in_the_middle_says_that_it_is_lost(node: SuperNode, settings: NodeSettings) -> None:
    def work(_: Request) -> Reply:
        raise KeyboardInterrupt

    node.receive(encode_request(HELLO), "query.hello")
    reply, _ = answered(node, settings, work)
    assert (reply.error.code, reply.error.reason) == (5, "lost")


@pytest.mark.usefixtures("node")
def test_another_secret_is_one_clear_error(settings: NodeSettings) -> None:
    Path(settings.runner.secret).write_bytes(b"another secret")
    runner = Runner(settings, Ward(settings, hello))
    with pytest.raises(BadInput, match="refuses the shared secret"):
        runner.run()
    runner.close()


# -- what our edges lean on in Flower; each fails if an update of Flower moves it --------------------------------


def test_flower_is_the_version_that_the_edges_were_written_for() -> None:
    assert version("flwr") == "1.41.0"


def test_the_supernodes_pauses_are_where_the_launcher_expects_them() -> None:
    tree = ast.parse(inspect.getsource(start_client_internal))
    uses = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    ]
    assert {use.attr for use in uses} == {"sleep"}  # so a clock that can only sleep will do
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.func in uses]
    pauses = sorted(ast.literal_eval(call.args[0]) for call in calls)
    assert pauses == [supernode.REPLY_PAUSE, supernode.REPLY_PAUSE, supernode.IDLE_PAUSE]


def test_the_launcher_shortens_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_client_internal, "time", time)
    supernode.shorten_pauses()
    started = time.monotonic()
    clock: Any = vars(start_client_internal)["time"]
    clock.sleep(3)
    clock.sleep(0.5)
    assert time.monotonic() - started < 0.3
    with pytest.raises(RuntimeError, match="pauses for 2 s"):
        clock.sleep(2)


def test_a_link_that_breaks_in_a_handshake_is_tried_again_and_a_wrong_certificate_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.supernode import fleet_http_connection as connection

    assert "make_simple_http_retry_invoker()" in inspect.getsource(connection)
    stock: Any = vars(connection)["make_simple_http_retry_invoker"]
    monkeypatch.setattr(connection, "make_simple_http_retry_invoker", stock)
    broken = httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")
    wrong = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")
    refused = httpx.HTTPStatusError("412", request=httpx.Request("POST", "https://x"), response=httpx.Response(412))
    assert stock().should_giveup(broken), "Flower gives up; once it does not, keep_trying can go"
    supernode.keep_trying()
    made: Any = vars(connection)["make_simple_http_retry_invoker"]
    gives_up = made().should_giveup
    assert [gives_up(error) for error in (broken, wrong, refused)] == [False, True, True]


def test_flower_ends_itself_where_the_launcher_says_why() -> None:
    """``end_when_sent_away`` puts these two names in place of ``os``; the modules must use no other."""
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection

    for module in (http_retry, fleet_http_connection):
        used = re.findall(r"\bos\.\w+", inspect.getsource(module))
        assert sorted(used) == ["os.getpid", "os.kill"]


def test_transfers_begin_to_look_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = function.__kwdefaults__ or {}
        assert defaults["initial_backoff"] in (1, 0.02)  # Flower's own, or already ours
        monkeypatch.setitem(defaults, "initial_backoff", 1)
    quicken_transfers()
    assert (inflatable_utils.pull_objects.__kwdefaults__ or {})["initial_backoff"] == 0.02
    looks: list[float] = []

    def pull(key: str) -> bytes:
        looks.append(time.monotonic())
        if len(looks) < 3:
            raise inflatable_utils.ObjectUnavailableError(key)
        return b"x"

    assert inflatable_utils.pull_objects(["a"], pull) == {"a": b"x"}
    assert looks[-1] - looks[0] < 0.5


def test_the_bundle_is_thin_and_the_same_each_time() -> None:
    import io
    import zipfile

    assert bundle() == BUNDLE
    assert len(BUNDLE) < 1024
    names = zipfile.ZipFile(io.BytesIO(BUNDLE)).namelist()
    assert names == ["pyproject.toml", ".info/CONTENT"]
