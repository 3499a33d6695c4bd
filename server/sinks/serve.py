# SPDX-License-Identifier: Apache-2.0
"""The process beside a running ``start`` that feeds the sinks; ``start`` looks after it."""

import argparse
import logging
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from ...privacy.errors import FedNeuroError
from ..consortium import Consortium
from ..run_folder import run_folders
from .feed import Feed, open_sinks

__all__ = ["main"]

LOOK_SECONDS = 2.0
_log = logging.getLogger("fedneuro.sinks")


def main() -> int:
    """Feed until stopped; returns the exit code."""
    parser = argparse.ArgumentParser(description="Feed a consortium's runs to MLflow and TensorBoard.")
    parser.add_argument("--home", required=True, type=Path, help="the consortium's folder")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    _log.setLevel(logging.INFO)
    try:
        consortium = Consortium(options.home)
        wanted = consortium.settings.sinks
        sinks = open_sinks(wanted.mlflow, wanted.tensorboard, consortium.folder)
    except FedNeuroError as error:
        _log.error("%s", error)
        return error.exit_code
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    feed = Feed(sinks, lambda: run_folders(consortium.folder / "runs"))
    _log.info("feeding %s", " and ".join(sink.name for sink in sinks))
    with suppress(KeyboardInterrupt):
        while True:
            feed.look()
            time.sleep(LOOK_SECONDS)
    for sink in sinks:
        sink.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
