# SPDX-License-Identifier: Apache-2.0
"""A study repeated with other seeds: a patient's value is the mean over them, their spread is told apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

__all__ = ["Patients", "Table", "known", "mean_over_seeds", "seed_rows"]

Patients = Mapping[str, float | None]
"""Value by patient; None where it is not a finite number."""
Table = Mapping[str, Mapping[str, Patients]]
"""Model: site: patients."""


def known(value: float | None) -> bool:
    """Whether it is a finite number."""
    return value is not None and math.isfinite(value)


def mean_over_seeds(by_seed: Sequence[Table]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Per patient the mean over seeds; None if any seed's value is not finite."""
    found: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for table in by_seed:
        for model, sites in table.items():
            for site, patients in sites.items():
                for patient, value in patients.items():
                    found.setdefault(model, {}).setdefault(site, {}).setdefault(patient, []).append(value)
    return {
        model: {
            site: {
                patient: fmean(v for v in values if v is not None) if all(map(known, values)) else None
                for patient, values in sorted(patients.items())
            }
            for site, patients in sites.items()
        }
        for model, sites in found.items()
    }


def seed_rows(by_seed: Sequence[Table], titles: Iterable[str], sites: Sequence[str]) -> list[dict[str, Any]]:
    """Spread over seeds of each model's mean, per site; empty with one seed."""
    rows = []
    for model in titles if len(by_seed) > 1 else ():
        for site in sites:
            means = []
            for table in by_seed:
                values = [v for v in table.get(model, {}).get(site, {}).values() if v is not None and known(v)]
                means += [fmean(values)] if values else []
            if len(means) > 1:
                rows.append(
                    {
                        "model": model, "site": site, "seeds": len(means), "mean": fmean(means), "sd": stdev(means),
                        "lowest": min(means), "highest": max(means),
                    }
                )  # fmt: skip
    return rows
