# SPDX-License-Identifier: Apache-2.0
"""Programs and packages that a test needs: without one it is skipped, with what is missing; where CI runs it fails."""

import os
import shutil
from importlib.util import find_spec
from typing import NoReturn

import pytest

__all__ = ["lacking", "need_nginx", "need_package"]


def need_nginx() -> None:
    """The coordinator's guard."""
    if shutil.which("nginx") is None:
        lacking("nginx is not installed (apt-get install nginx-light): the guard cannot be tried")


def need_package(name: str, extra: str) -> None:
    """A package that an extra of FedNeuro brings."""
    if find_spec(name) is None:
        lacking(f"{name} is not installed (pip install 'fedneuro[{extra}]')")


def lacking(text: str) -> NoReturn:
    """Skip with this reason, or fail where ``CI=true`` says that everything must be there."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(text)
    pytest.skip(text)
