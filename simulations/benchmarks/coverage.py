# SPDX-License-Identifier: Apache-2.0
"""Do the intervals cover, and does the family of tests keep its error? Simulated federations whose truth is known.

Each federation draws patients at several sites from distributions whose means are known; sites differ. Five shapes:

    dice       0.92 of patients Beta(9, 2) about a mean of 0.8, 0.08 failures Beta(1, 8): left-skewed, as Dice is
    zeros      a quarter of the patients 0, the others Beta(10, 2): small lesions that are found or missed
    high       Beta(20, 1), a mean of 0.95: an easy structure
    normal     as a textbook has it
    distance   log-normal, σ = 0.6: right-skewed, as HD95 is

*Coverage*: the share of federations whose 95 % interval holds the true mean, for one site and for all of them pooled.
*Differences*: the same of ours less theirs at one site, where each model fails now and then on a patient.
*Family error*: four models that are interchangeable with ours (the null is true) at each site, one Holm family of all
tests; the share of federations with any finding. The same with a real difference shows that the tests do find.

The functions are those of :mod:`fedneuro.server.statistics`, called for many federations at a time.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...models.metrics.means import LEVEL, bootstrap_means, bounded_ends, expanded_level
from ...server.statistics import Moments, holm, moments_interval
from ...server.statistics.paired import signed_rank

__all__ = ["bench_coverage", "difference_coverage", "family_error", "interval_coverage", "markdown"]

Values = NDArray[np.float64]

SITES: Final = 3
PATIENTS: Final = (5, 10, 20, 30, 60)
RESAMPLES: Final = 999
TARGET: Final = (0.93, 0.97)
ENOUGH: Final = 30
"""Patients per site from which the target holds."""
FAMILY_TARGET: Final = 0.055
MODELS: Final = 4
_AT_ONCE: Final = 250


def _dice(random: np.random.Generator, size: tuple[int, int], site: int) -> Values:
    good = random.beta(9.0 - site, 2.0, size)
    return np.where(random.random(size) < 0.08, random.beta(1.0, 8.0, size), good)


def _zeros(random: np.random.Generator, size: tuple[int, int], site: int) -> Values:
    return np.where(random.random(size) < 0.25, 0.0, random.beta(10.0 - site, 2.0, size))


def _high(random: np.random.Generator, size: tuple[int, int], site: int) -> Values:
    return random.beta(20.0 - 4 * site, 1.0, size)


def _normal(random: np.random.Generator, size: tuple[int, int], site: int) -> Values:
    return random.normal(0.1 * site, 1.0, size)


def _distance(random: np.random.Generator, size: tuple[int, int], site: int) -> Values:
    return random.lognormal(1.0 + 0.2 * site, 0.6, size)


Draw = Callable[[np.random.Generator, tuple[int, int], int], Values]
SHAPES: Final[dict[str, tuple[Draw, Callable[[int], float]]]] = {
    "dice": (_dice, lambda site: 0.92 * (9.0 - site) / (11.0 - site) + 0.08 / 9.0),
    "zeros": (_zeros, lambda site: 0.75 * (10.0 - site) / (12.0 - site)),
    "high": (_high, lambda site: (20.0 - 4 * site) / (21.0 - 4 * site)),
    "normal": (_normal, lambda site: 0.1 * site),
    "distance": (_distance, lambda site: float(np.exp(1.0 + 0.2 * site + 0.6**2 / 2))),
}
"""Shape: how a site's patients are drawn ``(federations, patients)``, and their true mean."""
BOUNDED: Final = frozenset({"dice", "zeros", "high"})
"""Shapes whose values are known to lie between 0 and 1."""
FAIL: Final = ((0.0, 0.0), (0.04, 0.04), (0.08, 0.08), (0.0, 0.04))
"""Shares of patients on whom ours and theirs fail."""
GAIN, SPREAD, LOST = 0.02, 0.03, 0.9
"""Mean and SD of the difference where neither fails; a failure loses a Dice of so much times Beta(8, 2)."""


def bench_coverage(json_path: Path | None = None, *, federations: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Coverage of intervals and error of families; returns (and saves) the figures.

    Args:
        json_path: file of the figures.
        federations: simulated federations per cell; the standard error of a share near 0.95 is 0.005 at 2,000.
        seed: of everything drawn.
    """
    started = time.monotonic()
    coverage = [
        row
        for shape in SHAPES
        for patients in PATIENTS
        for row in interval_coverage(shape, patients, federations=federations, seed=seed)
    ]
    differences = [
        row
        for patients in PATIENTS
        if patients >= ENOUGH
        for ours, theirs in FAIL
        for row in difference_coverage(patients, ours, theirs, federations=federations, seed=seed)
    ]
    families = [family_error(n, federations=federations, seed=seed, shift=shift) for n in (10, 30) for shift in (0, 1)]
    judged = [row for row in coverage if row["patients"] >= ENOUGH and row["method"] == "auto"]
    low, high = TARGET
    found = {
        "federations": federations,
        "sites": SITES,
        "resamples": RESAMPLES,
        "coverage": coverage,
        "differences": differences,
        "families": families,
        "target": {
            "coverage": list(TARGET),
            "from_patients": ENOUGH,
            "missed": [row for row in judged if not low <= row["coverage"] <= high],
            "family_error": FAMILY_TARGET,
            "family_kept": all(row["any_finding"] <= FAMILY_TARGET for row in families if not row["shift"]),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def interval_coverage(shape: str, patients: int, *, federations: int, seed: int) -> list[dict[str, Any]]:
    """Share of federations whose interval holds the truth, one row per method, for one site and for all pooled."""
    draw, truth_of = SHAPES[shape]
    random = np.random.default_rng([seed, patients, *shape.encode()])
    sites = [draw(random, (federations, patients), site) for site in range(SITES)]
    rows = []
    for scope, samples in (("one site", sites[:1]), ("all sites", sites)):
        truth = float(np.mean([truth_of(site) for site in range(len(samples))]))
        for method, (low, high) in _intervals(samples, seed, bounded=shape in BOUNDED).items():
            rows.append(
                {
                    "shape": shape, "patients": patients, "scope": scope, "method": method,
                    "coverage": float(np.mean((low <= truth) & (truth <= high))),
                    "width": float(np.mean(high - low)),
                }
            )  # fmt: skip
    return rows


def _intervals(
    samples: Sequence[Values], seed: int, *, bounded: bool, bounds: tuple[float, float] = (0.0, 1.0)
) -> dict[str, tuple[Values, Values]]:
    """Ends of each federation's interval by method.

    ``auto`` is what reports have; ``plain percentile`` is without the expanded level.
    """
    n, level = sum(values.shape[1] for values in samples), LEVEL
    wider = expanded_level(n, len(samples))
    methods: dict[str, tuple[Any, float]] = {
        "bca": ("bca", wider), "percentile": ("percentile", wider), "plain percentile": ("percentile", level),
    }  # fmt: skip
    starts = range(0, len(samples[0]), _AT_ONCE)
    found: dict[str, tuple[Values, Values]] = {}
    for name, (method, wanted) in methods.items():
        parts = [
            bootstrap_means(
                [values[start : start + _AT_ONCE] for values in samples],
                level=wanted, resamples=RESAMPLES, method=method, seed=seed + start,
            )
            for start in starts
        ]  # fmt: skip
        found[name] = (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    found["auto"] = found["bca"]
    if bounded:
        ends = [
            bounded_ends(
                [values[start : start + _AT_ONCE] for values in samples],
                bounds=bounds, level=level, resamples=RESAMPLES, seed=seed + start,
            )
            for start in starts
        ]  # fmt: skip
        found["auto"] = (np.concatenate([low for low, _ in ends]), np.concatenate([high for _, high in ends]))
    students = [
        moments_interval(
            [Moments(n=len(v[k]), mean=float(v[k].mean()), variance=float(v[k].var(ddof=1))) for v in samples]
        )
        for k in range(len(samples[0]))
    ]
    found["moments"] = (np.array([s.low for s in students]), np.array([s.high for s in students]))
    return found


def difference_coverage(
    patients: int, ours: float, theirs: float, *, federations: int, seed: int
) -> list[dict[str, Any]]:
    """Share of cohorts whose interval of a paired difference holds the truth, one row per method, at one site.

    Args:
        patients: of a cohort.
        ours: share of patients on whom our model fails; independent of ``theirs``.
        theirs: share on whom the other one fails.
        federations: cohorts.
        seed: of everything drawn.
    """
    random = np.random.default_rng([seed, patients, round(1000 * ours), round(1000 * theirs), 3])
    shape = (federations, patients)
    failed, other = random.random(shape) < ours, random.random(shape) < theirs
    lost = LOST * random.beta(8.0, 2.0, shape)
    values = np.where(failed | other, lost * (other * 1.0 - failed), random.normal(GAIN, SPREAD, shape))
    truth = GAIN * (1 - ours) * (1 - theirs) + LOST * 0.8 * (theirs - ours)
    found = _intervals([values], seed, bounded=True, bounds=(-1.0, 1.0))
    found["unseen halves"] = found.pop("auto")
    return [
        {
            "patients": patients, "ours": ours, "theirs": theirs, "method": method,
            "coverage": float(np.mean((low <= truth) & (truth <= high))), "width": float(np.mean(high - low)),
        }
        for method, (low, high) in found.items()
    ]  # fmt: skip


def family_error(patients: int, *, federations: int, seed: int, shift: float) -> dict[str, Any]:
    """Share of federations with any finding among all models × sites, by Wilcoxon and Holm.

    A patient's difficulty is shared by all models, and ours is in every comparison, so the tests depend on each other.

    Args:
        patients: per site.
        federations: how many.
        seed: of everything drawn.
        shift: how much better ours is, in standard deviations of a model's own noise; 0: the null is true.
    """
    random = np.random.default_rng([seed, patients, int(10 * shift)])
    p_values: dict[tuple[int, int], Values] = {}
    for site in range(SITES):
        difficulty = random.normal(size=(federations, patients))
        ours = difficulty + random.normal(shift, 1.0, size=difficulty.shape)
        for model in range(MODELS):
            theirs = difficulty + random.normal(0.0, 1.0, size=difficulty.shape)
            p_values[site, model] = signed_rank(ours - theirs)
    findings = [
        sum(p < 1 - LEVEL for p in holm({key: float(values[k]) for key, values in p_values.items()}).values())
        for k in range(federations)
    ]
    return {
        "patients": patients,
        "tests": len(p_values),
        "shift": shift,
        "any_finding": float(np.mean(np.array(findings) > 0)),
        "share_found": float(np.mean(findings)) / len(p_values),
    }


def markdown(found: dict[str, Any]) -> str:
    """The tables as ``docs/evidence.md`` holds them."""
    methods = ("auto", "bca", "percentile", "plain percentile", "moments")
    cells = {(r["shape"], r["scope"], r["patients"], r["method"]): r["coverage"] for r in found["coverage"]}
    widths = {(r["shape"], r["scope"], r["patients"], r["method"]): r["width"] for r in found["coverage"]}
    lines = [
        "| values | interval of | patients per site | as reported | its width, BCa = 1 | BCa | percentile | plain "
        "percentile | moments |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, scope, n in dict.fromkeys(key[:3] for key in cells):
        first, *others = (f"{100 * cells[shape, scope, n, method]:.1f} %" for method in methods)
        wide = widths[shape, scope, n, "auto"] / widths[shape, scope, n, "bca"]
        lines.append(f"| {shape} | {scope} | {n} | {first} | {wide:.2f} | {' | '.join(others)} |")
    lines += [
        "",
        "| patients | failures, ours and theirs | BCa (as reported) | percentile | Student | with unseen halves | its "
        "width, BCa = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    apart = {(r["patients"], r["ours"], r["theirs"], r["method"]): r for r in found["differences"]}
    for n, ours, theirs in dict.fromkeys(key[:3] for key in apart):
        rows = [apart[n, ours, theirs, m] for m in ("bca", "percentile", "moments", "unseen halves")]
        shares = " | ".join(f"{100 * row['coverage']:.1f} %" for row in rows)
        fail, wide = f"{100 * ours:g} %, {100 * theirs:g} %", rows[-1]["width"] / rows[0]["width"]
        lines.append(f"| {n} | {fail} | {shares} | {wide:.2f} |")
    lines += [
        "",
        "| patients per site | tests | true difference | any finding | tests that find |",
        "|---|---|---|---|---|",
    ]
    for row in found["families"]:
        truth = "none" if not row["shift"] else f"{row['shift']:g} SD"
        lines.append(
            f"| {row['patients']} | {row['tests']} | {truth} | {100 * row['any_finding']:.1f} % | "
            f"{100 * row['share_found']:.1f} % |"
        )
    return "\n".join(lines)
