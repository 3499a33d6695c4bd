# SPDX-License-Identifier: Apache-2.0
"""Flower's own simulation runtime on Ray: for more cores than one process uses well, or for a cluster.

The same coordinator and the same message form as in a deployment. Ray hands each message to whichever worker
is free, so a site moves between workers; its optimiser, ledger and cache live in its folder and each worker
takes up what it finds there, so the bits are those of the in-process engine.

Flower's simulated nodes have numbers, no names. One question that only this engine's app answers (``who``)
tells which node is which site; it also starts the workers.
"""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ...client.settings import SiteSettings
from ...privacy.errors import EnvironmentProblem, FedNeuroError
from ...privacy.study import Study
from ...server.events import Observer
from ...server.store import RunStore
from .inprocess import default_workers

__all__ = ["run_ray"]

WHO = "query.who"
WHO_SECONDS = 300.0
"""Patience until all workers have imported torch; half a minute on a busy machine."""


class _Interrupted(Exception):
    """The user pressed Ctrl-C; carries it out of Flower's thread."""


def run_ray(
    study: Study, sites: Mapping[str, SiteSettings], store: RunStore, observer: Observer, *, workers: int = 0
) -> None:
    """Run ``study`` on Flower's simulation runtime, to its end or on from where ``store`` stands.

    Args:
        study: the study.
        sites: settings of each simulated hospital.
        store: the run, created or resumed.
        observer: takes the run's events; called in Flower's thread.
        workers: Ray workers; 0: as many as sites and cores allow.

    Raises:
        FedNeuroError: as the run ended.
        EnvironmentProblem: Ray does not start.
    """
    names = sorted(sites)
    count = workers or default_workers(len(sites), study.training.threads)
    stop = threading.Event()
    outcome: list[BaseException] = []

    def coordinate(grid: Any) -> None:
        from ...server.flower_transport import FlowerTransport
        from ...server.rounds import run_study

        def check() -> None:
            if stop.is_set():
                raise _Interrupted

        try:
            nodes = _who(grid, names, check)
            run_study(study, FlowerTransport(grid, lambda _: nodes, check), store, observer)
        except BaseException as error:
            outcome.append(error)
        if stop.is_set():
            _end_ray()  # workers may be in the middle of a long round

    with _quiet(), _ray_folder() as folder, _interrupts(stop):
        try:
            _simulate(coordinate, [sites[name] for name in names], count, folder)
        except Exception as error:
            if not outcome:
                raise EnvironmentProblem(
                    f"Ray does not start or ended early: {error}; use --engine inprocess"
                ) from error
        finally:
            _end_ray()
    if outcome and isinstance(outcome[0], _Interrupted):
        raise KeyboardInterrupt
    if outcome:
        raise outcome[0]


def _simulate(coordinate: Callable[[Any], None], settings: list[SiteSettings], workers: int, folder: Path) -> None:
    """Run Flower's simulation with one node per site."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        coordinate(grid)

    config: dict[str, Any] = {
        "init_args": {
            "address": "local",  # a cluster of our own: never join one that runs on this machine
            "num_cpus": workers,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "_temp_dir": str(folder),
        },
        # One worker per site that computes; torch's own threads are the study's business.
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server_app, _client_app(settings), len(settings), backend_config=config)


def _client_app(settings: list[SiteSettings]) -> Any:
    """An app whose node ``i`` is site ``i``; it is pickled to the workers with the settings in it."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from ...client.app import serve

    app = ClientApp()

    def settings_of(context: Context) -> SiteSettings:
        return settings[int(context.node_config["partition-id"])]

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        content = RecordDict({"site": ConfigRecord({"name": settings_of(context).name})})
        return Message(content, reply_to=message)

    serve(app, lambda context: _site(settings_of(context)))
    return app


_sites: dict[SiteSettings, Any] = {}


def _site(settings: SiteSettings) -> Any:
    """The site as this worker knows it; opened once per worker."""
    from ...client.site import Site

    if settings not in _sites:
        _sites[settings] = Site(settings)
    return _sites[settings]


def _who(grid: Any, names: list[str], check: Callable[[], None]) -> dict[str, int]:
    """Node id of each site.

    Raises:
        EnvironmentProblem: a node does not answer.
    """
    import time

    from flwr.app import Message, RecordDict

    deadline = time.monotonic() + WHO_SECONDS
    while len(nodes := list(grid.get_node_ids())) < len(names):
        check()
        time.sleep(0.05)
    questions = [Message(RecordDict(), node, WHO, ttl=WHO_SECONDS) for node in nodes]
    pending = dict(zip(grid.push_messages(questions), nodes, strict=True))
    found: dict[str, int] = {}
    while pending:
        check()
        if time.monotonic() > deadline:
            text = f"{len(pending)} Ray workers did not start within {WHO_SECONDS:.0f} s"
            raise EnvironmentProblem(f"{text}; use --engine inprocess")
        for message in grid.pull_messages(list(pending)):
            node = pending.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                raise EnvironmentProblem(f"a Ray worker does not start: {message.error.reason}; use --engine inprocess")
            found[str(message.content["site"]["name"])] = node
        time.sleep(0.05)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No telemetry, no deprecation notes, no INFO lines between ours; loopback only."""
    changes = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    changes |= {"RAY_DISABLE_IMPORT_WARNING": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    # Ray takes the machine's public address even where 127.0.0.1 is asked for, but for this switch.
    changes["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    before = {key: os.environ.get(key) for key in [*changes, "PYTHONPATH"]}
    os.environ |= changes
    import flwr.supercore  # noqa: F401 - sets the level of its logger when it is first imported

    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _ray_folder() -> Iterator[Path]:
    """A short path of its own for Ray's sockets and logs, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fn-ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Turn Ctrl-C into ``stop``: Flower's main thread waits where an exception would leave threads behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_ray() -> None:
    """End Ray's processes; a second call does nothing."""
    import ray

    with suppress(FedNeuroError, RuntimeError):
        ray.shutdown()
