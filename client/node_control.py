# SPDX-License-Identifier: Apache-2.0
"""What the commands ask of a running node: stop, its status, leaving the consortium."""

import os
import re
import signal
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..privacy.errors import BadInput, EnvironmentProblem
from .node_settings import NodeSettings
from .run_folder import RunFolder

__all__ = ["leave", "node_status", "status_lines", "stop_node"]

STOP_SECONDS = 15.0
"""Within this a node that abandons its round has ended; then it is killed."""
_KEYS = ("key", "certificate", "certificate_key")
_DUPLICATE = re.compile(r"\[code: (2004|2001)\]|Exit 305|exit.{0,8}305|2004", re.IGNORECASE)


def stop_node(settings: NodeSettings, *, now: bool, within: float) -> str:
    """Stop the node of ``settings``; returns how it ended.

    Args:
        settings: the node's.
        now: abandon the round under way.
        within: seconds to finish it otherwise.

    Raises:
        BadInput: it does not run.
    """
    folder = RunFolder(Path(settings.site.state))
    pid = folder.read("node").get("pid")
    if not folder.is_held("node") or not isinstance(pid, int):
        raise BadInput(f"no node runs on {settings.site.state}")
    if not now:
        _signal(pid, signal.SIGUSR1)
        if _gone(folder, within):
            return "stopped after the task in hand"
    _signal(pid, signal.SIGTERM)
    if _gone(folder, STOP_SECONDS):
        return "stopped; the round under way was abandoned" if not now else "stopped"
    _signal(pid, signal.SIGKILL)  # its children die with it
    if _gone(folder, STOP_SECONDS):
        return f"killed: it did not stop within {STOP_SECONDS:.0f} s"
    raise EnvironmentProblem(f"process {pid} does not end; look at it with ps")


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _gone(folder: RunFolder, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while folder.is_held("node"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def node_status(settings: NodeSettings) -> dict[str, Any]:
    """The node's state, for people and programs."""
    folder = RunFolder(Path(settings.site.state))
    node, runner = folder.read("node"), folder.read("runner")
    alive, serving = folder.is_held("node"), folder.is_held("runner")
    children = node.get("children", {}) if alive else {}
    pause = folder.read_pause()
    status: dict[str, Any] = {
        "site": settings.site.name,
        "running": alive or serving,
        "state": node.get("state", "running") if alive else "running without supervision" if serving else "stopped",
        "paused": pause,
        "uptime_seconds": round(time.time() - node["since"]) if alive and "since" in node else None,
        "pids": {
            "node": node.get("pid") if alive else None,
            "supernode": children.get("supernode", {}).get("pid"),
            "runner": runner.get("pid") if serving else None,
            "training": runner.get("child", {}).get("pid") if serving else None,
        },
        "restarts": {name: max(0, child.get("starts", 1) - 1) for name, child in children.items()},
        "last_message": runner.get("last"),
        "training_held": runner.get("child", {}).get("held", "") if serving else "",
        "walls": runner.get("walls") if serving else None,
        "code": runner.get("integrity") if serving else None,
    }
    status["warnings"] = list(_warnings(status, children, runner))
    return status


def _warnings(status: dict[str, Any], children: dict[str, Any], runner: dict[str, Any]) -> list[str]:
    found = []
    walls = status["walls"]
    if walls and not (walls["network"] and walls["files"]):
        found.append(f"training is not walled in: {walls['why']}; see fedneuro-node doctor")
    if status["code"] and status["code"] != "proven":
        found.append(f"the installed code is not proven: {status['code']}")
    for name, child in children.items():
        if child.get("failures", 0) > 1:
            found.append(f"{name} fails again and again: {child.get('ended', '')[:200]}")
        if _DUPLICATE.search(child.get("ended", "")) and name == "supernode":
            found.append(
                "the coordinator sees another node with this key: is it running elsewhere? (or restarted? wait)"
            )
    if crashes := runner.get("child", {}).get("crashes"):
        found.append(f"the process that trains was replaced {crashes} times; see logs/runner.log")
    return found


def status_lines(status: dict[str, Any]) -> list[str]:
    """The same for people."""
    lines = [f"node       {status['site']}: {status['state']}"]
    if status["uptime_seconds"] is not None:
        lines.append(f"uptime     {status['uptime_seconds'] / 3600:.1f} h")
    if pids := {name: pid for name, pid in status["pids"].items() if pid}:
        lines.append("processes  " + ", ".join(f"{name} {pid}" for name, pid in pids.items()))
    if status["paused"]:
        lines.append(
            f"paused     since {_when(status['paused'].get('since'))} {status['paused'].get('why', '')}".rstrip()
        )
    if held := status["training_held"]:
        lines.append(f"training   holds: {held}")
    if last := status["last_message"]:
        text = f"{last['kind']} of round {last['round']} {last['outcome']} in {last['seconds']} s"
        lines.append(f"last       {text}, {_when(last['at'])}")
    if walls := status["walls"]:
        good = walls["network"] and walls["files"]
        lines.append("sandbox    " + ("no network, data read-only" if good else f"incomplete: {walls['why']}"))
    return [*lines, *(f"warning    {text}" for text in status["warnings"])]


def _when(moment: Any) -> str:
    if not isinstance(moment, int | float):
        return "unknown"
    return datetime.fromtimestamp(moment, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def leave(settings: NodeSettings) -> tuple[Path, list[str]]:
    """Put keys and certificates away, so that the node cannot start again; what must be kept stays.

    Returns:
        the folder they were moved to, and what stays where it is.

    Raises:
        BadInput: the node still runs.
    """
    folder = RunFolder(Path(settings.site.state))
    if folder.is_held("node") or folder.is_held("runner"):
        raise BadInput("the node still runs; fedneuro-node stop ends it")
    keys = [Path(path) for name in _KEYS if (path := getattr(settings.superlink, name))]
    archive = keys[0].parent / f"left-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    archive.mkdir(mode=0o700)
    for path in keys:
        path.replace(archive / path.name)
    state = Path(settings.site.state)
    kept: dict[Path, str] = {
        state / "ledger.db": "the privacy budget that these patients spent, for every later study",
        state / "audit.jsonl": "what came in and what left",
        state / "site.log": "the site's own log",
        Path(settings.site.data): "the data set, untouched",
    }
    return archive, [f"{path}: {what}" for path, what in kept.items() if path.exists()]
