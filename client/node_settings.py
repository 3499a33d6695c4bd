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
    cache_gib = 64               # that they may take on disk

    [study]
    policy = "policy.toml"       # what the hospital permits; see fedneuro.client.policy
    # approved = ["9f2c…"]       # without a policy (rehearsals): hashes of studies, and nothing else is asked

    [budget]                     # of the data set's life, over all studies; the section may be left out
    dataset = "glioma"           # name in the ledger (default: the site's); every study on these patients uses it
    epsilon = 10.0               # default 10; "unlimited" leaves each study its own budget
    delta = 1e-5                 # default: the largest power of ten that is at most 1 / (10 × public_size)
    min_patients = 5             # fewer evaluated patients than this return no metric (default 5)

    [superlink]
    address = "coordinator.example.org:8000"
    root_certificate = "ca.crt"
    key = "node.key"             # this node's private key, P-384 in OpenSSH form, mode 0600
    certificate = "site.crt"     # shown to the coordinator's guard; written, as all of this section, by enrol
    certificate_key = "site.key" # its private key, mode 0600
    # revocations = "root.crl"   # what the coordinator's root took back; see fedneuro.client.revocations

    [runner]
    port = 9094                  # port on 127.0.0.1 between SuperNode and runner
    secret = "runner.secret"     # shared by the two, mode 0600
    bundle = "51ab…"             # SHA-256 of the only app bundle that this node serves
    require_record = false       # true: serve only where every installed file matches its RECORD (no editable install)

    [sandbox]                    # of the process that trains; the section may be left out
    isolation = "auto"           # or "required": refuse to train without walls; "off"
    memory_gib = 0.0             # resident memory; 0: nine tenths of the machine's
    request_hours = 24.0         # of work on one request
    yield_gpu = false            # true: hold while another process uses the GPU

    [coordinator]                # written by enrol
    consortium = "glioma-net"
    renewal = "coordinator.example.org:8445"
    study_key = "c0de…"          # public key with which the coordinator signs studies, for policy.toml

    [[peer]]                     # privacy.mode = "distributed": every training hospital, this one too; without any,
    name = "hospital-2"          # a hospital's key is remembered when a study first shows it
    key = "77e0…"                # SHA-256 of its node's public key, compared by telephone

Nothing in it can be changed from outside: the coordinator's messages carry no settings.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ..privacy.budget import Budget, site_delta
from ..privacy.contract import Role
from ..privacy.errors import BadInput
from .settings import SiteSettings
from .toml_file import Part as _Part
from .toml_file import parse_toml, validate

__all__ = ["NodeSettings", "load_node_settings"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
NAME_WORDS = "1 to 64 letters (a to z, A to Z), digits and _ . -, a letter or digit first"
ADDRESS = r"^[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits in small letters")]
Text = Annotated[str, Field(min_length=1, max_length=4096)]


class SitePart(_Part):
    """The data set and what is granted for it."""

    name: str = Field(pattern=NAME, description=NAME_WORDS)
    role: Role = Field(strict=False)
    public_size: int = Field(ge=1, le=10_000_000)
    data: Text
    state: Text
    cache: Text | None = None
    cache_gib: float = Field(default=64.0, gt=0, le=1_000_000)


class StudyPart(_Part):
    """What the hospital approved: the file of its policy, or, for a rehearsal, hashes alone."""

    policy: Text | None = None
    approved: tuple[Sha256, ...] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.policy is None) is (self.approved is None):
            found = "neither is given" if self.policy is None else "both are given"
            raise PydanticCustomError(
                "one", "give either policy or approved, so that one place decides; {found}", {"found": found}
            )
        return self


class BudgetPart(_Part):
    """What the data set may ever give away, whatever is approved."""

    dataset: str = Field(
        default="", pattern=r"^[A-Za-z0-9_.-]{0,64}$", description="up to 64 of a to z, A to Z, 0 to 9, _ . -"
    )
    epsilon: Annotated[float, Field(gt=0, le=10_000)] | Literal["unlimited"] = 10.0
    delta: float = Field(default=0.0, ge=0, lt=1)
    min_patients: int = Field(default=5, ge=1, le=10_000)


class PeerPart(_Part):
    """A hospital with which this one may add up in secret (mode "distributed")."""

    name: str = Field(pattern=NAME, description=NAME_WORDS)
    key: Sha256


class SuperLinkPart(_Part):
    """Where the coordinator is, and how each side knows the other."""

    address: str = Field(pattern=ADDRESS, description="HOST:PORT, without https://")
    root_certificate: Text
    key: Text
    certificate: Text | None = None
    certificate_key: Text | None = None
    revocations: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.revocations is not None and self.certificate is None:
            raise PydanticCustomError("pair", "revocations needs a certificate; fedneuro-node enrol INVITATION")
        return self


class CoordinatorPart(_Part):
    """Written by ``fedneuro-node enrol``."""

    consortium: Annotated[str, Field(min_length=1, max_length=64)]
    renewal: str = Field(pattern=ADDRESS, description="HOST:PORT, without https://")
    study_key: Sha256


class RunnerPart(_Part):
    """Between SuperNode and runner, on this machine."""

    port: int = Field(ge=1, le=65535)
    secret: Text
    bundle: Sha256
    require_record: bool = False


class SandboxPart(_Part):
    """What the process that trains may take, and from what it is kept; see :mod:`.sandbox`."""

    isolation: Literal["auto", "required", "off"] = "auto"
    memory_gib: float = Field(default=0.0, ge=0, le=100_000)
    request_hours: float = Field(default=24.0, gt=0, le=10_000)
    yield_gpu: bool = False


class NodeSettings(_Part):
    """A whole ``node.toml``, with absolute paths."""

    site: SitePart
    study: StudyPart
    budget: BudgetPart = Field(default_factory=BudgetPart)
    superlink: SuperLinkPart
    runner: RunnerPart
    sandbox: SandboxPart = Field(default_factory=SandboxPart)
    coordinator: CoordinatorPart | None = None
    peer: tuple[PeerPart, ...] = Field(default=(), strict=False)

    def site_settings(self) -> SiteSettings:
        """The part that :class:`fedneuro.client.site.Site` needs."""
        return SiteSettings(
            name=self.site.name,
            data=Path(self.site.data),
            state=Path(self.site.state),
            role=self.site.role,
            public_size=self.site.public_size,
            cache=Path(self.site.cache) if self.site.cache else None,
            cache_bytes=int(self.site.cache_gib * 2**30),
            approved=None if self.study.approved is None else frozenset(self.study.approved),
            policy=Path(self.study.policy) if self.study.policy else None,
            dataset=self.budget.dataset,
            lifetime=self._lifetime(),
            min_patients=self.budget.min_patients,
            identity=Path(self.superlink.key),
            peers=frozenset((peer.name, peer.key) for peer in self.peer) or None,
        )

    def _lifetime(self) -> Budget | None:
        if self.budget.epsilon == "unlimited":
            return None
        delta = site_delta(self.budget.delta, self.site.public_size)
        return Budget(epsilon=self.budget.epsilon, delta=delta)


_PATHS = {
    "site": ("data", "state", "cache"),
    "study": ("policy",),
    "superlink": ("root_certificate", "key", "certificate", "certificate_key", "revocations"),
    "runner": ("secret",),
}
_EXISTING = {
    ("site", "data"),
    *(("superlink", key) for key in ("root_certificate", "key", "certificate", "certificate_key", "revocations")),
    ("runner", "secret"),
}
_SECRET = {("superlink", "key"), ("superlink", "certificate_key"), ("runner", "secret")}


def load_node_settings(path: Path) -> NodeSettings:
    """Read and check a node file.

    Raises:
        BadInput: the file is missing or not TOML; a key is unknown, missing, of another type or out of range;
            a file that it names is not there, or a secret file can be read by others.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}); give the path of the node's settings file"
        ) from error
    values = parse_toml(content, path)
    _make_absolute(values, path.resolve().parent)
    settings = validate(NodeSettings, values, path)
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
        if (value := getattr(getattr(settings, section), key)) is None:
            continue
        named = Path(value)
        if not (named.is_dir() if key == "data" else named.is_file()):
            kind = "folder" if key == "data" else "file"
            raise BadInput(f"{path}: {section}.{key}: there is no {kind} {named}")
        if (section, key) in _SECRET and named.stat().st_mode & 0o077:
            raise BadInput(f"{path}: {section}.{key}: {named} can be read by others; run chmod 600 on it")
