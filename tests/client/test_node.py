# SPDX-License-Identifier: Apache-2.0
"""The life of a node: its files, its processes, and what happens when they are killed. Everything is real but the
coordinator, which cannot be reached: a node must live with that too."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from fedneuro.client.canary import rehearse
from fedneuro.client.cli import app
from fedneuro.client.manners import Manners, gpu_neighbours
from fedneuro.client.node_init import Answers, init_node
from fedneuro.client.node_settings import load_node_settings
from fedneuro.client.run_folder import RunFolder
from fedneuro.client.units import unit_text
from fedneuro.privacy.bundle import bundle, bundle_hash
from fedneuro.privacy.contract import Role
from fedneuro.privacy.errors import BadInput
from fedneuro.privacy.identity import make_node_key
from fedneuro.privacy.processes import claim_port
from fedneuro.simulations.certificates import make_certificates
from tests.bids import make_study, write_site

NODE = str(Path(sys.executable).parent / "fedneuro-node")
KILLS = int(os.environ.get("FEDNEURO_CHAOS", "1"))
"""How often each process of the node is killed."""


def enrolled(folder: Path, data: Path) -> Path:
    """A node as after enrolment with a coordinator that is not there."""
    init_node(folder, Answers(name="north", role=Role.TRAIN, public_size=10, data=data, port=claim_port()))
    make_node_key(folder / "node.key")
    (folder / "ca").mkdir()
    shutil.copyfile(make_certificates(folder / "ca").authority, folder / "ca.crt")
    path = folder / "node.toml"
    text = path.read_text().replace("require_record", f'bundle = "{bundle_hash(bundle())}"\nrequire_record')
    text += f'[superlink]\naddress = "127.0.0.1:{claim_port()}"\nroot_certificate = "ca.crt"\nkey = "node.key"\n'
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site(tmp_path_factory.mktemp("data") / "bids", shape=(18, 18, 4))


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    return enrolled(tmp_path / "node", data)


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NODE, *map(str, words)], capture_output=True, text=True, check=False, timeout=120)


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


class Started:
    """A running ``fedneuro-node start``."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.folder = RunFolder(config.parent / "state")
        self.log = (config.parent / "start.log").open("ab")
        self.process = subprocess.Popen([NODE, "start", "--config", str(config)], stderr=self.log)

    def pids(self) -> dict[str, int]:
        """Of everything that lives, once everything does."""
        runner = self.folder.read("runner")
        children = {name: child["pid"] for name, child in self.folder.read("node").get("children", {}).items()}
        found = {"node": self.process.pid, **children, "training": runner.get("child", {}).get("pid")}
        whole = runner.get("pid") == children.get("runner") and all(pid and alive(pid) for pid in found.values())
        return found if whole and self.folder.is_held("runner") else {}


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def replaced(node: Started, name: str, old: int) -> dict[str, int]:
    """The node's processes once ``name`` is another one than ``old``."""
    pids = node.pids()
    return pids if pids and pids[name] != old else {}


@pytest.fixture
def node(config: Path) -> Iterator[Started]:
    node = Started(config)
    yield node
    if node.process.poll() is None:
        node.process.kill()
    node.process.wait()
    node.log.close()


def test_a_nodes_life(node: Started) -> None:
    """One test for many things, since each start loads Flower twice: start, refuse a second, kill, pause, stop."""
    config = node.config
    pids = wait_for(node.pids)
    status = json.loads(call("status", "--config", config, "--json").stdout)
    assert status["running"] and status["pids"] == pids | {"runner": pids["runner"]}
    assert set(status["walls"]) == {"network", "files", "why"}

    second = call("start", "--config", config)
    assert second.returncode == 5 and "runs already" in second.stderr and str(pids["node"]) in second.stderr
    twin = config.parent.parent / "twin"
    shutil.copytree(config.parent, twin, ignore=shutil.ignore_patterns("state"))
    (twin / "state").mkdir()
    twice = call("start", "--config", twin / "node.toml")
    assert twice.returncode == 5 and "a node with this key runs already" in twice.stderr

    for _ in range(KILLS):
        for name in ("runner", "supernode"):
            before = wait_for(node.pids)
            os.kill(before[name], signal.SIGKILL)
            after = wait_for(partial(replaced, node, name, before[name]))
            assert after["node"] == pids["node"]
            if name == "runner":
                assert not alive(before["training"])  # nothing outlives the runner that started it

    assert call("pause", "--config", config, "--why", "maintenance").returncode == 0
    assert "maintenance" in call("status", "--config", config).stdout
    assert call("resume", "--config", config).stdout == "goes on\n"
    everything = wait_for(node.pids)
    left = call("leave", "--yes", "--config", config)
    assert left.returncode == 2 and "still runs" in left.stderr
    stopped = call("stop", "--config", config, "--within", "30")
    assert stopped.returncode == 0 and "after the task in hand" in stopped.stdout, stopped
    assert node.process.wait(10) == 0
    assert not [name for name, pid in everything.items() if alive(pid)]
    assert call("status", "--config", config).returncode == 5
    assert call("stop", "--config", config).returncode == 2

    left = call("leave", "--yes", "--config", config)
    assert left.returncode == 0 and "stays:" in left.stdout
    assert not (config.parent / "node.key").exists()
    assert call("start", "--config", config).returncode == 2


def test_nothing_outlives_a_killed_node(node: Started) -> None:
    pids = wait_for(node.pids)
    node.process.kill()
    node.process.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids.values()), 10)
    assert not node.folder.is_held("node")  # so it can be started again at once


def test_a_port_in_use_and_a_state_folder_that_cannot_be_written(config: Path) -> None:
    settings = load_node_settings(config)
    port, state = settings.runner.port, Path(settings.site.state)
    with socket.create_server(("127.0.0.1", port)):
        taken = call("start", "--config", config)
    assert taken.returncode == 5 and f"error: port {port} of 127.0.0.1 is in use" in taken.stderr
    shutil.rmtree(state)
    state.write_text("no folder")  # not a mode: root may write into any folder
    closed = call("start", "--config", config)
    assert closed.returncode == 5 and "the state folder cannot be written" in closed.stderr
    for done in (taken, closed):
        assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


# -- init ------------------------------------------------------------------------------------------------------------


def test_init_writes_files_that_enrol_completes(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "node"
    words = ["--name", "north", "--public-size", "40", "--data", str(data), "--role", "heldout", "--yes"]
    done = call("init", folder, *words)
    assert done.returncode == 0, done.stderr
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"node.toml": 0o600, "policy.toml": 0o600, "runner.secret": 0o600, "state": 0o700}
    secret = (folder / "runner.secret").read_bytes()
    for command in ("doctor", "start", "status"):
        early = call(command, "--config", folder / "node.toml")
        assert early.returncode == 2 and "fedneuro-node enrol INVITATION" in early.stderr
    again = call("init", folder, *words)
    assert again.returncode == 2 and "--force" in again.stderr
    assert call("init", folder, *words, "--force").returncode == 0
    assert (folder / "node.toml.before").exists() and (folder / "runner.secret").read_bytes() == secret


def test_init_asks_for_what_is_not_given(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "node"
    asked = CliRunner().invoke(app, ["init", str(folder)], input=f"north\n{data}\nmany\n40\n\n")
    assert asked.exit_code == 0 and "is not a valid integer" in asked.output, asked.output
    text = (folder / "node.toml").read_text()
    for line in ('name = "north"', 'role = "train"', "public_size = 40", f'data = "{data}"'):
        assert line in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../north"}, "site.name"),
        ({"public_size": 0}, "site.public_size"),
        ({"data": Path("/nowhere")}, "no such folder"),
        ({"port": 70_000}, "runner.port"),
        ({"epsilon": -1.0}, "budget.epsilon"),
    ],
)
def test_a_wrong_answer_writes_nothing(tmp_path: Path, data: Path, changes: dict[str, Any], says: str) -> None:
    values: dict[str, Any] = {"name": "north", "role": Role.TRAIN, "public_size": 10, "data": data}
    with pytest.raises(BadInput, match=says):
        init_node(tmp_path / "node", Answers(**values | changes))
    assert not (tmp_path / "node").exists()


# -- units, manners --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(config: Path, tmp_path: Path) -> None:
    unit = tmp_path / "fedneuro-node.service"
    text = unit_text("systemd", load_node_settings(config), config)
    unit.write_text(text.replace("User=fedneuro", "User=daemon"))  # a user that this machine has
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if "fedneuro-node" in line]
    assert done.returncode == 0 and ours == [], done.stderr
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=", "Restart=always"):
        assert line in text.splitlines()


@pytest.mark.parametrize("kind", ["compose", "apptainer"])
def test_containers_get_the_data_read_only_and_no_port(config: Path, data: Path, kind: str) -> None:
    text = unit_text(kind, load_node_settings(config), config)
    assert f"{data}:{data}:ro" in text
    assert "{" not in text.replace("${HTTPS_PROXY:-}", "").replace("{HOME", "").split("# deploy")[0]
    assert "ports:" not in text and "--publish" not in text


def test_neighbours_on_the_gpu() -> None:
    said = "812, 5120\n977, 12\n4, 9000\n812, 100\nNo devices were found\n55, [N/A]\n"
    assert gpu_neighbours(said, {4}) == {812: 5120, 55: 256}
    assert gpu_neighbours("", ()) == {}


def test_manners(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.make()
    gpus = ["812, 5120\n"]
    manners = Manners(folder, None, yield_gpu=True, gpus=lambda: gpus[0])
    assert manners.hold() == "process 812 uses the GPU"
    gpus[0] = ""
    manners._looked = float("-inf")
    assert manners.hold() == ""
    folder.pause("")
    assert manners.hold() == "paused by the hospital"
    assert folder.resume() and not folder.resume()
    assert manners.hold() == ""


def test_training_holds_outside_the_hours_of_the_policy(config: Path, tmp_path: Path) -> None:
    from datetime import datetime

    policy = config.parent / "policy.toml"
    policy.write_text(policy.read_text().replace('from = "00:00"', 'from = "20:00"'))
    moment = [datetime(2026, 11, 23, 12, 0).astimezone()]
    manners = Manners(RunFolder(tmp_path), policy, now=lambda: moment[0])
    assert manners.hold() == "outside the hours of the policy"
    moment[0] = datetime(2026, 11, 23, 21, 0).astimezone()
    manners._looked = float("-inf")
    assert manners.hold() == ""


# -- canary ----------------------------------------------------------------------------------------------------------


def test_a_rehearsal_leaves_nothing_behind(config: Path, data: Path) -> None:
    training = {"rounds": 5, "local_steps": 1, "local_epochs": 0, "threads": 1, "device": "cpu"}
    privacy = {"mode": "local", "epsilon": 8.0, "delta": 1e-2, "sample_rate": 0.5, "crops_per_patient": 1}
    study = make_study(training=training, privacy=privacy, evaluation={"bootstrap": 100, "previews": 0})
    lines: list[str] = []
    done = rehearse(load_node_settings(config), study, tell=lines.append)
    assert done.patients == ("sub-P001", "sub-P002") and len(done.seconds) == 1 and done.walls is not None
    assert "round 1: 1 steps" in "".join(lines) and "of a scratch ledger" in "".join(lines)
    state = config.parent / "state"
    assert not (state / "ledger.db").exists() and not (state / "audit.jsonl").exists()
    assert list((state / "run" / "scratch").iterdir()) == []
    assert sorted(path.name for path in data.iterdir())[-1] == "sub-P004"
