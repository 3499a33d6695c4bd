# SPDX-License-Identifier: Apache-2.0
"""Measures of ranking over a cohort, AUROC and concordance: intervals and paired tests, patients as the units.

No single patient has an AUROC, so there is nothing for a Wilcoxon test to rank. But each patient has a *part* in it,
its first-order influence, and the parts of two models on the same patients can be subtracted:

    AUROC         DeLong's structural components over the number of their class, by midranks. With more than two classes
                  the mean of each class against the rest; a patient's part is then the mean of its parts
    concordance   infinitesimal jackknife of Harrell's index: (A_i - C B_i) / pairs, for the concordant pairs A_i and
                  the comparable pairs B_i that patient i is in
    variance      sum over groups g of n_g / (n_g - 1) Σ (part - mean of the group)²; groups are the classes, which
                  makes it DeLong's for two classes, or everybody
    test          z = difference / its standard error, two-sided; interval of one model by the logit, of a difference
                  plain

Over several hospitals: pairs within a hospital alone, each hospital weighted by its pairs; a model is not asked to rank
a patient of one scanner against one of another. Over several seeds: the mean of the seeds' values, and of the parts.

DeLong, DeLong & Clarke-Pearson (1988), Biometrics 44(3); Sun & Xu (2014), IEEE Signal Processing Letters 21(11); Efron
& Stein (1981); Pepe (2003), section 5.2.4 (logit).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...models.metrics import perfect_ends
from ...models.metrics.means import LEVEL, Interval
from ...models.metrics.outcome import pairs_apart

__all__ = [
    "FEW",
    "Difference",
    "Ranking",
    "auroc_ranking",
    "compare_ranked",
    "concordance_ranking",
    "ranked_gap",
    "ranked_interval",
]

FEW: Final = 10
"""Fewer patients of a class, or events, than this: the value is told with a warning, and ranks nobody."""
_Z: Final = float(stats.norm.ppf(0.5 + LEVEL / 2))

Values = NDArray[np.float64]
Classified = Mapping[str, tuple[int, Sequence[float]]]
"""Patient: true class, and probability of each class."""
Observed = Mapping[str, tuple[float, float, bool]]
"""Patient: predicted time (higher is better), time until the event or the end of observation, whether it was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A measure at one hospital with each patient's part in it.

    ``fewest`` is the number of patients of the rarest class, or of events. ``pairs`` weights the hospital. ``apart`` is
    the number of pairs that share no patient.
    """

    value: float
    patients: tuple[str, ...]
    parts: Values
    groups: NDArray[np.int64]
    pairs: float
    fewest: int
    apart: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Ours less theirs. ``p`` and ``p_not_worse`` are None where there is no variance, see ``note``."""

    difference: Interval
    p: float | None
    p_not_worse: float | None
    note: str


def auroc_ranking(patients: Classified) -> Ranking | None:
    """AUROC of a hospital's patients; None where fewer than two classes are present or a probability is not finite.

    Example:
        >>> found = auroc_ranking({"a": (0, [0.9, 0.1]), "b": (1, [0.6, 0.4]), "c": (0, [0.2, 0.8]), "d": (1, [0, 1])})
        >>> found.value, found.fewest
        (0.75, 2)
    """
    names = tuple(sorted(patients))
    targets = np.array([patients[name][0] for name in names], np.int64)
    scores = np.array([patients[name][1] for name in names], np.float64)
    present, counts = np.unique(targets, return_counts=True)
    if len(present) < 2 or not np.isfinite(scores).all():
        return None
    areas, parts = [], np.zeros(len(names))
    for label in present:
        positive = targets == label
        above, below = _components(scores[positive, label], scores[~positive, label])
        areas.append(float(above.mean()))
        parts[positive] += above / len(above)
        parts[~positive] += below / len(below)
    return Ranking(
        value=float(np.mean(areas)), patients=names, parts=parts / len(present), groups=targets,
        pairs=float(len(names) ** 2 - (counts**2).sum()) / 2, fewest=int(counts.min()),
        apart=int(counts.min()),
    )  # fmt: skip


def concordance_ranking(patients: Observed) -> Ranking | None:
    """Harrell's index of a hospital's patients; None where no pair can be compared or a prediction is not finite."""
    names = tuple(sorted(patients))
    predicted, time, seen = (np.array([patients[name][k] for name in names], np.float64) for k in range(3))
    if not names or not np.isfinite(predicted).all():
        return None
    event = seen > 0
    first = event[:, None] & ((time[None, :] > time[:, None]) | ((time[None, :] == time[:, None]) & ~event[None, :]))
    right = first * ((predicted[:, None] < predicted[None, :]) + 0.5 * (predicted[:, None] == predicted[None, :]))
    pairs = float(first.sum())
    if not pairs:
        return None
    value = float(right.sum() / pairs)
    parts = ((right.sum(0) + right.sum(1)) - value * (first.sum(0) + first.sum(1))) / pairs
    return Ranking(
        value=value, patients=names, parts=parts, groups=np.zeros(len(names), np.int64), pairs=pairs,
        fewest=int(event.sum()), apart=pairs_apart(time, event),
    )  # fmt: skip


def ranked_interval(hospitals: Sequence[Sequence[Ranking]]) -> Interval:
    """The measure over hospitals, each given once per seed, with its interval on the logit scale.

    Parts without spread have no interval. A value of 0 or 1 has the one of :func:`.perfect_ends`; over hospitals with
    weights w and k pairs apart, max(w / k) stands for 1 / k: the weighted mean is at least the weighted product.
    """
    value = round(_value(hospitals), 12)
    error = _error([_mean_parts(seeds) for seeds in hospitals], hospitals)
    n = sum(len(seeds[0].patients) for seeds in hospitals)
    if value in (0.0, 1.0):
        share = max(w / min(r.apart for r in seeds) for w, seeds in zip(_weights(hospitals), hospitals, strict=True))
        low, high = perfect_ends(value, 1 / share) or (None, None)
        return Interval(mean=value, low=low, high=high, n=n, method="pairs apart")
    if not error:
        return Interval(mean=value, low=None, high=None, n=n, method="none")
    centre, half = math.log(value / (1 - value)), _Z * error / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-min(max(x, -700.0), 700.0))) for x in (centre - half, centre + half))
    return Interval(mean=value, low=low, high=high, n=n, method="delong, logit")


def compare_ranked(
    ours: Sequence[Sequence[Ranking]], theirs: Sequence[Sequence[Ranking]], *, margin: float
) -> Difference:
    """Two models on the same patients of each hospital.

    Args:
        ours: per hospital, once per seed.
        theirs: the same hospitals and patients.
        margin: of "not worse than".

    Raises:
        ValueError: the patients are not the same.
    """
    for own, other in zip(ours, theirs, strict=True):
        if own[0].patients != other[0].patients:
            raise ValueError("a paired test needs the same patients from both models")
    difference = _value(ours) - _value(theirs)
    apart = [_mean_parts(own) - _mean_parts(other) for own, other in zip(ours, theirs, strict=True)]
    error = _error(apart, ours)
    n = sum(len(seeds[0].patients) for seeds in ours)
    fewest = min(ranking.fewest for seeds in ours for ranking in seeds)
    note = f"fewer than {FEW} of a class or events at a hospital: read it with care" if fewest < FEW else ""
    if error is None:
        return Difference(
            difference=Interval(mean=difference, low=None, high=None, n=n, method="none"), p=None, p_not_worse=None,
            note="one patient of a class: no variance, so no test",
        )  # fmt: skip
    if error < 1e-12:  # the models rank alike
        same = Interval(mean=difference, low=difference, high=difference, n=n, method="constant")
        return Difference(difference=same, p=1.0, p_not_worse=None, note="both rank the patients alike")
    half = _Z * error
    return Difference(
        difference=Interval(mean=difference, low=difference - half, high=difference + half, n=n, method="delong"),
        p=float(2 * stats.norm.sf(abs(difference) / error)),
        p_not_worse=float(stats.norm.sf((difference + margin) / error)),
        note=note,
    )


def ranked_gap(outside: Sequence[Sequence[Ranking]], inside: Sequence[Sequence[Ranking]]) -> Interval:
    """Difference of one model's values on different patients, outside less inside."""
    difference = _value(outside) - _value(inside)
    n = sum(len(seeds[0].patients) for seeds in (*outside, *inside))
    errors = [_error([_mean_parts(seeds) for seeds in group], group) for group in (outside, inside)]
    if errors[0] is None or errors[1] is None:
        return Interval(mean=difference, low=None, high=None, n=n, method="none")
    half = _Z * math.hypot(errors[0], errors[1])
    return Interval(mean=difference, low=difference - half, high=difference + half, n=n, method="delong")


def _components(positive: Values, negative: Values) -> tuple[Values, Values]:
    """Share of negatives below each positive, and of positives above each negative; ties count one half."""
    m, n = len(positive), len(negative)
    together: Any = stats.rankdata(np.concatenate([positive, negative]))
    above = (together[:m] - stats.rankdata(positive)) / n
    below = 1 - (together[m:] - stats.rankdata(negative)) / m
    return np.asarray(above, np.float64), np.asarray(below, np.float64)


def _weights(hospitals: Sequence[Sequence[Ranking]]) -> Values:
    pairs = np.array([seeds[0].pairs for seeds in hospitals])
    weights: Values = pairs / pairs.sum()
    return weights


def _value(hospitals: Sequence[Sequence[Ranking]]) -> float:
    means = [np.mean([ranking.value for ranking in seeds]) for seeds in hospitals]
    return float(np.dot(_weights(hospitals), means))


def _mean_parts(seeds: Sequence[Ranking]) -> Values:
    parts: Values = np.mean([ranking.parts for ranking in seeds], axis=0)
    return parts


def _error(parts: Sequence[Values], hospitals: Sequence[Sequence[Ranking]]) -> float | None:
    """Standard error of a weighted mean over hospitals; None where a group has one patient."""
    total = 0.0
    for weight, values, seeds in zip(_weights(hospitals), parts, hospitals, strict=True):
        for group in np.unique(seeds[0].groups):
            inside = values[seeds[0].groups == group]
            if len(inside) < 2:
                return None
            total += weight**2 * len(inside) * float(np.var(inside, ddof=1))
    return math.sqrt(total)
