# SPDX-License-Identifier: Apache-2.0
"""Defences switched off one at a time, in a copy of the source, to see that a test of each fails then.

A test that passes without its defence proves nothing. The lists are ``tests/client/defences.py`` and
``tests/server/defences.py``; ``test_defences.py`` beside each keeps list, source and docs/threats.md together. Tests
run :func:`forked` (what our code imports is loaded once; each defence gets a process that begins with it, and loads our
code from the copy), or, where they start many processes themselves, :func:`anew`.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["ROOT", "Defence", "anew", "forked", "main", "stands", "table"]

ROOT = Path(__file__).parents[1]
_ROOMS = ("client", "models", "privacy", "server", "simulations")
_LOADED_ONCE = (
    "pytest", "torch", "monai.networks.nets", "nibabel", "scipy.stats", "dp_accounting", "grpc", "httpx", "uvicorn",
    "flwr.serverapp", "flwr.supernode.main", "flwr.supernode.start_client_internal", "pydantic", "typer", "tomlkit",
)  # fmt: skip
_FINDER = """
import importlib.machinery, importlib.util, sys
ROOT, ROOMS = {root!r}, {rooms!r}
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        parts = name.split(".")
        if parts[0] == "fedneuro" and len(parts) == 2 and parts[1] in ROOMS:
            place = ROOT + "/" + parts[1]
            return importlib.util.spec_from_file_location(
                name, place + "/__init__.py", submodule_search_locations=[place]
            )
sys.meta_path.insert(0, Finder)
"""

Run = Callable[[Path, list[str]], tuple[int, str]]
"""Runs tests, named from the root of the copy, with the copy's code; pytest's exit code, and what it said."""


class Defence(Protocol):
    """What a list says of a defence."""

    @property
    def tests(self) -> tuple[str, ...]:
        """In the folder of the list; at least one fails without it."""
        ...

    @property
    def changes(self) -> tuple[tuple[str, str, str], ...]:
        """File, text that stands there once, and what stands there without the defence."""
        ...


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]], defences: Mapping[str, Defence]) -> Iterator[str]:
    """Lines of docs/threats.md: the cells of each defence, then its tests."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for name, cells in rows.items():
        tests = (test.replace(".py::test_", ": ").removeprefix("test_") for test in defences[name].tests)
        yield f"| {' | '.join(cells)} | {', '.join(f'`{test}`' for test in tests)} |"


def stands(defence: Defence, folder: str) -> None:
    """Assert that what the list says of a defence is so; its tests are in ``tests/folder``."""
    for file, old, new in defence.changes:
        assert old != new and (ROOT / file).read_text(encoding="utf-8").count(old) == 1, f"{file}: {old!r}"
    for test in defence.tests:
        file, _, function = test.partition("::")
        text = (ROOT / "tests" / folder / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), test


def main(names: Sequence[str], defences: Mapping[str, Defence], folder: str, run: Run) -> int:
    """Try the defences of these names, or all; 0 where each of them is needed."""
    useless = 0
    with tempfile.TemporaryDirectory(prefix="fn-defences-") as place:
        copy = Path(place)
        for room in (*_ROOMS, "tests"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
        (copy / "finder").mkdir()
        for module in ("sitecustomize", "finder_of_the_copy"):  # for processes that a test starts, and for ours
            (copy / "finder" / f"{module}.py").write_text(_FINDER.format(root=str(copy), rooms=_ROOMS))
        for name in names or defences:
            failed = _fails_without(defences[name], copy, folder, run)
            print(f"{name}: {failed or 'NOTHING FAILS'}", flush=True)
            useless += not failed
    return bool(useless)


def _fails_without(defence: Defence, copy: Path, folder: str, run: Run) -> str:
    """Switch one defence off in ``copy``, run its tests, put it back; what failed."""
    before = dict[Path, str]()
    for file, old, new in defence.changes:
        text = (copy / file).read_text(encoding="utf-8")
        before.setdefault(copy / file, text)
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    code, said = run(copy, [f"tests/{folder}/{test}" for test in defence.tests])
    for path, text in before.items():
        path.write_text(text, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", said, re.MULTILINE)
    return ", ".join(failed) if code == 1 else "" if code == 0 else f"ended with {code}\n{said}"


def anew(copy: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests in a new process."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:warnings", *tests]
    env = {**os.environ, "PYTHONPATH": str(copy / "finder"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, env=env)
    return done.returncode, done.stdout + done.stderr


def forked(copy: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests in a fork of this process, in which everything but our code is loaded already."""
    for module in _LOADED_ONCE:
        importlib.import_module(module)
    said = copy / "said.txt"
    said.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _become(copy, tests, said)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, said.read_text(encoding="utf-8")


def _become(copy: Path, tests: list[str], said: Path) -> None:
    """Run tests with the code of ``copy``; does not return."""
    code = 70
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(copy)
        os.environ.update({"PYTHONPATH": str(copy / "finder"), "PYTHONDONTWRITEBYTECODE": "1"})
        sys.dont_write_bytecode = True
        for loaded in [found for found in sys.modules if found.split(".")[0] in ("tests", "fedneuro")]:
            del sys.modules[loaded]
        sys.path[:0] = [str(copy), str(copy / "finder")]
        importlib.import_module("finder_of_the_copy")
        code = int(importlib.import_module("pytest").main(["-q", "--tb=no", "-p", "no:cacheprovider", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)
