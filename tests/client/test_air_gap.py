# SPDX-License-Identifier: Apache-2.0
"""The wheelhouse, an installation from it without any index, and the proof that what runs is what was installed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from fedneuro.client.air_gap import closure, make_wheelhouse
from fedneuro.client.integrity import _lies_in, check_integrity
from fedneuro.privacy.errors import BadInput

ROOT = Path(__file__).parents[2]
CHECK = """
import json, sys
sys.path[:0] = sys.argv[1:]
from dataclasses import asdict
from fedneuro.client.integrity import check_integrity
print(json.dumps(asdict(check_integrity())))
"""


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedNeuro's own wheel; its dependencies are 3 GB. Built from a copy: building writes beside the source."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for room in ("client", "models", "privacy", "server", "simulations"):
        shutil.copytree(ROOT / room, source / room, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(built), str(source)], check=True, capture_output=True)
    out = tmp_path_factory.mktemp("wheelhouse")
    make_wheelhouse(out, dependencies=False, wheel=next(built.glob("*.whl")))
    return out


@pytest.fixture(scope="module")
def installed(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", str(wheelhouse), "--no-deps"]
    command += ["--require-hashes", "-r", str(wheelhouse / "requirements.txt"), "--target", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def found(*path: Path, cwd: Path | None = None) -> dict[str, object]:
    command = [sys.executable, "-I", "-c", CHECK, *map(str, path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd or "/")
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_the_wheelhouse_says_what_it_holds(wheelhouse: Path) -> None:
    lines = [line.split("  ") for line in (wheelhouse / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} | {"SHA256SUMS"} == {path.name for path in wheelhouse.iterdir()}
    for digest, name in lines:
        assert hashlib.sha256((wheelhouse / name).read_bytes()).hexdigest() == digest
    sbom = json.loads((wheelhouse / "sbom.cdx.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    own = sbom["metadata"]["component"]
    assert own["purl"] == f"pkg:pypi/fedneuro@{version('fedneuro')}" and own["hashes"][0]["alg"] == "SHA-256"
    named = {component["name"]: component for component in sbom["components"]}
    assert {"torch", "monai", "flwr", "cryptography"} <= set(named)
    assert named["torch"]["version"] == version("torch")
    references = [component["bom-ref"] for component in [own, *sbom["components"]]]
    assert len(set(references)) == len(references)
    for entry in sbom["dependencies"]:
        assert entry["ref"] in references and set(entry["dependsOn"]) <= set(references)


def test_the_closure_follows_extras_and_leaves_tools_out() -> None:
    names = set(closure())
    assert {"ray", "numpy", "pydantic-core"} <= names  # ray by flwr[simulation], pydantic-core by pydantic
    assert not {"pytest", "ruff", "mypy"} & names


def test_a_folder_in_use_and_a_foreign_wheel_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        make_wheelhouse(tmp_path)
    for name in ("torch-2.0.0-py3-none-any.whl", "fedneuro.zip"):
        wheel = tmp_path / name
        wheel.write_bytes(b"x")
        with pytest.raises(BadInput, match="wheel"):
            make_wheelhouse(tmp_path / "out" / name, dependencies=False, wheel=wheel)


def test_an_installation_is_proven(installed: Path) -> None:
    assert found(installed) == {"proven": True, "faults": [], "note": ""}


def _change(target: Path) -> None:
    path = target / "fedneuro/client/gate.py"
    path.write_text(path.read_text() + "# one comment\n")


def _remove(target: Path) -> None:
    (target / "fedneuro/server/report.py").unlink()


def _add(target: Path) -> None:
    (target / "fedneuro/client/extra.py").write_text("x = 1\n")


@pytest.mark.parametrize(
    ("change", "says"), [(_change, "is not the file"), (_remove, "is missing"), (_add, "was not installed")]
)
def test_a_changed_installation_is_refused(
    installed: Path, tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    target = tmp_path / "site-packages"
    shutil.copytree(installed, target, ignore=shutil.ignore_patterns("__pycache__"))
    change(target)
    result = found(target)
    assert result["proven"] is False and says in str(result["faults"])


def test_a_shadowing_package_is_seen(installed: Path, tmp_path: Path) -> None:
    """A folder of the same name in front: what Flower does with a bundle that brings its own code."""
    shutil.copytree(installed / "fedneuro", tmp_path / "bundle" / "fedneuro")
    result = found(tmp_path / "bundle", installed)
    assert "was loaded from" in str(result["faults"])
    assert "the current folder" in str(found(Path(), installed, cwd=tmp_path)["faults"])


def test_a_sitecustomize_from_elsewhere_is_seen(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("")
    code = f"import sys; sys.argv[1:] = [{str(installed)!r}]\n{CHECK}"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "sitecustomize.py runs before everything else" in done.stdout


def test_an_editable_installation_is_not_called_proven() -> None:
    mine = check_integrity()
    assert not mine.proven and "editable" in mine.note


def test_a_sitecustomize_that_the_distribution_linked_is_its_own(tmp_path: Path) -> None:
    """As Debian's does, from /usr/lib to /etc: every Python of Debian and Ubuntu has it."""
    places = [tmp_path / "lib"]
    for name in ("etc", "lib"):
        (tmp_path / name).mkdir()
    (tmp_path / "etc" / "sitecustomize.py").touch()
    (tmp_path / "lib" / "sitecustomize.py").symlink_to("../etc/sitecustomize.py")
    assert _lies_in(f"{tmp_path}/lib/sitecustomize.py", places)
    assert not _lies_in(f"{tmp_path}/etc/sitecustomize.py", places)
    assert not _lies_in(f"{tmp_path}/lib/../etc/sitecustomize.py", places)
