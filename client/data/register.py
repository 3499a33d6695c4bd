# SPDX-License-Identifier: Apache-2.0
"""The data sets of one node: a name, a folder, and a fingerprint of what it held when it was registered.

The fingerprint is SHA-256 over the sorted list of all files with their check sums, so it changes if any byte of any
file does, and it can be quoted in a report without telling anything about the data. The list itself stays in the
node's folder and names what was added, removed or changed later. The public cohort size is declared by the hospital;
nothing else in the register ever leaves.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ...privacy.contract import Role
from ...privacy.errors import BadInput, DataError, EnvironmentProblem, StateError
from .bids import find_patients
from .nifti import digest_of
from .split import public_size

__all__ = [
    "Changes",
    "Registered",
    "changes_of",
    "find_registered",
    "is_registered",
    "list_registered",
    "manifest_of",
    "register",
]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FOLDER: Final = "datasets"


@dataclass(frozen=True, slots=True)
class Registered:
    """One entry of the register."""

    name: str
    path: str
    fingerprint: str
    patients: int
    public_size: int
    licence: str
    consent: str
    roles: tuple[Role, ...]
    files: Mapping[str, str]  # path below the folder: SHA-256


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs from the registered state; paths below the folder."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def lines(self) -> list[str]:
        """One line per kind, naming the first files."""
        told = []
        for word, paths in (("added", self.added), ("removed", self.removed), ("changed", self.changed)):
            if paths:
                told.append(f"{len(paths)} {word}: {', '.join(paths[:3])}" + (", …" if len(paths) > 3 else ""))
        return told


def manifest_of(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a data set, by path with forward slashes; hidden files are left out.

    Raises:
        DataError: a file cannot be read.
    """
    found: dict[str, str] = {}

    def complain(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); give the node's account the right to read it"
        ) from error

    for folder, below, files in os.walk(root, followlinks=True, onerror=complain):
        if Path(folder).is_symlink() and Path(folder).parent.resolve().is_relative_to(Path(folder).resolve()):
            below.clear()  # a link that leads back up: nothing new, without end
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found[path.relative_to(root).as_posix()] = digest_of(path)
    return found


def fingerprint_of(files: Mapping[str, str]) -> str:
    """SHA-256 of a manifest."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def register(
    state: Path,
    name: str,
    path: Path,
    *,
    size: int | None = None,
    licence: str = "",
    consent: str = "",
    roles: tuple[Role, ...] = (),
    update: bool = False,
) -> Registered:
    """Enter a data set, or its new state. What an update does not name stays as it was.

    Args:
        state: the node's private folder.
        name: letters, digits and ``_.-``.
        path: BIDS folder.
        size: public cohort size; None: the number of patients, rounded to the nearest 5, or what was declared before.
        licence: under which terms the data may be used.
        consent: on what ground patients' data are used.
        roles: what the hospital permits the data set to be; empty: to train.
        update: replace an entry of the same name.

    Raises:
        BadInput: a name or size that cannot be, or a public size of more than twice the number of patients.
        DataError: no BIDS folder.
        StateError: the name is taken.
        EnvironmentProblem: the state folder cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise BadInput(f"name {name!r}: expected up to 64 letters, digits, dots, dashes; choose another")
    target = state / _FOLDER / f"{name}.json"
    if target.exists() and not update:
        raise StateError(
            f"data set {name} is registered already; give another name, or --update to enter its new state"
        )
    patients = len(find_patients(path))
    if target.exists():
        with suppress(StateError):  # an entry that cannot be read is written anew
            old = find_registered(state, name)
            licence, consent, roles = licence or old.licence, consent or old.consent, roles or old.roles
            if size is None and old.public_size != public_size(old.patients):
                size = old.public_size
    size = public_size(patients) if size is None else size
    if not 1 <= size <= max(2 * patients, 10):
        raise BadInput(f"public size {size}: expected 1 to {max(2 * patients, 10)} for {patients} patients, rounded")
    files = manifest_of(path)
    entry = Registered(
        name,
        str(path.resolve()),
        fingerprint_of(files),
        patients,
        size,
        licence,
        consent,
        tuple(sorted(set(roles or (Role.TRAIN,)))),
        files,
    )
    _write(target, json.dumps(asdict(entry), indent=1, ensure_ascii=True) + "\n")
    return entry


def is_registered(state: Path, name: str) -> bool:
    """Whether there is an entry of that name."""
    return bool(_NAME.fullmatch(name)) and (state / _FOLDER / f"{name}.json").is_file()


def find_registered(state: Path, name: str) -> Registered:
    """The entry of a name.

    Raises:
        BadInput: there is none; those that there are, are named.
        StateError: the entry cannot be read.
    """
    known = sorted(p.stem for p in (state / _FOLDER).glob("*.json"))
    if name not in known:
        raise BadInput(
            f"no data set {name} in {state} (registered: {', '.join(known) or 'none'}); "
            "give a folder, or run: fedneuro-node data register"
        )
    path = state / _FOLDER / f"{name}.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Registered(**{**values, "roles": tuple(Role(role) for role in values["roles"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StateError(f"{path}: cannot be read ({error}); register the data set again with --update") from error


def list_registered(state: Path) -> list[Registered]:
    """All entries, by name."""
    return [find_registered(state, path.stem) for path in sorted((state / _FOLDER).glob("*.json"))]


def changes_of(entry: Registered) -> Changes:
    """What changed in the folder since it was registered; every file is read again.

    Raises:
        DataError: the folder is gone, or a file cannot be read.
    """
    root = Path(entry.path)
    find_patients(root)
    now, then = manifest_of(root), entry.files
    return Changes(
        tuple(sorted(set(now) - set(then))),
        tuple(sorted(set(then) - set(now))),
        tuple(sorted(path for path in set(now) & set(then) if now[path] != then[path])),
    )


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(fresh).replace(path)
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be written ({error.strerror}); give a state folder that the node's account owns"
        ) from error
