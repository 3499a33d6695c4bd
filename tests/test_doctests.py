# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs, and says what it says it says."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("client", "models", "privacy", "server", "simulations")


def module_names() -> list[str]:
    """All modules of the five rooms; at the namespace root of an editable install pkgutil would see nothing."""
    names = []
    for room in ROOMS:
        package = importlib.import_module(f"fedneuro.{room}")
        names += [info.name for info in pkgutil.walk_packages(package.__path__, f"fedneuro.{room}.")]
    return sorted(names)


@pytest.mark.parametrize("name", module_names())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_modules_are_those_on_disk_and_some_have_examples() -> None:
    """Guards against a walk that finds nothing."""
    on_disk = {path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")} - {
        Path(room) / "__init__.py" for room in ROOMS
    }
    assert len(module_names()) == len(on_disk)
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = importlib.import_module("fedneuro.privacy.study_words")
    assert any(test.examples for test in finder.find(module))
