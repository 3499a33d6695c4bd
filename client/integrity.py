# SPDX-License-Identifier: Apache-2.0
"""Whether the code that runs is the code that the hospital installed. Checked before a task is served.

    1. every installed file of FedNeuro has the SHA-256 that its RECORD says, and no module lies beside them (PEP 376)
    2. the package was imported from that installation, from no other place
    3. Python looks for modules neither in the current folder nor in one that someone else may fill (a bundle of
       Flower's, a temporary folder)
    4. no ``sitecustomize`` or ``usercustomize``, which run before anything else, but the distribution's own

This tells an honest hospital that an installation was damaged or mixed up, and stops what a coordinator could
slip in. It is no defence against somebody who may write into the installation: they can write RECORD too.
"""

import base64
import hashlib
import importlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from ..privacy.errors import EnvironmentProblem

__all__ = ["Integrity", "check_integrity", "require_integrity"]

_PACKAGE = "fedneuro"
_ROOMS = ("client", "models", "privacy", "server", "simulations")


@dataclass(frozen=True, slots=True)
class Integrity:
    """What was found.

    Args:
        proven: every file matched the RECORD.
        faults: what forbids to serve.
        note: why nothing could be proven; empty if it was.
    """

    proven: bool
    faults: tuple[str, ...]
    note: str = ""


def check_integrity() -> Integrity:
    """Look at this process's installation and path."""
    faults = list(_path_faults())
    try:
        installed = distribution(_PACKAGE)
    except PackageNotFoundError:
        return Integrity(False, (*faults, f"{_PACKAGE} is not an installed distribution"), "not installed")
    if _is_editable(installed):
        return Integrity(False, tuple(faults), "editable installation: its files change, so nothing can be proven")
    faults += _record_faults(installed)
    return Integrity(not faults, tuple(faults))


def require_integrity(*, record: bool) -> Integrity:
    """The check as a condition.

    Args:
        record: an installation that cannot be proven is refused too.

    Raises:
        EnvironmentProblem: the code is not what was installed.
    """
    found = check_integrity()
    for fault in found.faults:
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise EnvironmentProblem(f"{fault}{more}; install FedNeuro again from a source that you trust")
    if record and not found.proven:
        raise EnvironmentProblem(f"{found.note}; runner.require_record = true: install a wheel (pip install fedneuro)")
    return found


def _is_editable(installed: Distribution) -> bool:
    try:
        info = json.loads(installed.read_text("direct_url.json") or "{}").get("dir_info", {})
    except ValueError:
        info = {}
    return bool(info.get("editable")) or not any(str(f).startswith(f"{_PACKAGE}/") for f in installed.files or ())


def _record_faults(installed: Distribution) -> Iterator[str]:
    """Steps 1 and 2."""
    known: set[Path] = set()
    base = Path(str(installed.locate_file(_PACKAGE))).resolve()
    for file in installed.files or ():
        path = Path(str(installed.locate_file(file)))
        known.add(path.resolve())
        if file.hash is None or not str(file).startswith(f"{_PACKAGE}/"):
            continue
        try:
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
        except (OSError, ValueError):
            yield f"{path} is missing or cannot be read"
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            yield f"{path} is not the file that was installed"
    for path in sorted(base.rglob("*")):
        if path.suffix in (".py", ".so", ".pth") and path.resolve() not in known:
            yield f"{path} was not installed"
    for room in _ROOMS:
        found = importlib.import_module(f"{_PACKAGE}.{room}").__file__
        if found is None or not Path(found).resolve().is_relative_to(base):
            yield f"{_PACKAGE}.{room} was loaded from {found}, not from {base}"


def _path_faults() -> Iterator[str]:
    """Steps 3 and 4."""
    here = Path.cwd().resolve()
    trusted = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    trusted += [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    for entry in sys.path:
        path = Path(entry or ".").resolve()
        if not entry or (path == here and not any(path.is_relative_to(place) for place in trusted)):
            yield f"Python looks for modules in the current folder {here}; start the node as fedneuro-node start"
    for name in ("sitecustomize", "usercustomize"):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and not _lies_in(file, (*trusted, Path("/usr/lib"))):
            yield f"{file} runs before everything else; remove it"


def _lies_in(file: str, places: Iterable[Path]) -> bool:
    """Whether a file, or the link by which Python found it, lies in one of the places.

    Debian's Python has ``/usr/lib/python3.11/sitecustomize.py``, a link to ``/etc/python3.11``.
    """
    found = (Path(os.path.normpath(Path(file).absolute())), Path(file).resolve())
    return any(path.is_relative_to(place) for place in places for path in found)
