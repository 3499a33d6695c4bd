# SPDX-License-Identifier: Apache-2.0
"""What is built, installed and sent is what we mean: the wheel, the console commands, the Flower bundle."""

import hashlib
import importlib
import io
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("client", "models", "privacy", "server", "simulations")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel that is built from a copy, so that no left-over of an earlier build can slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for room in (*ROOMS, "tests"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_listed_packages_are_those_on_disk(project: dict[str, Any]) -> None:
    """A new sub-package that is not listed works in an editable install and is missing from the wheel."""
    paths = [path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    on_disk = sorted(".".join(("fedneuro", *path.parts)) for path in paths)
    assert sorted(project["tool"]["setuptools"]["packages"]) == on_disk


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_typed(room: str) -> None:
    assert (ROOT / room / "py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_checkers_find_the_rooms(room: str) -> None:
    assert (ROOT / ".typing" / "fedneuro" / room).samefile(ROOT / room)


def test_wheel_holds_fedneuro_and_nothing_else(wheel_names: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_names}
    assert tops == {"fedneuro", f"fedneuro-{metadata.version('fedneuro')}.dist-info"}
    assert not [name for name in wheel_names if "test" in name.lower()]


def test_wheel_holds_every_module_and_data_file(wheel_names: list[str]) -> None:
    wanted = {path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    wanted |= {ROOT / room / "py.typed" for room in ROOMS}
    wanted |= {*(ROOT / "server" / "templates").glob("*.html"), *(ROOT / "simulations" / "studies").glob("*.toml")}
    wanted |= {path for name in ("templates", "static") for path in (ROOT / "server" / "dashboard" / name).iterdir()}
    assert {f"fedneuro/{path.relative_to(ROOT).as_posix()}" for path in wanted} <= set(wheel_names)
    assert len([name for name in wheel_names if name.endswith(".toml")]) >= 3


def test_console_commands_can_be_imported(project: dict[str, Any]) -> None:
    assert sorted(project["project"]["scripts"]) == ["fedneuro-node", "fedneuro-server", "fedneuro-sim"]
    for target in project["project"]["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_version_comes_from_the_metadata(project: dict[str, Any]) -> None:
    assert metadata.version("fedneuro") == project["project"]["version"]


def test_changelog_and_citation_name_the_version(project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_constraints_pin_every_direct_dependency(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if line.count("==") != 1 or "/" in line] == []
    pinned = {_normal(line.partition("==")[0]) for line in pins}
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    names = {_normal(requirement) for requirement in wanted} - {"setuptools"}  # which pip freeze leaves out
    assert names - pinned == set()


def _normal(requirement: str) -> str:
    """The distribution's name in ``requirement``, normalised."""
    name = requirement.lower().replace("_", "-")
    for end in "[<>=!~; ":
        name = name.partition(end)[0]
    return name


def test_licence_is_the_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_flower_bundle_is_thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hospitals run the wheel that they installed: the bundle that travels holds no code."""
    from flwr.cli.build import build_fab_from_files

    monkeypatch.chdir(ROOT)
    files = {name: ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore")}
    files |= {path.relative_to(ROOT).as_posix(): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    bundle, _ = build_fab_from_files(files)
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info/")}
    assert names == {"pyproject.toml", "README.md"}
