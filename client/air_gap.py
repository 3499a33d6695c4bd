# SPDX-License-Identifier: Apache-2.0
"""``fedneuro-node bundle``: everything that an installation without internet needs, in one folder.

    *.whl             FedNeuro and, unless left out, every package that it needs, in the versions installed here
    requirements.txt  their exact versions, with the SHA-256 of each wheel (pip's hash-checking mode)
    sbom.cdx.json     CycloneDX 1.6: name, version, licence, package URL and SHA-256 of each
    SHA256SUMS        of all files above

    pip install --no-index --find-links DIR --require-hashes -r DIR/requirements.txt

The wheels are for this machine's Python, system and processor.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ..privacy.errors import BadInput, EnvironmentProblem

__all__ = ["closure", "make_wheelhouse", "sbom"]

_ROOT = "fedneuro"


def closure(root: str = _ROOT) -> dict[str, Distribution]:
    """Installed distributions that ``root`` needs, itself first, by normalised name; extras as they are asked for.

    Raises:
        EnvironmentProblem: one is not installed.
    """
    found: dict[str, Distribution] = {}
    extras: dict[str, set[str]] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    while waiting:
        name, wanted = waiting.pop()
        key = canonicalize_name(name)
        if key in found and wanted <= extras[key]:
            continue
        try:
            found.setdefault(key, distribution(name))
        except PackageNotFoundError as error:
            raise EnvironmentProblem(f"{name} is not installed here; install FedNeuro with its dependencies") from error
        known = extras.setdefault(key, set())
        known |= wanted
        for text in found[key].requires or ():
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *known)):
                waiting.append((need.name, frozenset(need.extras)))
    return found


def make_wheelhouse(
    out: Path, *, dependencies: bool = True, wheel: Path | None = None, pip: Sequence[str] = ()
) -> list[Path]:
    """Fill ``out``; returns its files.

    Args:
        out: a new or empty folder.
        dependencies: also those of FedNeuro: about 3 GB with CUDA.
        wheel: FedNeuro's wheel; None: built from the editable source, else fetched in the installed version.
        pip: further options for pip, such as ``--extra-index-url URL``.

    Raises:
        BadInput: ``out`` holds files, or ``wheel`` is none of FedNeuro.
        EnvironmentProblem: pip fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise BadInput(f"{out}: is not empty; give a new folder")
    needed = closure()
    own = needed.pop(_ROOT)
    _own_wheel(out, own, wheel, pip)
    if dependencies:
        pins = "".join(f"{dist.name}=={dist.version}\n" for dist in needed.values())
        with tempfile.TemporaryDirectory() as folder:
            pinned = Path(folder) / "pins.txt"
            pinned.write_text(pins, encoding="utf-8")
            # "wheel", not "download": what an index has as source alone is built here, not behind the wall.
            _pip("wheel", "--no-deps", "--wheel-dir", str(out), "--requirement", str(pinned), *pip)
    wheels = sorted(out.glob("*.whl"))
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels}
    lines = []
    for path, value in hashes.items():
        name, release, _, _ = parse_wheel_filename(path.name)
        lines.append(f"{name}=={release} --hash=sha256:{value}\n")
    (out / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    text = json.dumps(sbom([own, *needed.values()], hashes), indent=1, ensure_ascii=False)
    (out / "sbom.cdx.json").write_text(text + "\n", encoding="utf-8")
    files = sorted(path for path in out.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(
        f"{hashes.get(path) or hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files
    )
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return [*files, out / "SHA256SUMS"]


def _own_wheel(out: Path, own: Distribution, wheel: Path | None, pip: Sequence[str]) -> None:
    if wheel is not None:
        try:
            name = parse_wheel_filename(wheel.name)[0]
            content = wheel.read_bytes()
        except (InvalidWheelFilename, OSError) as error:
            raise BadInput(f"{wheel}: is no wheel of FedNeuro that can be read") from error
        if name != _ROOT:
            raise BadInput(f"{wheel}: is a wheel of {name}, not of FedNeuro")
        (out / wheel.name).write_bytes(content)
        return
    source = _editable_source(own)
    what = [str(source), "--no-build-isolation"] if source else [f"{_ROOT}=={own.version}"]
    _pip("wheel", "--no-deps", "--wheel-dir", str(out), *what, *pip)


def _editable_source(own: Distribution) -> Path | None:
    try:
        info = json.loads(own.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    url = str(info.get("url", ""))
    return Path(url.removeprefix("file://")) if info.get("dir_info", {}).get("editable") else None


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        fault = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
        raise EnvironmentProblem(f"pip {arguments[0]}: {fault[:300]}; give its options after --pip")


def sbom(distributions: Sequence[Distribution], wheels: dict[Path, str]) -> dict[str, Any]:
    """A CycloneDX 1.6 bill of materials; the first distribution is what it describes.

    Args:
        distributions: installed ones.
        wheels: SHA-256 by file, for those that are in the wheelhouse.
    """
    hashes = {parse_wheel_filename(path.name)[0]: value for path, value in wheels.items()}
    components = [_component(dist, hashes.get(canonicalize_name(dist.name))) for dist in distributions]
    known = {component["bom-ref"].split("@")[0]: component["bom-ref"] for component in components}
    graph = []
    for dist, component in zip(distributions, components, strict=True):
        needs = {f"pkg:pypi/{canonicalize_name(_name_of(text))}" for text in dist.requires or ()}
        graph.append({"ref": component["bom-ref"], "dependsOn": sorted(known[n] for n in needs if n in known)})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {"timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "component": components[0]},
        "components": components[1:],
        "dependencies": graph,
    }


def _name_of(requirement: str) -> str:
    return re.split(r"[\s\[;<>=!~(]", requirement, maxsplit=1)[0]


def _component(dist: Distribution, digest: str | None) -> dict[str, Any]:
    name = canonicalize_name(dist.name)
    reference = f"pkg:pypi/{name}@{dist.version}"
    component: dict[str, Any] = {
        "type": "application" if name == _ROOT else "library",
        "bom-ref": reference,
        "name": name,
        "version": dist.version,
        "purl": reference,
    }
    fields = dist.metadata
    expression, text = fields.json.get("license_expression"), fields.json.get("license")
    if expression:
        component["licenses"] = [{"expression": expression}]
    elif text and "\n" not in text and len(text) < 100:
        component["licenses"] = [{"license": {"name": text}}]
    elif classified := [c.rpartition(" :: ")[2] for c in fields.get_all("Classifier") or () if c.startswith("License")]:
        component["licenses"] = [{"license": {"name": classified[0]}}]
    if digest:
        component["hashes"] = [{"alg": "SHA-256", "content": digest}]
    return component
