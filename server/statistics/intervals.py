# SPDX-License-Identifier: Apache-2.0
"""How an interval of :mod:`fedneuro.models.metrics.means` stands in results."""

from typing import Any

from ...models.metrics.means import Interval

__all__ = ["estimate_json"]


def estimate_json(interval: Interval) -> dict[str, Any]:
    """An interval as it stands in results: ``ci95`` is null where there is none."""
    ends = None if interval.low is None or interval.high is None else [interval.low, interval.high]
    return {
        "mean": interval.mean, "ci95": ends, "n": interval.n, "failed": interval.failed, "method": interval.method,
    }  # fmt: skip
