# SPDX-License-Identifier: Apache-2.0
"""``policy.toml``: what a hospital permits. It belongs to the hospital, and no message can change it.

Whatever the file does not grant is denied: an empty file denies everything. Every key, its default and the rule that
it makes are in :mod:`.policy_rules`, which both the gate and ``fedneuro-node policy explain`` use;
``docs/policy.md`` tells the whole story.

:class:`PolicyFile` looks at the file again before every message, so a change takes effect at the next one without a
restart. A file that is missing, unreadable, not valid, or that others than its owner can write denies everything.
"""

import hashlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..privacy.contract import Role
from ..privacy.errors import BadInput, Reason, Refused
from ..privacy.study_evaluation import Metric
from .toml_file import Part, parse_toml, validate

__all__ = ["DAYS", "Denied", "Policy", "PolicyFile", "StudyRule", "Window", "load_policy"]

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Task = Literal["segmentation", "classification", "regression", "survival"]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits in small letters")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits in small letters")]
Dataset = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="1 to 64 of a to z, A to Z, 0 to 9, _ . -")
]
Mode = Annotated[str, Field(pattern=r"^[a-z]{1,32}$")]
Clock = Annotated[
    str,
    Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$|^24:00$", description='a time such as "07:30", "00:00" to "24:00"'),
]


class Denied(Refused):
    """A rule says no.

    Attributes:
        rule: the key of ``policy.toml``, for the audit log.
    """

    def __init__(self, rule: str, text: str, *, reason: Reason = Reason.POLICY_REFUSED) -> None:
        super().__init__(f"policy {rule}: {text}", reason=reason)
        self.rule = rule


class StudyRule(Part):
    """Studies that are approved without a hash, because all of this is true of them."""

    coordinator: PublicKey
    """Ed25519 public key, 64 hexadecimal digits: its owner has signed the study."""
    tasks: tuple[Task, ...] = Field(default=(), strict=False)
    datasets: tuple[Dataset, ...] = Field(default=(), strict=False)
    modes: tuple[Mode, ...] = Field(default=(), strict=False)


class StudiesPart(Part):
    """Which studies may ask at all: by hash, or by a rule."""

    approved: tuple[Sha256, ...] = Field(default=(), strict=False)
    rules: tuple[StudyRule, ...] = Field(default=(), strict=False)


class GrantPart(Part):
    """Which roles, and on which data sets (their names in the privacy ledger)."""

    roles: tuple[Annotated[Role, Field(strict=False)], ...] = Field(default=(), strict=False)
    datasets: tuple[Dataset, ...] = Field(default=(), strict=False)


class PrivacyPart(Part):
    """The least that is promised to a patient."""

    modes: tuple[Mode, ...] = Field(default=(), strict=False)
    max_epsilon_round: float = Field(default=0.0, ge=0, le=10_000)
    max_epsilon_study: float = Field(default=0.0, ge=0, le=10_000)
    max_epsilon_dataset: float = Field(default=0.0, ge=0, le=10_000)
    max_delta: float = Field(default=0.0, ge=0, lt=1)
    min_noise_multiplier: float = Field(default=0.0, ge=0, le=1e6)
    min_cohort: int = Field(default=5, ge=1, le=10_000_000)


class ModelPart(Part):
    """Which networks, and how large."""

    names: tuple[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")], ...] = Field(default=(), strict=False)
    max_parameters: int = Field(default=0, ge=0, le=10**12)
    max_bytes: int = Field(default=0, ge=0, le=10**13)


class ReplyPart(Part):
    """What may leave besides a refusal."""

    arrays: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(default=(), strict=False)
    metrics: tuple[Metric, ...] = Field(default=(), strict=False)
    exact_metrics: bool = False
    strata: bool = False
    statistics: bool = False
    training_loss: bool = False


class LimitsPart(Part):
    """How much, how long, how often."""

    max_rounds: int = Field(default=0, ge=0, le=10_000)
    max_retries: int = Field(default=3, ge=0, le=100)
    max_hours: float = Field(default=0.0, ge=0, le=100_000)
    max_requests_per_hour: int = Field(default=0, ge=0, le=1_000_000)
    gpu_memory_fraction: float = Field(default=1.0, gt=0, le=1)


class Window(Part):
    """Hours of the day, in local time, on some days. ``to`` before ``from`` reaches into the next day."""

    days: tuple[Day, ...] = Field(min_length=1, strict=False)
    start: Clock = Field(alias="from")
    end: Clock = Field(alias="to")

    def contains(self, moment: datetime) -> bool:
        """Whether the local ``moment`` lies in it; the start counts, the end does not.

        Example:
            >>> night = Window.model_validate({"days": ["fri"], "from": "22:00", "to": "06:00"})
            >>> [night.contains(datetime(2026, 1, day, 5)) for day in (2, 3)]  # Friday and Saturday at five
            [False, True]
        """
        time = f"{moment:%H:%M}"
        today = DAYS[moment.weekday()] in self.days
        if self.start < self.end:
            return today and self.start <= time < self.end
        yesterday = DAYS[moment.weekday() - 1] in self.days
        return (today and time >= self.start) or (yesterday and time < self.end)


class Policy(Part):
    """A whole ``policy.toml``. Each default is the one that denies."""

    studies: StudiesPart = Field(default_factory=StudiesPart)
    grant: GrantPart = Field(default_factory=GrantPart)
    privacy: PrivacyPart = Field(default_factory=PrivacyPart)
    model: ModelPart = Field(default_factory=ModelPart)
    reply: ReplyPart = Field(default_factory=ReplyPart)
    limits: LimitsPart = Field(default_factory=LimitsPart)
    windows: tuple[Window, ...] = Field(default=(), strict=False)

    def open_at(self, moment: datetime) -> bool:
        """Whether a time window contains the local ``moment``."""
        return _any_contains(self.windows, moment)


def _any_contains(windows: Iterable[Window], moment: datetime) -> bool:
    return any(window.contains(moment) for window in windows)


def load_policy(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        BadInput: it cannot be read, others can write it, it is not TOML, or a key is unknown or out of range.
    """
    return _parse(_read(path), path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            if _mode(path) & 0o022:
                raise BadInput(f"{path}: can be changed by others than its owner; run chmod go-w on it")
            return file.read(1_000_000)
    except OSError as error:
        raise BadInput(
            f"{path}: the policy cannot be read ({error.strerror}); nothing is permitted until it can"
        ) from (error)


def _mode(path: Path) -> int:
    return path.stat().st_mode


def _parse(content: bytes, path: Path) -> Policy:
    return validate(Policy, parse_toml(content, path), path)


class PolicyFile:
    """The policy as it is now. Reads the (small) file at each look, parses it where it changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = ""
        self._policy: Policy | None = None

    def look(self) -> tuple[Policy, str]:
        """The policy and the SHA-256 of its bytes.

        Raises:
            Denied: reason ``policy-invalid``; nothing is permitted.
        """
        try:
            content = _read(self.path)
            digest = hashlib.sha256(content).hexdigest()
            if self._policy is None or digest != self._digest:
                self._policy = None
                self._policy, self._digest = _parse(content, self.path), digest
        except BadInput as error:
            raise Denied(self.path.name, str(error), reason=Reason.POLICY_INVALID) from error
        return self._policy, self._digest
