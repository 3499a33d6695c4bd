# SPDX-License-Identifier: Apache-2.0
"""What a site's names of metrics become in ``results.json``: metrics of all patients, and what covers some of them.

The names are those of :mod:`fedneuro.privacy.released`; the site has decided which of them leave.
"""

from collections.abc import Mapping
from typing import Any

from ..privacy.released import FAILURES, THRESHOLD, split_cells

__all__ = ["site_results"]


def site_results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A site's entry in ``sites``, as far as its metrics go.

    Args:
        metrics: estimates as JSON values, by the name under which they left the site.

    Returns:
        ``metrics`` by name; ``failures``, an estimate of the share of patients on whom inference failed, or None where
        it never did; ``threshold``, or None; ``lesion_sizes`` by size; ``reliability``, the points of the curve;
        ``strata`` by stratum and cell.
    """
    whole, cells = split_cells(metrics)
    failures, threshold = whole.pop(FAILURES, None), whole.pop(THRESHOLD, None)
    found: dict[str, Any] = {
        "metrics": whole,
        "failures": failures,
        "threshold": threshold["mean"] if threshold else None,
        "lesion_sizes": {},
        "reliability": [],
        "strata": {},
    }
    points: dict[int, dict[str, Any]] = {}
    for name, estimate in cells.items():
        first, *rest = name.split(":")
        if first == "reliability":
            points.setdefault(int(rest[1]), {})[rest[0]] = estimate
        elif len(rest) == 1:
            found["lesion_sizes"][rest[0]] = estimate
        else:
            found["strata"].setdefault(rest[0], {})[rest[1]] = estimate
    found["reliability"] = [
        {"bin": number, "predicted": point["predicted"]["mean"], "observed": point["observed"]}
        for number, point in sorted(points.items())
        if {"predicted", "observed"} <= set(point)
    ]
    return found
