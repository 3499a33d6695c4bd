# SPDX-License-Identifier: Apache-2.0
"""What all tests share: fixed seeds, no screen, no calls home, and where real scans are."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

os.environ.setdefault("MPLBACKEND", "Agg")
# Flower reports its use and asks for updates; tests, like every deployment of ours, do neither.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

settings.register_profile("fedneuro", derandomize=True, deadline=None)
settings.load_profile("fedneuro")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans; tests that need it are skipped where it is absent. Mark them ``real``."""
    path = Path(os.environ.get("FEDNEURO_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real scans: {path} is not there (FEDNEURO_DATA names another folder)")
    return path
