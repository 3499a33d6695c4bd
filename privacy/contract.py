# SPDX-License-Identifier: Apache-2.0
"""The message contract: everything that may cross a hospital's wall, and nothing else.

Three kinds of request go in (*hello*, *train*, *evaluate*), one kind of reply to each comes out, or a
:class:`Refusal` that holds a reason code. With ``privacy.mode = "distributed"`` the four steps of a secure
aggregation (*keys*, *shares*, *masked*, *unmask*) stand in place of *train*. Each dataclass below is a complete
list of what the message can carry; :func:`check_arrays` is the gate that both directions pass.
:mod:`fedneuro.privacy.wire` turns these objects into Flower records and back; nothing else in FedNeuro knows Flower's
records.

Sizes: a site tells its *public cohort size*, declared and rounded by the hospital, never the true count.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ContractViolation, Reason
from .secagg.messages import Advert, KeysReply, SecureStep, SharesReply, UnmaskReply
from .study import Study

__all__ = [
    "SECURE_KINDS",
    "Advert",
    "Arrays",
    "Estimate",
    "EvaluateReply",
    "HelloReply",
    "KeysReply",
    "Kind",
    "MaskedReply",
    "Receipt",
    "Refusal",
    "Reply",
    "Request",
    "Role",
    "SecureStep",
    "Shapes",
    "SharesReply",
    "TrainReply",
    "Transport",
    "UnmaskReply",
    "check_arrays",
    "check_request",
    "payload_bytes",
    "shapes_of",
]

Arrays = Mapping[str, NDArray[np.generic]]
"""Named arrays of a model state, in the network's own order."""
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Name of each array: its shape and numpy dtype name."""

Kind = Literal["hello", "train", "evaluate", "keys", "shares", "masked", "unmask"]
SECURE_KINDS: frozenset[Kind] = frozenset({"keys", "shares", "masked", "unmask"})
"""Steps of a secure aggregation, in :mod:`fedneuro.privacy.secagg.participant`."""

MAX_ABSOLUTE = 4096.0
"""A weight beyond this is a fault or an attack, not a model; the bound also makes exact summation possible."""


class Role(StrEnum):
    """What a hospital grants: to train, or to be a held-out site that only evaluates."""

    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over patients with its 95 % bootstrap interval.

    ``n`` counts patients, and is the public number where it leaves a hospital; resampling unit: the patient.
    ``low``/``high`` equal ``mean`` for one patient. Noised means have an interval of noise and sampling.
    """

    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if self.n < 1 or not all(map(math.isfinite, (self.mean, self.low, self.high))):
            raise ContractViolation(
                f"estimate is not finite or has no patient: {self.mean} [{self.low}, {self.high}] n={self.n}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """That a hospital's privacy ledger had ``count`` entries, the last of which has a hash that begins with ``head``.

    It tells nothing of the entries (each holds a random number), but the hospital cannot put an older copy
    of its ledger back without contradicting it.
    """

    count: int
    head: str

    def __post_init__(self) -> None:
        if self.count < 1 or not re.fullmatch(r"[0-9a-f]{16}", self.head):
            raise ContractViolation("a receipt is a number from 1 and sixteen hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the coordinator asks of one site.

    ``round`` counts from 1 for *train*; *evaluate* of round r judges the model after round r (0: untrained).
    ``arrays`` is the global model (absent in *hello*), and what :mod:`.wire_layout` has beside it. ``final`` asks for
    every metric of the study. ``held``, where it is not empty, is the digest of all these arrays; ``arrays`` then has
    those alone, or none, that differ from what this site got last.
    ``threshold`` of sensitivity and specificity goes with ``final``, as training sites chose it on their own patients.
    ``receipt`` is the latest that this site gave, shown to it again with *train* and *masked*.
    ``signature`` is the coordinator's under the study hash (:mod:`fedneuro.privacy.signing`), or empty.
    ``secure`` is what a step of secure aggregation says besides; only *masked* carries ``arrays``, too.
    """

    kind: Kind
    study: Study
    round: int = 0
    arrays: Arrays | None = None
    held: str = ""
    final: bool = False
    threshold: float | None = None
    receipt: Receipt | None = None
    secure: SecureStep | None = None
    signature: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReply:
    """A site's answer before round 1: its data fit the study, and this is what it grants.

    ``identity``: with ``privacy.mode = "distributed"`` the public key by which other hospitals know a training site.
    ``keeps_model``: it remembers what it got last, so that only what changed need be sent to it.
    """

    site: str
    role: Role
    public_size: int
    versions: Mapping[str, str] = field(default_factory=dict)
    has_validation: bool = True
    keeps_model: bool = False
    identity: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReply:
    """A site's weights after its local steps, in the form that :func:`.wire_layout.reply_shapes` says.

    ``loss``: mean training loss, or None where it is withheld (under privacy it is not noised, so it stays).
    ``epsilon``: ε that this data set has spent in this study so far, this round included; None without privacy.
    ``attempt``: 1, or more where the ledger was charged for this round before: every attempt is paid for.
    ``receipt``: of the ledger after the charge.
    """

    site: str
    round: int
    arrays: Arrays
    steps: int
    seconds: float
    loss: float | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None
    attempt: int | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedReply:
    """A site's noised sum of clipped patient gradients on the integer grid, under its masks (``distributed``).

    ``vector``: uint64, one word per trainable parameter, uniform to whoever lacks the masks. ``noise_multiplier``: σ of
    the sum over sites, for which the guarantee holds. The other fields are those of :class:`TrainReply`.
    """

    site: str
    round: int
    vector: NDArray[np.uint64]
    seconds: float
    epsilon: float
    noise_multiplier: float
    attempt: int | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReply:
    """A site's metrics over its patients: validation patients of a training site, all of a held-out site."""

    site: str
    round: int
    metrics: Mapping[str, Estimate]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A site did not do it. Only the reason code leaves; the explanation is in the site's own log."""

    site: str
    kind: Kind
    round: int
    reason: Reason


Reply = HelloReply | TrainReply | EvaluateReply | KeysReply | SharesReply | MaskedReply | UnmaskReply | Refusal


class Transport(Protocol):
    """How requests reach sites: in process, worker processes, Ray or a Flower deployment.

    A transport never raises for one site: a site that is lost or late yields a :class:`Refusal`.
    """

    def sites(self) -> list[str]:
        """Names of the sites that can be asked now, sorted."""
        ...

    def exchange(self, requests: Mapping[str, Request], timeout: float) -> Iterator[Reply]:
        """Send each site its request and yield one reply per site, as they arrive; seconds of patience."""
        ...


def shapes_of(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of ``arrays``, in order."""
    return {name: (tuple(a.shape), a.dtype.name) for name, a in arrays.items()}


def payload_bytes(arrays: Arrays | None) -> int:
    """Bytes of the arrays as they travel, without the envelope."""
    return sum(int(a.nbytes) for a in arrays.values()) if arrays else 0


def check_request(request: Request) -> None:
    """Refuse a request that contradicts itself: each kind holds its own fields, and no others.

    Raises:
        ContractViolation: naming the field.
    """
    if (
        request.round < 0
        or (request.kind == "hello" and request.round)
        or (request.kind not in ("hello", "evaluate") and not request.round)
    ):
        raise ContractViolation(f"round {request.round} does not suit a {request.kind} request")
    carries = request.arrays is not None or bool(request.held)
    if carries is not (request.kind in ("train", "evaluate", "masked")):
        raise ContractViolation(f"a {request.kind} request {'with a' if carries else 'without a'} model")
    if (request.secure is None) is (request.kind in SECURE_KINDS):
        raise ContractViolation(f"a {request.kind} request {'with' if request.secure else 'without'} a secure step")
    if request.receipt is not None and request.kind not in ("train", "masked"):
        raise ContractViolation(f"a receipt does not suit a {request.kind} request")
    if request.final and request.kind != "evaluate":
        raise ContractViolation(f"final does not suit a {request.kind} request")
    if request.threshold is not None and not (request.final and 0 < request.threshold < 1):
        raise ContractViolation(f"threshold {request.threshold} does not suit a {request.kind} request")


def check_arrays(arrays: Arrays, expected: Shapes) -> None:
    """Refuse arrays that are not exactly the agreed ones.

    Checked: names and their order, shapes, dtypes, finiteness, and magnitude (:data:`MAX_ABSOLUTE`).

    Raises:
        ContractViolation: naming the first difference; reason ``non-finite`` for NaN, infinity or a runaway value.
    """
    if list(arrays) != list(expected):
        missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise ContractViolation(
            f"arrays differ from the contract: {len(missing)} missing {missing[:3]}, {len(extra)} unexpected, "
            "or another order"
        )
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if tuple(array.shape) != tuple(shape) or array.dtype.name != dtype:
            raise ContractViolation(
                f"array {name} is {array.dtype.name}{tuple(array.shape)}; the contract says {dtype}{tuple(shape)}"
            )
        if array.size and array.dtype.kind == "f":
            # min and max are NaN where any element is, so two reductions decide without a temporary copy.
            low, high = float(array.min()), float(array.max())
            if not (low >= -MAX_ABSOLUTE and high <= MAX_ABSOLUTE):
                raise ContractViolation(
                    f"array {name} holds a value that is not finite or beyond ±{MAX_ABSOLUTE:g}",
                    reason=Reason.NON_FINITE,
                )
