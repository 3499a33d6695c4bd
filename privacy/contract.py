# SPDX-License-Identifier: Apache-2.0
"""The message contract: everything that may cross a hospital's wall, and nothing else.

Three kinds of request go in (*hello*, *train*, *evaluate*), one kind of reply to each comes out, or a
:class:`Refusal` that holds a reason code. Each dataclass below is a complete list of what the message can
carry; :func:`check_arrays` is the gate that both directions pass. :mod:`fedneuro.privacy.wire` turns these
objects into Flower records and back; nothing else in FedNeuro knows Flower's records.

Sizes: a site tells its *public cohort size*, declared and rounded by the hospital, never the true count.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ContractViolation, Reason
from .study import Study

__all__ = [
    "Arrays",
    "Estimate",
    "EvaluateReply",
    "HelloReply",
    "Kind",
    "Refusal",
    "Reply",
    "Request",
    "Role",
    "Shapes",
    "TrainReply",
    "Transport",
    "check_arrays",
    "payload_bytes",
    "shapes_of",
]

Arrays = Mapping[str, NDArray[np.generic]]
"""Named arrays of a model state, in the network's own order."""
Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Name of each array: its shape and numpy dtype name."""

Kind = Literal["hello", "train", "evaluate"]

MAX_ABSOLUTE = 4096.0
"""A weight beyond this is a fault or an attack, not a model; the bound also makes exact summation possible."""


class Role(StrEnum):
    """What a hospital grants: to train, or to be a held-out site that only evaluates."""

    TRAIN = "train"
    HELDOUT = "heldout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over patients with its 95 % bootstrap interval.

    ``n`` counts patients; resampling unit: the patient. ``low``/``high`` equal ``mean`` for one patient.
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
class Request:
    """What the coordinator asks of one site.

    ``round`` counts from 1 for *train*; *evaluate* of round r judges the model after round r (0: untrained).
    ``arrays`` is the global model (absent in *hello*). ``final`` asks for every metric of the study.
    """

    kind: Kind
    study: Study
    round: int = 0
    arrays: Arrays | None = None
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReply:
    """A site's answer before round 1: its data fit the study, and this is what it grants."""

    site: str
    role: Role
    public_size: int
    versions: Mapping[str, str] = field(default_factory=dict)
    has_validation: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReply:
    """A site's weights after its local steps.

    ``loss``: mean training loss, or None where it is withheld (under privacy it is not noised, so it stays).
    ``epsilon``: ε that this data set has spent in this study so far, this round included; None without privacy.
    """

    site: str
    round: int
    arrays: Arrays
    steps: int
    seconds: float
    loss: float | None = None
    epsilon: float | None = None
    noise_multiplier: float | None = None


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


Reply = HelloReply | TrainReply | EvaluateReply | Refusal


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
