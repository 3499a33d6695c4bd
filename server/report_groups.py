# SPDX-License-Identifier: Apache-2.0
"""What hospitals return besides means: groups of patients, lesion sizes, calibration, failures, as report sections."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from .charts import DASHES, STRONG_COLOURS, WEAK_COLOURS, Series, line_chart
from .report_words import Json, metric_keys, metric_name, with_interval

__all__ = ["calibration", "failures", "groups"]


def groups(results: Json, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of (hospital, what, group, value, patients): strata of the first metric, and lesions by size.

    Args:
        results: of a run.
        names: hospitals, in the order of the page.
    """
    first = metric_keys(results)[0]
    rows = []
    for name in names:
        site = results["sites"][name]
        for stratum, cells in site.get("strata", {}).items():
            rows += [_row(name, first, stratum, cell, estimate) for cell, estimate in cells.items()]
        for size, estimate in site.get("lesion_sizes", {}).items():
            rows.append(_row(name, "lesion_sensitivity", "lesion size", size, estimate))
    return rows


def _row(site: str, metric: str, what: str, group: str, estimate: Json) -> dict[str, Any]:
    return {
        "site": site, "metric": metric_name(metric), "what": what, "group": group,
        "value": with_interval(metric, estimate), "n": estimate["n"],
    }  # fmt: skip


def calibration(results: Json, names: Sequence[str]) -> Markup | None:
    """Observed against predicted probability of every hospital that returned its curve; None where none did."""
    series = []
    heldout = [name for name in names if results["sites"][name]["role"] == "heldout"]
    for position, name in enumerate(names):
        points = results["sites"][name].get("reliability") or []
        strong = name in heldout
        colours = STRONG_COLOURS if strong else WEAK_COLOURS
        series.append(
            Series(
                name=name, points=[(p["predicted"], p["observed"]["mean"]) for p in points], strong=strong,
                colour=colours[position % len(colours)], dash=DASHES[position % len(DASHES)],
            )
        )  # fmt: skip
    if not any(line.points for line in series):
        return None
    ideal = Series(name="ideal", points=[(0.0, 0.0), (1.0, 1.0)], colour="#7c8796", dash="3 3")
    label = "observed frequency by predicted probability"
    return line_chart([*series, ideal], label=label, x_title="predicted", y_title="observed", y_range=(0.0, 1.0))


def failures(results: Json, names: Sequence[str]) -> list[tuple[str, str]]:
    """Hospitals at which inference failed on patients, and how often; such patients are counted, not dropped."""
    return [
        (
            name,
            f"inference failed on {100 * found['mean']:.1f} % of {found['n']} patients; each has the worst value",
        )
        for name in names
        if (found := results["sites"][name].get("failures")) and found["mean"] > 0
    ]
