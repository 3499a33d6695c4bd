# SPDX-License-Identifier: Apache-2.0
"""What is installed here beside FedNeuro, and its CycloneDX 1.6 bill of materials: for bundles and releases.

Reference: CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/.
"""

import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from .errors import EnvironmentProblem

__all__ = ["ROOT", "closure", "sbom"]

ROOT = "fedneuro"


def closure(root: str = ROOT) -> dict[str, Distribution]:
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
        "type": "application" if name == ROOT else "library",
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
