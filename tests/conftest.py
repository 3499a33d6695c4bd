# SPDX-License-Identifier: Apache-2.0
"""What all tests share: fixed seeds, no screen, no calls home, and where real scans are."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).parents[1]

os.environ.setdefault("MPLBACKEND", "Agg")
# Flower reports its use and asks for updates; tests, like every deployment of ours, do neither.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

# A shell that starts tests in the background has them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fedneuro", derandomize=True, deadline=None)
settings.load_profile("fedneuro")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans; tests that need it are skipped where it is absent. Mark them ``real``."""
    path = Path(os.environ.get("FEDNEURO_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real scans: {path} is not there (FEDNEURO_DATA names another folder)")
    return path


@pytest.fixture
def alone_with_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One test with Ray at a time on this machine: they look for what Ray leaves behind, by process name."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield
