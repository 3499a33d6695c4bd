# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-server start``: everything that a coordinator runs, kept running until it is told to stop.

    SuperLink   Flower, on 127.0.0.1 only, with TLS, node authentication and process isolation
    server      our ServerApp runner: takes one run at a time, executes installed code only
    guard       nginx, the one way from outside to the SuperLink
    enrolment   in this process, on two ports of its own
    dashboard   a web page for a browser on this machine (:mod:`.dashboard`)
    sinks       feeds MLflow and TensorBoard, where the settings name them (:mod:`.sinks`)

A process that ends is started again: at once if it had lived for a while (the runner ends after each run), otherwise
after 1, 2, 4 … 60 s. What another command changes in the state store (``invite``, ``revoke``) is seen within a
second: the guard's files are written anew, nginx reads them again, and a revoked site's node is unregistered, so
that its next request fails also in the middle of a run. Runs whose process died go on (:mod:`.resumption`). Nothing
outlives this process.
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import httpx

from ..privacy.errors import EnvironmentProblem, FedNeuroError
from ..privacy.identity import write_private
from ..privacy.processes import Processes, claim_port, ending
from ..privacy.upkeep import QUIET_FLOWER, Kept
from .consortium import Consortium, Issuer
from .consortium_settings import Resume
from .control import Control
from .enrolment import Enrolment
from .guard import check_guard, publish, reload_guard
from .launch import runs_of, submit
from .registry import StoreAway
from .resumption import Resumption
from .superlink import SUPERLINK, superlink_arguments

__all__ = ["Supervisor", "serve"]

START_SECONDS = 120.0
LOOK_SECONDS = 0.25
STEADY_SECONDS = 20.0
"""A process that lived this long failed for a new reason."""
LONGEST_PAUSE = 60.0
RUN_CODES = (0, 3, 4)
"""Of the runner: it executed a run, which ended as it did for the study's reasons (refused, quorum lost)."""
CRL_SECONDS = 12 * 3600.0
"""How often the list of revoked certificates is signed anew; it holds for 14 days."""

ENVIRONMENT = {
    **QUIET_FLOWER,
    # glibc's own threshold grows with what is freed, and then models stay in its heap; see mallopt(3).
    "MALLOC_MMAP_THRESHOLD_": "1048576",
}
_log = logging.getLogger("fedneuro.start")


class Supervisor:
    """Starts and looks after the processes of ``consortium``.

    Args:
        consortium: whose; checked with :meth:`Consortium.check_secure`.
        issuer: its unlocked issuing keys.
        processes: who ends the children.
        dashboard: whether the dashboard is one of them.
        resume: which interrupted runs go on by themselves, in place of the setting.
    """

    def __init__(
        self,
        consortium: Consortium,
        issuer: Issuer,
        processes: Processes,
        *,
        dashboard: bool = False,
        resume: Resume | None = None,
    ) -> None:
        from .bundle import bundle, bundle_hash

        self._consortium, self._issuer, self._processes = consortium, issuer, processes
        self.bundle = bundle_hash(bundle())
        self._secret = consortium.folder / "superlink" / "runner.secret"
        self._secret.unlink(missing_ok=True)
        write_private(self._secret, secrets.token_hex(32).encode())
        self._authority = consortium.folder / "ca" / "root.crt"
        self.address = f"127.0.0.1:{consortium.settings.ports.superlink}"
        self.control = Control(self.address, self._authority)
        self._children = [Kept("superlink", self._start_superlink), Kept("server", self._start_server)]
        if consortium.settings.guard.nginx:
            self._children.append(Kept("guard", self._start_guard))
        if dashboard:
            self._children.append(Kept("dashboard", self._start_dashboard))
        if consortium.settings.sinks.any:
            self._children.append(Kept("sinks", self._start_sinks))
        self._resumption = Resumption(
            runs_of(consortium), resume or consortium.settings.runs.resume, self.control,
            lambda folder: submit(consortium, folder), self._note,
        )  # fmt: skip
        self._publishing = threading.Lock()
        self._seen, self._signed, self._answers = -1, 0.0, True

    def start(self) -> None:
        """Start all, and wait until the SuperLink answers.

        Raises:
            EnvironmentProblem: a process does not start.
        """
        self.publish()
        if self._consortium.settings.guard.nginx:
            check_guard(self._consortium)
        for child in self._children:
            child.begin()
        deadline = time.monotonic() + START_SECONDS
        while not self.control.is_healthy():
            for child in self._children:
                if (code := self._processes.code(child.name)) is not None:
                    text = f"{child.name} {ending(code)}: {self._processes.last_line(child.name)}"
                    raise EnvironmentProblem(f"{text} (log: {self._processes.log(child.name)})")
            if time.monotonic() > deadline:
                raise EnvironmentProblem(f"the SuperLink did not answer within {START_SECONDS:.0f} s; see logs/")
            time.sleep(LOOK_SECONDS)
        self.reconcile()

    def look(self) -> None:
        """One look after everything; call it every quarter of a second."""
        for child in self._children:
            self._look_after(child)
        try:
            self._follow()
        except StoreAway as error:
            if self._answers:
                _log.error("%s; until then nobody can enrol, renew or be revoked", error)
            self._answers, self._seen = False, -1
        self._resumption.look()

    def _follow(self) -> None:
        """Do what another command changed in the state store. One that does not answer is asked again: studies go on.

        Raises:
            StoreAway: it does not answer.
        """
        revision = self._consortium.registry.revision
        if not self._answers:
            _log.info("the state store answers again")
            self._answers = True
        if revision != self._seen or time.time() - self._signed > CRL_SECONDS:
            self.publish()
            self.reconcile()

    def publish(self) -> None:
        """Write the guard's files from the state store, and let a running guard read them.

        Enrolment calls this from a thread of its own while :meth:`look` does too: one writes, the other waits.
        """
        with self._publishing:
            self._seen = self._consortium.registry.revision
            publish(self._consortium, self._issuer)
            self._signed = time.time()
            reload_guard(self._consortium)

    def reconcile(self) -> None:
        """Register and unregister nodes until the SuperLink has exactly those that are enrolled."""
        try:
            there = set(self.control.registered().values())
            for site in self._consortium.registry.sites():
                if site.state == "revoked" and site.node_id:
                    if site.node_id in there:
                        self.control.unregister(site.node_id)
                    self._consortium.registry.set_node(site.name, 0)
                    _log.info("%s is revoked: its node is unregistered", site.name)
                elif site.state == "enrolled" and site.node_id not in there:
                    node_id = self.control.register(site.node_key.encode(), site.name)
                    self._consortium.registry.set_node(site.name, node_id)
                    _log.warning("%s was not known to the SuperLink: registered again", site.name)
        except (httpx.HTTPError, FedNeuroError) as error:
            _log.warning("the SuperLink does not answer: %s", error)
            self._seen = -1

    def close(self) -> None:
        """Release the connection to the SuperLink, which waits for open ones when it ends."""
        self.control.close()

    # -- children --------------------------------------------------------------------------------------

    def _look_after(self, child: Kept) -> None:
        if child.again is not None:
            if child.due:
                child.begin()
            return
        if (code := self._processes.code(child.name)) is None:
            return
        self._processes.stop(child.name)  # what it left behind: workers of a killed nginx would hold the port
        ran = child.name == "server" and code in RUN_CODES
        pause = child.put_off(
            lambda failures: min(LONGEST_PAUSE, 2.0 ** (failures - 1)), steady=STEADY_SECONDS, fine=ran or code == 0
        )
        if not ran:
            line = self._processes.last_line(child.name)
            _log.warning("%s %s; again in %.0f s: %s", child.name, ending(code), pause, line)
            self._note("restarted", f"{child.name} {ending(code)}")

    def _note(self, kind: str, text: str) -> None:
        """Save an event; the log has it where the state store does not answer."""
        with suppress(EnvironmentProblem):
            self._consortium.registry.note(kind, text=text)

    def _start_superlink(self) -> None:
        tls, home = self._consortium.folder / "tls", self._consortium.folder / "superlink"
        arguments = superlink_arguments(
            self.address, home / "superlink.db", authority=self._authority,
            certificate=tls / "server.crt", key=tls / "server.key", secret=self._secret,
        )  # fmt: skip
        self._processes.start("superlink", SUPERLINK, arguments, {"FLWR_HOME": str(home / "home")})

    def _start_server(self) -> None:
        arguments = ["--superlink", self.address, "--root-certificate", str(self._authority)]
        arguments += ["--secret", str(self._secret), "--bundle", self.bundle]
        home = {"FLWR_HOME": str(self._consortium.folder / "superlink" / "home")}
        self._processes.start("server", "fedneuro.server.runner:main", arguments, home)

    def _start_dashboard(self) -> None:
        arguments = ["--home", str(self._consortium.folder)]
        # What browsers reach needs no passphrase.
        unsaid: dict[str, str] = dict.fromkeys(("FEDNEURO_PASSPHRASE", "FEDNEURO_ROOT_PASSPHRASE"), "")
        self._processes.start("dashboard", "fedneuro.server.dashboard.serve:main", arguments, unsaid)

    def _start_sinks(self) -> None:
        unsaid: dict[str, str] = dict.fromkeys(("FEDNEURO_PASSPHRASE", "FEDNEURO_ROOT_PASSPHRASE"), "")
        self._processes.start(
            "sinks", "fedneuro.server.sinks.serve:main", ["--home", str(self._consortium.folder)], unsaid
        )

    def _start_guard(self) -> None:
        folder, program = self._consortium.folder / "guard", self._consortium.settings.guard.nginx
        path = shutil.which(program) or program
        command = [path, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        self._processes.start_program("guard", command)


def serve(
    consortium: Consortium,
    issuer: Issuer,
    ready: Callable[[Supervisor], None],
    *,
    dashboard: bool = False,
    resume: Resume | None = None,
) -> None:
    """Run everything until interrupted; ``ready`` is called once, when hospitals can enrol.

    Raises:
        Refused: a setting or file is not safe, or a dashboard beyond this machine has no password.
        EnvironmentProblem: a port is in use, a program is missing, a process does not start.
    """
    from .enrolment_service import EnrolmentService

    consortium.check_secure()
    settings = consortium.settings
    for port in (settings.ports.superlink, settings.ports.guard, settings.ports.enrolment, settings.ports.renewal):
        claim_port(port)
    if dashboard:
        from .dashboard.serve import check_open

        check_open(settings.dashboard.listen, consortium, consortium.folder)
        try:
            claim_port(settings.dashboard.port)
        except EnvironmentProblem as error:
            where = f"[dashboard] in {consortium.folder / 'server.toml'}"
            raise EnvironmentProblem(f"{error} as port of {where}, or --no-dashboard") from error
    if settings.sinks.any:
        from .sinks import need_packages

        need_packages(settings.sinks.mlflow, settings.sinks.tensorboard)
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # children are new programs; gRPC need not follow a fork
    os.umask(0o077)  # Flower's database holds pending updates
    with ExitStack() as stack:
        processes = stack.enter_context(Processes(consortium.folder / "logs", ENVIRONMENT))
        supervisor = Supervisor(consortium, issuer, processes, dashboard=dashboard, resume=resume)
        stack.callback(supervisor.close)
        supervisor.start()
        enrolment = Enrolment(consortium, issuer, supervisor.control, supervisor.bundle, supervisor.publish)
        stack.enter_context(EnrolmentService(consortium, enrolment))
        consortium.registry.note("started")
        ready(supervisor)
        with suppress(KeyboardInterrupt):
            while True:
                supervisor.look()
                time.sleep(LOOK_SECONDS)
        _log.info("stopping")
