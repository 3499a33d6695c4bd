# SPDX-License-Identifier: Apache-2.0
"""Intervals of a mean over patients, stratified by site, as results hold them.

They are those of :mod:`fedneuro.models.metrics.means`: a hospital and the coordinator compute the same numbers from the
same values.
"""

from typing import Any

from ...models.metrics.means import (
    FEWEST,
    LEVEL,
    Interval,
    Method,
    bootstrap_means,
    bounded_ends,
    expanded_level,
    finite,
    mean_interval,
    stratified_mean,
)

__all__ = [
    "FEWEST",
    "LEVEL",
    "Interval",
    "Method",
    "bootstrap_means",
    "bounded_ends",
    "estimate_json",
    "expanded_level",
    "finite",
    "mean_interval",
    "stratified_mean",
]


def estimate_json(interval: Interval) -> dict[str, Any]:
    """An interval as it stands in results: ``ci95`` is null where there is none."""
    ends = None if interval.low is None or interval.high is None else [interval.low, interval.high]
    return {
        "mean": interval.mean, "ci95": ends, "n": interval.n, "failed": interval.failed, "method": interval.method,
    }  # fmt: skip
