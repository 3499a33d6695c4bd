# SPDX-License-Identifier: Apache-2.0
"""Scores by age band, sex, vendor, field strength and the like; groups of few patients are suppressed."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from ...models.metrics.means import Interval, finite

__all__ = ["AGE_BANDS", "SMALLEST_CELL", "Traits", "age_band", "cell", "strata_rows"]

SMALLEST_CELL: Final = 5
"""Groups with fewer patients are shown as "<5"."""
AGE_BANDS: Final = (18, 40, 60, 80)

Traits = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Site: patient: trait: value."""


def age_band(text: str) -> str:
    """Band of an age in years, or an empty text where it is none.

    Example:
        >>> [age_band(text) for text in ("17", "18", "59.5", "90", "n/a")]
        ['<18', '18–39', '40–59', '≥80', '']
    """
    try:
        age = float(text)
    except ValueError:
        return ""
    if not 0 <= age < 130:
        return ""
    if age < AGE_BANDS[0]:
        return f"<{AGE_BANDS[0]}"
    for low, high in pairwise(AGE_BANDS):
        if age < high:
            return f"{low}–{high - 1}"
    return f"≥{AGE_BANDS[-1]}"


def cell(count: int) -> str:
    """A count of patients as it may be shown.

    Example:
        >>> [cell(n) for n in (0, 4, 5)]
        ['0', '<5', '5']
    """
    return str(count) if count == 0 or count >= SMALLEST_CELL else f"<{SMALLEST_CELL}"


def strata_rows(
    sites: Mapping[str, Mapping[str, float | None]],
    traits: Traits,
    *,
    interval: Callable[[Sequence[Sequence[float | None]]], Interval],
) -> list[dict[str, Any]]:
    """Mean and interval per trait and value over all sites, patients resampled within sites.

    Args:
        sites: site: patient: value of the headline metric.
        traits: of the patients.
        interval: of the mean over patients, from one sequence of values per site.
    """
    groups: dict[tuple[str, str], dict[str, list[float | None]]] = {}
    for site, patients in sites.items():
        for patient, value in patients.items():
            for trait, group in traits.get(site, {}).get(patient, {}).items():
                groups.setdefault((trait, group), {}).setdefault(site, []).append(value)
    rows: list[dict[str, Any]] = []
    for (trait, group), by_site in sorted(groups.items()):
        n = sum(map(len, by_site.values()))
        row: dict[str, Any] = {"trait": trait, "group": group, "patients": cell(n), "mean": None, "ci95": None}
        # Of those with a value: one of five whose others have none would be told as it is.
        if sum(len(finite(values)[0]) for values in by_site.values()) >= SMALLEST_CELL:
            found = interval(list(by_site.values()))
            ends = None if found.low is None or found.high is None else [found.low, found.high]
            row |= {"mean": found.mean, "ci95": ends}
        rows.append(row)
    # One trait value alone is no stratum.
    return [row for row in rows if sum(other["trait"] == row["trait"] for other in rows) > 1]
