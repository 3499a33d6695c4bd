# SPDX-License-Identifier: Apache-2.0
"""The coordinator's own runner: takes one run from the SuperLink and executes the installed ServerApp.

``python -m fedneuro.server.runner`` stands in place of Flower's executor beside a SuperLink that was started with
``--isolation process`` and a shared secret. As at the hospitals, the bundle is compared with one hash and never
unpacked, so a run that someone else submitted executes nothing here. It imports torch while the rest of a
deployment starts, takes one task, and exits with the code of the run (see :mod:`fedneuro.privacy.errors`).
"""

import argparse
import logging
import signal
import sys
import time
from pathlib import Path

import httpx
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, fab_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from ..privacy.errors import FedNeuroError, Refused
from ..privacy.flower_tasks import TaskSource, heartbeat, quicken_transfers
from ..privacy.pace import Pace
from .app import app

__all__ = ["execute", "main", "take_task"]

RETRY_SECONDS = 60.0
"""How long the Grid tries to reach a SuperLink that does not answer."""

_log = logging.getLogger("fedneuro.server")


def take_task(source: TaskSource) -> str:
    """Wait for a run and return its token."""
    pace = Pace(longest=0.25)
    while not (token := source.acquire()):
        time.sleep(pace.pause())
    return token


def execute(source: TaskSource, token: str, bundle: str) -> None:
    """Execute the run of ``token``.

    Raises:
        Refused: the run's bundle is not the one with hash ``bundle``.
        FedNeuroError: as the run ended.
    """
    client = source.task_client(token)
    status, details = SubStatus.FAILED, "the run was interrupted"
    try:
        with heartbeat(client):
            _execute(source, client, token, bundle)
        status, details = SubStatus.COMPLETED, ""
    except FedNeuroError as error:
        details = str(error)
        raise
    finally:
        _report(client, status, details)
        client.close()


def _execute(source: TaskSource, client: RuntimeHttpClient, token: str, bundle: str) -> None:
    task = client.PullTaskInput(PullTaskInputRequest())
    # Flower's Message takes the ids of its sender from here.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        task.run.run_id,
        task.context.node_id,
    )
    run, fab, context = run_from_proto(task.run), fab_from_proto(task.fab), context_from_proto(task.context)
    if fab.hash_str != bundle:
        raise Refused(f"run {run.run_id} brings bundle {fab.hash_str[:12]}; this coordinator runs {bundle[:12]} only")
    context.run_config = get_fused_config_from_fab(fab.content, run)
    grid = HttpGrid(source.address, source.root is None, source.root, token=token)
    grid._retry_invoker.max_time = RETRY_SECONDS
    grid.set_run(run)
    try:
        app(grid, context)
    finally:
        grid.close()


def _report(client: RuntimeHttpClient, status: str, details: str) -> None:
    try:
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
    except httpx.HTTPError as error:
        _log.warning("the SuperLink did not take the outcome: %s", error)


def main() -> int:
    """Take one run and execute it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Execute one run with the installed ServerApp.")
    parser.add_argument("--superlink", required=True, help="host:port of the SuperLink")
    parser.add_argument("--root-certificate", required=True, type=Path, help="PEM file that vouches for it")
    parser.add_argument("--secret", required=True, type=Path, help="file of the shared secret")
    parser.add_argument("--bundle", required=True, help="SHA-256 of the only bundle that is executed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quicken_transfers()
    source = TaskSource(options.superlink, "flwr-serverapp", options.secret, options.root_certificate)
    try:
        execute(source, take_task(source), options.bundle)
    except KeyboardInterrupt:
        _log.info("stopped")
        return 1
    except FedNeuroError as error:
        _log.error("%s", error)
        return error.exit_code
    finally:
        source.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
