# SPDX-License-Identifier: Apache-2.0
"""``node.toml``: everything that a hospital decides about its node, read once, typed and checked.

.. code-block:: toml

    [site]
    name = "hospital-1"          # the name under which the coordinator registered this node's key
    role = "train"               # or "heldout": granted by the hospital
    public_size = 40             # declared and rounded; the only size that is ever told
    data = "bids"                # BIDS folder, only read; paths are relative to this file
    state = "state"              # ledger, optimiser states and log; stays here
    cache = "cache"              # preprocessed scans (default: state/cache)

    [study]
    approved = ["9f2c…"]         # hashes of the studies that the hospital approved

    [superlink]
    address = "coordinator.example.org:8000"
    root_certificate = "ca.crt"
    key = "node.key"             # this node's private key, P-384 in OpenSSH form, mode 0600

    [runner]
    port = 9094                  # port on 127.0.0.1 between SuperNode and runner
    secret = "runner.secret"     # shared by the two, mode 0600
    bundle = "51ab…"             # SHA-256 of the only app bundle that this node serves

Nothing in it can be changed from outside: the coordinator's messages carry no settings.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..privacy.contract import Role
from ..privacy.errors import BadInput
from .settings import SiteSettings

__all__ = ["NodeSettings", "load_node_settings"]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class _Part(BaseModel):
    """Frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class SitePart(_Part):
    """The data set and what is granted for it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    role: Role = Field(strict=False)
    public_size: int = Field(ge=1, le=10_000_000)
    data: Text
    state: Text
    cache: Text | None = None


class StudyPart(_Part):
    """What the hospital approved."""

    approved: tuple[Sha256, ...] = Field(strict=False)


class SuperLinkPart(_Part):
    """Where the coordinator is, and how each side knows the other."""

    address: str = Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}$")
    root_certificate: Text
    key: Text


class RunnerPart(_Part):
    """Between SuperNode and runner, on this machine."""

    port: int = Field(ge=1, le=65535)
    secret: Text
    bundle: Sha256


class NodeSettings(_Part):
    """A whole ``node.toml``, with absolute paths."""

    site: SitePart
    study: StudyPart
    superlink: SuperLinkPart
    runner: RunnerPart

    def site_settings(self) -> SiteSettings:
        """The part that :class:`fedneuro.client.site.Site` needs."""
        return SiteSettings(
            name=self.site.name,
            data=Path(self.site.data),
            state=Path(self.site.state),
            role=self.site.role,
            public_size=self.site.public_size,
            cache=Path(self.site.cache) if self.site.cache else None,
            approved=frozenset(self.study.approved),
        )


_PATHS = {"site": ("data", "state", "cache"), "superlink": ("root_certificate", "key"), "runner": ("secret",)}
_EXISTING = {("site", "data"), ("superlink", "root_certificate"), ("superlink", "key"), ("runner", "secret")}
_SECRET = {("superlink", "key"), ("runner", "secret")}


def load_node_settings(path: Path) -> NodeSettings:
    """Read and check a node file.

    Raises:
        BadInput: the file is missing or not TOML; a key is unknown, missing, of another type or out of range;
            a file that it names is not there, or a secret file can be read by others.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}); give the path of the node's settings file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is not TOML: {error}") from error
    _make_absolute(values, path.resolve().parent)
    try:
        settings = NodeSettings.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {_explain(error)}") from error
    _check_files(settings, path)
    return settings


def _make_absolute(values: dict[str, Any], base: Path) -> None:
    for section, keys in _PATHS.items():
        part = values.get(section)
        if not isinstance(part, dict):
            continue
        for key in keys:
            if isinstance(named := part.get(key), str) and named:
                part[key] = str(base / Path(named).expanduser())


def _check_files(settings: NodeSettings, path: Path) -> None:
    for section, key in sorted(_EXISTING):
        named = Path(getattr(getattr(settings, section), key))
        if not (named.is_dir() if key == "data" else named.is_file()):
            kind = "folder" if key == "data" else "file"
            raise BadInput(f"{path}: {section}.{key}: there is no {kind} {named}")
        if (section, key) in _SECRET and named.stat().st_mode & 0o077:
            raise BadInput(f"{path}: {section}.{key}: {named} can be read by others; run chmod 600 on it")


def _explain(error: ValidationError) -> str:
    """One fault as one line: where, what was found, what is allowed. A misspelt key says more than a missing one."""
    fault = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        section, _, key = where.rpartition(".")
        known = _known(section)
        near = difflib.get_close_matches(key, known, 1)
        return f"{where} is not a known key; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
    if fault["type"] == "missing":
        return f"{where} is missing; add it"
    return f"{where} = {fault['input']!r}: {fault['msg']}"


def _known(section: str) -> list[str]:
    model: type[BaseModel] = NodeSettings
    if section:
        annotation = NodeSettings.model_fields[section].annotation
        model = annotation if isinstance(annotation, type) else NodeSettings
    return sorted(model.model_fields)
