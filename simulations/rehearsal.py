# SPDX-License-Identifier: Apache-2.0
"""A real Flower deployment on this machine, for one study, from certificates to the last process ended.

    1. certificates, one key per node, shared secrets, a ``node.toml`` per hospital (``OUT/deployment``)
    2. SuperLink with TLS, node authentication and SQLite; the coordinator's runner; each hospital's runner
    3. every node's key is registered under the hospital's name, then the SuperNodes start and come online
    4. the thin bundle is submitted; the run is followed through its saved events
    5. a SuperNode or runner that dies is named and unregistered, so the study does not wait for it
    6. everything that was started is ended, whatever happened

Everything listens on 127.0.0.1 only. Nothing of it is emulated: the same processes, with other addresses, are a
deployment over several machines.
"""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ..client.settings import SiteSettings
from ..privacy import errors
from ..privacy.errors import EnvironmentProblem, FedNeuroError
from ..privacy.secagg.keys import fingerprint, identity_of_pem
from ..privacy.study import Study
from ..privacy.upkeep import QUIET_FLOWER
from ..server.bundle import bundle, bundle_hash
from ..server.events import Event, Observer, ignore
from ..server.store import RunStore
from ..server.superlink import SUPERLINK, superlink_arguments
from .certificates import Certificates, make_certificates, make_node_key, write_private
from .control import Control
from .processes import Processes, claim_port, ending

__all__ = ["rehearse"]

START_SECONDS = 180.0
"""Patience until the SuperLink answers, and again until all nodes are online; imports are slow on a busy machine."""
LOOK_SECONDS = 0.1


def rehearse(
    study: Study, sites: Mapping[str, SiteSettings], store: RunStore, observer: Observer = ignore, *, port: int = 0
) -> None:
    """Run ``study`` over a real deployment on 127.0.0.1, to its end or on from where ``store`` stands.

    Args:
        study: the study.
        sites: settings of each hospital's node.
        store: the run, created or resumed; the coordinator's process writes it, this one follows.
        observer: takes the run's events as they are saved.
        port: the SuperLink's port; 0 takes a free one.

    Raises:
        EnvironmentProblem: the port is in use, or a process did not start.
        FedNeuroError: as the run ended.
    """
    folder = store.out / "deployment"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    address = f"127.0.0.1:{claim_port(port)}"
    coordinator = folder / "superlink"
    coordinator.mkdir(mode=0o700)
    files = make_certificates(coordinator)
    # The control connection closes first: the SuperLink waits for open connections when it ends.
    with Processes(folder / "logs", QUIET_FLOWER) as processes, closing(Control(address, files.authority)) as control:
        _Rehearsal(study, dict(sites), store, observer, folder, address, files, processes, control).run()


@dataclass(slots=True)
class _Node:
    """One hospital's node."""

    settings: SiteSettings
    folder: Path
    port: int
    node_id: int = 0
    lost: str = ""

    @property
    def processes(self) -> dict[str, str]:
        """Name of each of its processes, and what it is."""
        name = self.settings.name
        return {f"supernode-{name}": "SuperNode", f"runner-{name}": "runner"}


@dataclass(slots=True)
class _Rehearsal:
    """The steps of :func:`rehearse`."""

    study: Study
    sites: dict[str, SiteSettings]
    store: RunStore
    observer: Observer
    folder: Path
    address: str
    files: Certificates
    processes: Processes
    control: Control
    nodes: list[_Node] = field(default_factory=list)
    content: bytes = field(default_factory=bundle)
    seen: int = 0
    round: int = 0
    failed: Event | None = None

    def run(self) -> None:
        self.seen = max((number for number, _ in self.store.events()), default=0)
        self._start_coordinator()
        keys = [self._prepare_node(settings) for _, settings in sorted(self.sites.items())]
        for node in self.nodes:
            self._start_runner(node, keys)
        self._wait("the SuperLink did not start", self.control.is_healthy, ["superlink"])
        for node, key in zip(self.nodes, keys, strict=True):
            node.node_id = self.control.register(key, node.settings.name)
            self._start_supernode(node)
        self._wait("not all nodes came online", self._all_online, [f"supernode-{n.settings.name}" for n in self.nodes])
        study = self.folder / "study.json"
        study.write_bytes(self.study.canonical)
        self.control.start_run(self.content, {"study": str(study.resolve()), "out": str(self.store.out.resolve())})
        self._follow()

    # -- steps 1 to 3 ----------------------------------------------------------------------------------

    def _start_coordinator(self) -> None:
        folder, files = self.folder / "superlink", self.files
        secret = folder / "runner.secret"
        write_private(secret, secrets.token_hex(32).encode())
        superlink = superlink_arguments(
            self.address, folder / "superlink.db", authority=files.authority, certificate=files.server,
            key=files.server_key, secret=secret,
        )  # fmt: skip
        home = {"FLWR_HOME": str(folder / "home")}
        self.processes.start("superlink", SUPERLINK, superlink, home)
        server = ["--superlink", self.address, "--root-certificate", str(files.authority)]
        server += ["--secret", str(secret), "--bundle", bundle_hash(self.content)]
        self.processes.start("server", "fedneuro.server.runner:main", server, home)

    def _prepare_node(self, settings: SiteSettings) -> bytes:
        """Make a hospital's folder and keys; returns the public key of its node."""
        node = _Node(settings, self.folder / "nodes" / settings.name, claim_port())
        node.folder.mkdir(parents=True, mode=0o700)
        key = make_node_key(node.folder / "node.key")
        write_private(node.folder / "runner.secret", secrets.token_hex(32).encode())
        shutil.copyfile(self.files.authority, node.folder / "ca.crt")
        self.nodes.append(node)
        return key

    def _start_runner(self, node: _Node, keys: list[bytes]) -> None:
        """Write a hospital's settings, in which it knows the others by their keys, and start its runner."""
        peers = {
            other.settings.name: fingerprint(identity_of_pem(key)) for other, key in zip(self.nodes, keys, strict=True)
        }
        text = self._node_toml(node)
        text += "".join(f'\n[[peer]]\nname = "{name}"\nkey = "{key}"\n' for name, key in peers.items())
        (node.folder / "node.toml").write_text(text, encoding="utf-8")
        node.settings.state.mkdir(parents=True, exist_ok=True)
        arguments = ["run", "--config", str(node.folder / "node.toml")]
        self.processes.start(f"runner-{node.settings.name}", "fedneuro.client.cli:main", arguments)

    def _node_toml(self, node: _Node) -> str:
        settings = node.settings
        parts: dict[str, dict[str, Any]] = {
            "site": {
                "name": settings.name,
                "role": settings.role.value,
                "public_size": settings.public_size,
                "data": str(settings.data.resolve()),
                "state": str(settings.state.resolve()),
                **({"cache": str(settings.cache.resolve())} if settings.cache else {}),
            },
            "study": {"approved": [self.study.hash]},
            "budget": {
                "dataset": settings.dataset,
                "epsilon": settings.lifetime.epsilon if settings.lifetime else "unlimited",
                "delta": settings.lifetime.delta if settings.lifetime else 0.0,
                "min_patients": settings.min_patients,
            },
            "superlink": {"address": self.address, "root_certificate": "ca.crt", "key": "node.key"},
            "runner": {"port": node.port, "secret": "runner.secret", "bundle": bundle_hash(self.content)},
        }
        # JSON's texts, numbers and lists are TOML's too.
        tables = (
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in part.items())
            for name, part in parts.items()
        )
        return "\n".join(tables)

    def _start_supernode(self, node: _Node) -> None:
        arguments = ["--superlink", self.address, "--root-certificates", str(node.folder / "ca.crt")]
        arguments += ["--auth-supernode-private-key", str(node.folder / "node.key")]
        arguments += ["--host", "127.0.0.1", "--port", str(node.port)]
        arguments += ["--isolation", "process", "--superexec-auth-secret-file", str(node.folder / "runner.secret")]
        home = {"FLWR_HOME": str(node.folder / "home")}
        self.processes.start(f"supernode-{node.settings.name}", "fedneuro.client.supernode:main", arguments, home)

    def _all_online(self) -> bool:
        return self.control.online() >= {node.settings.name for node in self.nodes}

    def _wait(self, failure: str, done: Callable[[], bool], names: list[str]) -> None:
        """Wait until ``done``; the named processes must stay alive meanwhile."""
        deadline = time.monotonic() + START_SECONDS
        names = [*names, "superlink", "server", *(f"runner-{n.settings.name}" for n in self.nodes)]
        while not done():
            for name in names:
                if (code := self.processes.code(name)) is not None:
                    text = f"{failure}: {name} {ending(code)}: {self.processes.last_line(name)}"
                    raise EnvironmentProblem(f"{text} (log: {self.processes.log(name)})")
            if time.monotonic() > deadline:
                text = f"{failure} within {START_SECONDS:.0f} s"
                raise EnvironmentProblem(f"{text}; see the logs in {self.folder / 'logs'}")
            time.sleep(LOOK_SECONDS)

    # -- steps 4 and 5 ---------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Pass events on until the coordinator's process has ended.

        Raises:
            FedNeuroError: as the run ended.
        """
        while (code := self.processes.code("server")) is None:
            self._pass_events()
            self._look_after_nodes()
            if (ended := self.processes.code("superlink")) is not None:
                text = f"the SuperLink {ending(ended)}: {self.processes.last_line('superlink')}"
                raise EnvironmentProblem(f"{text}; add --resume to go on (log: {self.processes.log('superlink')})")
            time.sleep(LOOK_SECONDS)
        self._pass_events()
        if self.failed is not None:
            raise self._error(self.failed)
        if code:
            text = f"the coordinator's process {ending(code)}: {self.processes.last_line('server')}"
            raise EnvironmentProblem(f"{text}; add --resume to go on (log: {self.processes.log('server')})")

    def _pass_events(self) -> None:
        for number, event in self.store.events(self.seen):
            self.seen, self.round = number, event.round or self.round
            if event.kind == "failed":
                self.failed = event
            self.observer(event)

    def _look_after_nodes(self) -> None:
        """Name a node that died, end its other half and tell the SuperLink, which would notice after a minute."""
        for node in self.nodes:
            dead = [(name, code) for name in node.processes if (code := self.processes.code(name)) is not None]
            if not dead or node.lost:
                continue
            name, code = dead[0]
            node.lost = f"its {node.processes[name]} {ending(code)} (log: {self.processes.log(name)})"
            with suppress(httpx.HTTPError):  # a SuperLink that is gone is named by the caller
                self.control.unregister(node.node_id)
            self.processes.stop(*node.processes)
            values = {"reason": errors.Reason.LOST.value, "during": node.lost}
            self.observer(Event(kind="refused", round=self.round, site=node.settings.name, values=values))

    def _error(self, failed: Event) -> FedNeuroError:
        """The error with which the coordinator ended, with what is known here about lost nodes."""
        kind = getattr(errors, str(failed.values["error"]), FedNeuroError)
        lost = "".join(f"; {node.settings.name}: {node.lost}" for node in self.nodes if node.lost)
        error: FedNeuroError = kind(f"{failed.values['message']}{lost}")
        return error
