# SPDX-License-Identifier: Apache-2.0
"""What the documents say holds: commands and options exist, examples are valid, links lead somewhere."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from typer.main import get_command

from fedneuro.privacy.study_file import load_study

ROOT = Path(__file__).parents[1]
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
STUDIES = sorted((ROOT / "simulations" / "studies").glob("*.toml"))
ROOMS = {"sim": "simulations", "node": "client", "server": "server"}
CALL = re.compile(r"fedneuro-(sim|node|server) ([a-z][a-z-]*)([^\n`#]*)")
NOT_OURS = {"and"}  # words of prose behind the name of a command


def calls(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Room, sub-command and options of every command line in a document."""
    for room, command, rest in CALL.findall(path.read_text(encoding="utf-8")):
        if command not in NOT_OURS:
            yield room, command, re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)


def commands(room: str) -> dict[str, set[str]]:
    """Sub-commands and their options, from the command line itself; a group has the options of all in it."""
    app: typer.Typer = importlib.import_module(f"fedneuro.{ROOMS[room]}.cli").app
    group = get_command(app)
    found = getattr(group, "commands", {})
    return {name: options_of(command) for name, command in found.items()}


def options_of(command: Any) -> set[str]:
    """Options of a command and of all below it."""
    below = [options_of(part) for part in getattr(command, "commands", {}).values()]
    return {option for parameter in command.params for option in parameter.opts}.union(*below)


@pytest.mark.parametrize("path", [*MARKDOWN, *STUDIES], ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    known = {room: commands(room) for room in ROOMS}
    for room, command, options in calls(path):
        assert command in known[room], f"fedneuro-{room} {command}"
        assert set(options) <= known[room][command], f"fedneuro-{room} {command} {options}"


def test_the_readme_names_every_command() -> None:
    named = {(room, command) for room, command, _ in calls(ROOT / "README.md")}
    missing = [f"fedneuro-{room} {name}" for room in ROOMS for name in commands(room) if (room, name) not in named]
    # `make demo` is the demo; schema and check are the same in two rooms.
    assert set(missing) <= {"fedneuro-sim demo", "fedneuro-sim schema"}


def test_the_study_of_the_readme_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "study.toml").write_text(block, encoding="utf-8")
    assert load_study(tmp_path / "study.toml").evaluation.heldout == ("HT",)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    """``room/…/name.py`` in running text; placeholders in angle brackets are left alone."""
    names = re.findall(
        r"`((?:client|models|privacy|server|simulations|tests|docs)/[\w./-]+\.\w+)`", path.read_text(encoding="utf-8")
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_make_targets_of_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")]
    named = {
        word
        for text in texts
        for line in re.findall(r"^\$ make ([a-z ]+)", text, re.MULTILINE)
        for word in line.split()
    }
    assert {"demo", "test", "lint", "types", "venv"} <= named <= targets


def test_results_schema_is_a_schema() -> None:
    schema = json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid({"schema_version": 1})
