# SPDX-License-Identifier: Apache-2.0
"""A hospital's whole way, as people type it, over real processes: init, enrol, doctor, approve, start, a study.

The coordinator is ``fedneuro-server init`` and ``start``: SuperLink behind the nginx guard, enrolment over gRPC. Then
the same coordinator turns hostile: its own runner is stopped, and the tests send what they like through the same guard
to the same node. The tests stand in the order of that story; the last one puts the node out.

``FEDNEURO_FLOOD`` sets the number of tasks of the flood (20 by default; 1000 is the full version).
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf

from fedneuro.client.audit_chain import Signer, verify_log
from fedneuro.client.run_folder import RunFolder
from fedneuro.privacy.contract import Request
from fedneuro.privacy.errors import StateError
from fedneuro.privacy.ledger import Ledger
from fedneuro.privacy.study_file import load_study
from fedneuro.privacy.wire import MESSAGE_TYPES, encode_request
from fedneuro.server.bundle import bundle
from fedneuro.server.control import Control
from fedneuro.server.flower_transport import registered_nodes
from fedneuro.server.rounds import initial_arrays
from fedneuro.server.store import RunStore
from fedneuro.simulations.benchmarks.live import SuperLink, take_run
from tests.bids import write_site
from tests.client.flower_node import tampered
from tests.server.conftest import PASSPHRASE, ROOT_PASSPHRASE, free_ports

pytestmark = pytest.mark.deployment

BIN = Path(sys.executable).parent
FLOOD = int(os.environ.get("FEDNEURO_FLOOD", "20"))
STUDY = """\
[study]
name = "first-study"
[data]
patch = [16, 16]
augment = "none"
[model]
channels = [4, 8]
[training]
rounds = 2
local_steps = 1
local_epochs = 0
device = "cpu"
[privacy]
mode = "local"
epsilon = 2.0
delta = 1e-2
sample_rate = 0.5
crops_per_patient = 2
[evaluation]
bootstrap = 100
previews = 0
every = 0
"""


def run(*words: str | Path, rc: int = 0) -> str:
    """A command as a person types it; both passphrases are in the environment."""
    env = {**os.environ, "FEDNEURO_PASSPHRASE": PASSPHRASE, "FEDNEURO_ROOT_PASSPHRASE": ROOT_PASSPHRASE}
    program, *rest = map(str, words)
    done = subprocess.run([BIN / program, *rest], capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == rc, f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_for(what: str, done: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


@dataclass
class Consortium:
    """A coordinator and one hospital that was enrolled with it, both running."""

    folder: Path
    node: Path
    study: Path
    server: "subprocess.Popen[str]"
    hospital: "subprocess.Popen[bytes]"
    link: SuperLink
    said: dict[str, str]

    @property
    def log(self) -> list[Any]:
        return list(verify_log(self.node / "state" / "audit.jsonl", Signer(self.node / "node.key").public))

    @property
    def charges(self) -> int:
        return sum(row.kind == "reserve" for row in Ledger(self.node / "state" / "ledger.db", "north").entries())

    def supernode(self) -> psutil.Process:
        return psutil.Process(RunFolder(self.node / "state").read("node")["children"]["supernode"]["pid"])


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    if shutil.which("nginx") is None:
        text = "nginx is not installed (apt-get install nginx-light): the guard cannot be tried"
        if os.environ.get("CI") == "true":
            pytest.fail(text)
        pytest.skip(text)
    base = tmp_path_factory.mktemp("consortium")
    folder, node, study = base / "glioma-net", base / "node", base / "study.toml"
    study.write_text(STUDY)
    write_site(base / "bids", patients=6, shape=(18, 18, 4))
    first = next(port for port in free_ports(40) if not {port, port + 1, port + 2} - set(_free(port)))
    (superlink,) = free_ports(1)
    run("fedneuro-server", "init", "glioma-net", "--out", folder, "--port", str(first),
        "--superlink-port", str(superlink))  # fmt: skip
    (folder / "root-key-MOVE-OFFLINE.json").rename(base / "usb-stick.json")
    env = {**os.environ, "FEDNEURO_PASSPHRASE": PASSPHRASE}
    command = [str(BIN / "fedneuro-server"), "start", "--config", str(folder), "--no-dashboard"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    hospital: subprocess.Popen[bytes] | None = None
    config = node / "node.toml"
    try:
        assert server.stdout is not None and "glioma-net is up" in server.stdout.readline()
        run("fedneuro-server", "invite", "north", "--role", "train", "--config", folder)
        port = str(free_ports(1)[0])
        said = {
            "init": run("fedneuro-node", "init", node, "--name", "north", "--public-size", "10", "--data",
                        base / "bids", "--port", port, "--yes"),
            "enrol": run("fedneuro-node", "enrol", folder / "invitations" / "north.json", "--config", config),
            "doctor": run("fedneuro-node", "doctor", "--json", "--config", config),
            "approve": run("fedneuro-node", "approve", study, "--yes", "--config", config),
        }  # fmt: skip
        with (node / "start.log").open("wb") as log:
            hospital = subprocess.Popen([BIN / "fedneuro-node", "start", "--config", config], stderr=log)
        authority, secret = folder / "ca" / "root.crt", folder / "superlink" / "runner.secret"
        with closing(Control(f"127.0.0.1:{superlink}", authority)) as control:
            wait_for("the node is online", lambda: "north" in control.online())
            link = SuperLink(f"127.0.0.1:{superlink}", authority, secret, control)
            yield Consortium(folder, node, study, server, hospital, link, said)
    finally:
        for process in (hospital, server):
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


def _free(port: int) -> list[int]:
    from fedneuro.privacy.errors import EnvironmentProblem
    from fedneuro.privacy.processes import claim_port

    found = []
    for number in (port, port + 1, port + 2):
        try:
            found.append(claim_port(number))
        except (EnvironmentProblem, OverflowError):
            continue
    return found


# -- the honest coordinator ----------------------------------------------------------------------------------


def test_doctor_finds_the_way_through_the_guard(consortium: Consortium) -> None:
    """With the certificate that enrolment gave; without it the guard closes the door, which the doctor must see."""
    findings = {finding["check"]: finding for finding in json.loads(consortium.said["doctor"])["findings"]}
    assert "fail" not in {finding["verdict"] for finding in findings.values()}, findings
    assert {findings[name]["verdict"] for name in ("TLS", "clock", "certificate", "connection")} == {"pass"}
    enrolled = consortium.said["enrol"]
    shown = run("fedneuro-node", "identity", "--json", "--config", consortium.node / "node.toml")
    listed = json.loads(run("fedneuro-server", "sites", "--json", "--config", consortium.folder))
    assert json.loads(shown)["key"] == listed[0]["key"] and listed[0]["key"] in enrolled, "one fingerprint everywhere"


def test_a_study_runs_to_its_end_through_the_guard(consortium: Consortium, tmp_path: Path) -> None:
    study = load_study(consortium.study)
    canonical, out = tmp_path / "study.json", tmp_path / "out"
    canonical.write_bytes(study.canonical)
    consortium.link.control.start_run(bundle(), {"study": str(canonical), "out": str(out)})

    def status() -> str:
        try:
            with closing(RunStore.load(out)) as store:
                return "" if store.status == "running" else store.status
        except StateError:  # it has not begun
            return ""

    assert wait_for("the study ends", status) == "complete"
    with closing(RunStore.load(out)) as store:
        rounds = store.rounds()
        assert [sorted(record.train) for record in rounds[1:]] == [["north"], ["north"]]
        assert not any(record.refusals for record in rounds)
    assert consortium.charges == 2
    runner = RunFolder(consortium.node / "state").read("runner")["pid"]
    assert "libtorch" not in Path(f"/proc/{runner}/maps").read_text(), "only its child computes"
    entries = consortium.log
    left = [entry["round"] for entry in entries if entry.get("answer") == "TrainReply" and entry["kind"] == "out"]
    assert left == [1, 2] and sum(entry["kind"] == "ledger" for entry in entries) == 2
    access = (consortium.folder / "guard" / "access.log").read_text()
    assert '"CN=north" SUCCESS 200 POST /v1/fleet/push-messages' in access, "by client certificate, through the guard"


# -- the hostile coordinator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(consortium: Consortium) -> Iterator[Consortium]:
    """The coordinator's runner, which executes installed code only, is held: the tests take its place."""

    def find() -> psutil.Process | None:
        for child in psutil.Process(consortium.server.pid).children(recursive=True):
            with suppress(psutil.Error):  # it ends after each run, and is started again
                if "fedneuro.server.runner:main" in child.cmdline():
                    return child
        return None

    runner = wait_for("the coordinator's runner is back", find)
    runner.suspend()
    yield consortium
    runner.resume()


def _request(consortium: Consortium, kind: str = "train", number: int = 2) -> RecordDict:
    study = load_study(consortium.study)
    arrays = initial_arrays(study)["model"] if kind == "train" else None
    return encode_request(Request(kind=kind, study=study, round=number, arrays=arrays))  # type: ignore[arg-type]


def _send(grid: Grid, contents: list[RecordDict], kind: str = "train") -> list[Message]:
    """Send each to the hospital and wait for all answers."""
    node = registered_nodes(grid)["north"]
    messages = [
        Message(content, dst_node_id=node, message_type=MESSAGE_TYPES[kind], ttl=3600.0)  # type: ignore[index]
        for content in contents
    ]
    pending = set(grid.push_messages(messages))
    assert "" not in pending and None not in pending
    found: list[Message] = []
    deadline = time.monotonic() + 300 + 2 * len(contents)
    while pending:
        assert time.monotonic() < deadline, f"{len(pending)} of {len(contents)} are not answered"
        for reply in grid.pull_messages(pending):
            pending.discard(reply.metadata.reply_to_message_id)
            found.append(reply)
        time.sleep(0.2)
    return found


def _reasons(replies: list[Message]) -> set[str]:
    assert all(reply.has_error() for reply in replies), "more than a reason code left"
    return {str(reply.error.reason) for reply in replies}


def _foreign(files: dict[str, bytes], comment: str = "") -> bytes:
    """A bundle with code of its own, which SuperLink takes for one of ours."""
    from flwr.cli.build import build_fab_from_files

    project = '[project]\nname = "fedneuro"\nversion = "0.1.0"\nlicense = "Apache-2.0"\n'
    project += '[tool.flwr.app]\npublisher = "fedneuro"\n[tool.flwr.app.components]\n'
    project += 'serverapp = "fedneuro.client.app:app"\nclientapp = "fedneuro.client.app:app"\n' + comment
    made: bytes = build_fab_from_files({"pyproject.toml": project.encode(), **files})[0]
    return made


def test_a_bundle_with_code_of_its_own_runs_nothing(hostile: Consortium, tmp_path: Path) -> None:
    """Its own fedneuro/client/app.py and a sitecustomize, in a run whose request is else an honest one."""
    sprung = tmp_path / "sprung"
    trap = f"open({str(sprung)!r}, 'w').close()\n".encode()
    before, entries = hostile.charges, len(hostile.log)
    files = {"sitecustomize.py": trap, "fedneuro/__init__.py": trap, "fedneuro/client/app.py": trap}
    with take_run(hostile.link, _foreign(files)) as grid:
        assert _reasons(_send(grid, [_request(hostile), _request(hostile)])) == {"policy-refused"}
    assert not sprung.exists() and hostile.charges == before
    unpacked = [path for path in hostile.node.rglob("*") if path.name in ("sitecustomize.py", "app.py")]
    assert unpacked == []
    new = hostile.log[entries:]
    assert [entry["reason"] for entry in new if entry["kind"] == "in"] == ["policy-refused"] * 2
    assert hostile.hospital.poll() is None


@contextmanager
def _little_more_memory(process: psutil.Process) -> Iterator[None]:
    """The process takes less than 50 MB more meanwhile, also for a moment."""

    def peak() -> int:
        return int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak is counted from here
    before = peak()
    yield
    assert peak() - before < 50e6


def test_a_bundle_that_is_a_bomb_is_not_opened(hostile: Consortium) -> None:
    """60 MB of settings in 60 kB: the SuperNode would read them before anything of ours is asked."""
    content = _foreign({}, "# " + "x" * 60_000_000 + "\n")
    assert len(content) < 1_000_000
    supernode = hostile.supernode()
    with _little_more_memory(supernode), take_run(hostile.link, content) as grid:
        assert _reasons(_send(grid, [_request(hostile)])) == {"policy-refused"}
    assert hostile.supernode().pid == supernode.pid, "it is the same process"


def test_compressed_bombs_in_a_message_stay_compressed(hostile: Consortium) -> None:
    """In the place of the frame and of the arrays: bytes are compared with what they should be, never unpacked."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frame", bytes(100_000_000))
    import gzip

    before = hostile.charges
    bombs = [gzip.compress(bytes(100_000_000), 1), packed.getvalue()]
    contents = [RecordDict({"frame": ConfigRecord({"frame": bomb})}) for bomb in bombs]
    runner = psutil.Process(RunFolder(hostile.node / "state").read("runner")["pid"])
    with _little_more_memory(runner), take_run(hostile.link, bundle(), {"study": "", "out": ""}) as grid:
        assert _reasons(_send(grid, contents)) == {"contract-violation"}
    assert hostile.charges == before


def test_a_message_that_cannot_be_put_together_is_answered(hostile: Consortium) -> None:
    """One whose record is none, and an array that names its one part a million times; then an honest request."""
    before, entries = hostile.charges, len(hostile.log)
    runner = psutil.Process(RunFolder(hostile.node / "state").read("runner")["pid"])
    forms: dict[str, Callable[[bytes], bytes]] = {
        "ConfigRecord": lambda _: b"\xff" * 40,
        "Array": lambda body: json.dumps(json.loads(body) | {"arraychunk_ids": [0] * 1_000_000}).encode(),
    }
    with _little_more_memory(runner), take_run(hostile.link, bundle(), {"study": "", "out": ""}) as grid:
        for part, change in forms.items():
            assert _send_tampered(grid, _request(hostile), part, change).has_error()
        (honest,) = _send(grid, [_request(hostile, "hello", 0)], "hello")
        assert honest.has_content()
    assert hostile.charges == before and runner.is_running()
    new = [entry for entry in hostile.log[entries:] if entry["kind"] == "in"]
    assert [entry.get("reason") for entry in new] == ["contract-violation"] * 2 + [None]


def _send_tampered(grid: Any, content: RecordDict, part: str, change: Callable[[bytes], bytes]) -> Message:
    """Send what Flower's own client would not make; returns the answer."""
    message = Message(content, registered_nodes(grid)["north"], "train", ttl=600.0)
    tree, parts = tampered(message, part, change)
    message.metadata.__dict__["_message_id"] = tree.object_id
    client, run_id = grid._runtime_client, message.metadata.run_id
    proto = message_to_proto(remove_content_from_message(message))
    pushed = client.PushMessages(PushAppMessagesRequest(messages_list=[proto], message_object_trees=[tree]))
    push = make_push_object_fn_protobuf(client.PushObject, grid.node, run_id, pushed.session_id)
    for key in pushed.objects_to_push:
        push(key, parts[key])
    return wait_for("it is answered", lambda: next(iter(grid.pull_messages([tree.object_id])), None), 60)  # type: ignore[no-any-return]


@pytest.mark.timeout(600 + 3 * FLOOD)
def test_a_flood_of_tasks_is_refused_and_logged_and_the_node_lives(hostile: Consortium) -> None:
    policy = hostile.node / "policy.toml"
    text = policy.read_text()
    policy.write_text(text.replace("max_requests_per_hour = 1000", "max_requests_per_hour = 5"))
    entries = len(hostile.log)
    try:
        with take_run(hostile.link, bundle(), {"study": "", "out": ""}) as grid:
            replies = _send(grid, [_request(hostile, "hello", 0) for _ in range(FLOOD)], "hello")
            assert len(replies) == FLOOD
            policy.write_text(text)
            (honest,) = _send(grid, [_request(hostile, "hello", 0)], "hello")
            assert honest.has_content()
    finally:
        policy.write_text(text)
    new = hostile.log[entries:]
    refused = [entry for entry in new if entry["kind"] == "in" and entry.get("reason") == "too-many-requests"]
    assert len(refused) >= FLOOD - 5 > 0
    assert not [entry for entry in new if entry.get("answer") == "TrainReply"]


def test_a_replayed_round_costs_nothing(hostile: Consortium) -> None:
    """Round 1 again, after round 2 was answered: over the real way, as in the suite of single attempts."""
    before = hostile.charges
    with take_run(hostile.link, bundle(), {"study": "", "out": ""}) as grid:
        (reply,) = _send(grid, [_request(hostile, "train", 1)])
    assert hostile.charges == before
    assert hostile.log[-1]["reason"] == "round-replayed" and not hostile.log[-1].get("bytes")
    assert reply.has_error() or set(reply.content) == {"reply"}


def test_a_node_that_was_put_out_gets_nothing_more_and_says_so(hostile: Consortium) -> None:
    """Its certificate is revoked while it runs: the guard sends it away, its supervisor and its log live on."""
    entries = len(hostile.log)
    assert "north" in hostile.link.control.online()
    run("fedneuro-server", "revoke", "north", "--config", hostile.folder)
    children = RunFolder(hostile.node / "state")
    wait_for("the SuperNode is sent away", lambda: children.read("node")["children"]["supernode"]["failures"], 60)
    found = json.loads(run("fedneuro-node", "status", "--json", "--config", hostile.node / "node.toml"))
    assert found["running"] and hostile.hospital.poll() is None
    told = run("fedneuro-node", "doctor", "--config", hostile.node / "node.toml", rc=5)
    assert "FAIL  certificate" in told and "it was revoked" in told
    assert "north" not in hostile.link.control.registered()
    assert len(hostile.log) == entries, "nothing came in, nothing left"
