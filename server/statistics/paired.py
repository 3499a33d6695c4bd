# SPDX-License-Identifier: Apache-2.0
"""Two models on the same patients: the difference, its interval, and whether chance explains it.

Every patient is judged by both models, so the test is paired, and the patient is its unit. Sites are strata, never
units: with 3 to 5 sites the smallest p-value that a Wilcoxon test over sites can give is 0.25 to 0.0625.

    difference       mean over patients of (a - b), BCa interval from resampling patients within sites
    Wilcoxon         signed-rank over patients, exact for few of them without ties (SciPy). It asks whether differences
                     are symmetric about zero, which is what "the models are interchangeable" says
    bootstrap        two-sided p-value of the mean difference by inverting its percentile interval
    effect size      matched-pairs rank-biserial correlation, -1 (b always better) to 1 (a always better): the share of
                     the rank sum that favours a less the share that favours b (Kerby 2014); with its interval

Wilcoxon (1945), Biometrics Bulletin 1(6); Kerby (2014), Comprehensive Psychology 3(1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...models.metrics.means import LEVEL, Interval, Method, finite, mean_interval

__all__ = ["SMALLEST_TEST", "Paired", "compare_paired", "power_note", "rank_biserial", "signed_rank"]

SMALLEST_TEST: Final = 6
"""With fewer patients no Wilcoxon test can fall below 0.05, so none is made."""

Values = NDArray[np.float64]
_wilcoxon: Any = stats.wilcoxon  # its result is typed in part only
_CHUNK = 1 << 22  # resampled differences held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """What two models differ in. p-values are two-sided, before any adjustment; None: not computed, see ``note``."""

    difference: Interval
    median: float
    p_wilcoxon: float | None
    p_bootstrap: float | None
    effect: float
    effect_low: float | None
    effect_high: float | None
    note: str


def compare_paired(
    strata: Sequence[Sequence[float | None] | Values],
    *,
    seed: int,
    resamples: int = 2000,
    method: Method | None = None,
) -> Paired:
    """Compare two models by the differences of their values on each patient.

    Args:
        strata: (a - b) of each patient, one sequence per site; None and NaN are counted as failed.
        seed: of the resampling.
        resamples: at least 100.
        method: of the interval of the difference; None: BCa.

    Raises:
        ValueError: no finite difference at all.

    Example:
        >>> found = compare_paired([[0.1, 0.2, 0.15, 0.05, 0.12, 0.3, 0.22]], seed=0)
        >>> found.effect, round(found.p_wilcoxon, 4)
        (1.0, 0.0156)
    """
    difference = mean_interval(strata, seed=seed, resamples=resamples, method=method)
    samples = [values for values, _ in map(finite, strata) if len(values)]
    together = np.concatenate(samples)
    note = ""
    p_wilcoxon: float | None = None
    if len(together) < SMALLEST_TEST:
        least = 2.0 ** (1 - len(together))
        note = f"{len(together)} patients: no test, as its smallest possible p is {least:g}"
    else:
        p_wilcoxon = signed_rank(together)
    p_bootstrap = effect_low = effect_high = None
    if difference.low is not None and difference.method != "constant" and not note:
        means, effects = _resampled(samples, seed, resamples)
        below = min(float(np.mean(means <= 0)), float(np.mean(means >= 0)))
        p_bootstrap = min(1.0, 2 * max(below, 1 / (resamples + 1)))
        effect_low, effect_high = (float(q) for q in np.quantile(effects, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]))
    return Paired(
        difference=difference, median=float(np.median(together)), p_wilcoxon=p_wilcoxon, p_bootstrap=p_bootstrap,
        effect=float(rank_biserial(together)), effect_low=effect_low, effect_high=effect_high, note=note,
    )  # fmt: skip


def signed_rank(differences: Values) -> Any:
    """Two-sided p-values of Wilcoxon's signed-rank test, ``(patients,)`` or ``(tests, patients)``; 1 for zeros."""
    if differences.ndim == 1:
        if not differences.any():
            return 1.0
        return float(_wilcoxon(differences, zero_method="wilcox", method="auto").pvalue)
    # SciPy chooses one method for a whole table; a zero or a tie in one row must not change the others.
    ordered = np.sort(np.abs(differences), axis=-1)
    odd = (ordered[:, 0] == 0) | np.any(np.diff(ordered, axis=-1) == 0, axis=-1)
    found = np.empty(len(differences))
    if not odd.all():
        found[~odd] = _wilcoxon(differences[~odd], axis=-1, zero_method="wilcox", method="auto").pvalue
    for row in np.flatnonzero(odd):
        found[row] = signed_rank(differences[row])
    return found


def rank_biserial(differences: Values) -> Any:
    """Matched-pairs rank-biserial correlation along the last axis; 0 where every difference is zero."""
    ranks = stats.rankdata(np.where(differences == 0, 0.0, np.abs(differences)), axis=-1)
    zeros = np.sum(differences == 0, axis=-1, keepdims=True)
    ranks = np.where(differences == 0, 0.0, ranks - zeros)  # zeros rank lowest, and have no part
    total = ranks.sum(axis=-1)
    return np.divide((np.sign(differences) * ranks).sum(axis=-1), total, out=np.zeros_like(total), where=total > 0)


def _resampled(samples: Sequence[Values], seed: int, resamples: int) -> tuple[Values, Values]:
    """Mean difference and effect size of resamples of patients within sites."""
    random = np.random.default_rng([seed, 1])
    n = sum(map(len, samples))
    means, effects = np.empty(resamples), np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        rows = stop - start
        drawn = np.concatenate([v[random.integers(0, len(v), size=(rows, len(v)))] for v in samples], axis=1)
        means[start:stop], effects[start:stop] = drawn.mean(axis=1), rank_biserial(drawn)
    return means, effects


def power_note(difference: Interval) -> str:
    """What to say where the interval is wider than the difference that it belongs to; else an empty text.

    Example:
        >>> power_note(Interval(mean=0.02, low=-0.02, high=0.06, n=25))
        'the interval is wider than the difference; about 400 patients would make it as narrow'
    """
    if difference.low is None or difference.high is None:
        return "no interval: too few patients"
    width, size = difference.high - difference.low, abs(difference.mean)
    if width <= size:
        return ""
    if size < width / 30:
        return "the interval is far wider than the difference: this says little about which is better"
    needed = math.ceil(difference.n * (width / size) ** 2)
    return f"the interval is wider than the difference; about {needed} patients would make it as narrow"
