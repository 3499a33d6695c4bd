# SPDX-License-Identifier: Apache-2.0
"""The report's charts: which values of ``results.json`` go into which drawing of :mod:`.charts`."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any, Final

from markupsafe import Markup

from .charts import DASHES, STRONG_COLOURS, WEAK_COLOURS, DotRow, Mark, Series, Shape, dot_plot, line_chart
from .report_start import start_of, start_title
from .report_words import Json, curve_metric, is_unbounded, metric_name, number, unit_of, with_interval

__all__ = ["AXES", "COMPARED", "along", "dot_shapes", "dots_chart", "metric_curve", "train_curve"]

MOST_COLOURED: Final = len(WEAK_COLOURS)
COMPARED: Final[tuple[tuple[Shape, str], ...]] = (
    ("square", "□"), ("triangle", "△"), ("down", "▽"), ("tall", "▯"), ("flat", "▭"),
)  # fmt: skip
"""Shapes of the comparators in turn, and the characters that stand for them in the legend."""


def dots_chart(
    results: Json, names: Sequence[str], main: str, comparators: Sequence[tuple[str, Json]]
) -> Markup | None:
    """The chart of scores per hospital, with what they are compared with; None where there is no score."""
    rows = []
    for name in names:
        site, marks = results["sites"][name], []
        if main in site["metrics"]:
            own = site["metrics"][main]
            marks.append(
                Mark(value=own["mean"], interval=tuple(own["ci95"]), note=f"{name}: {with_interval(main, own)}")
            )
        if main in start_of(site):
            value = start_of(site)[main]["mean"]
            note = f"{name}, {start_title(results)}: {number(main, value)}"
            marks.append(Mark(value=value, shape="diamond", note=note))
        for (title, other), (shape, _) in zip(comparators, cycle(COMPARED), strict=False):
            estimate = other.get(name, {}).get("metrics", {}).get(main)
            if estimate:
                note = f"{name}, {title}: {number(main, estimate['mean'])}"
                marks.append(Mark(value=estimate["mean"], shape=shape, note=note))
        rows.append(DotRow(name=name, marks=marks, strong=site["role"] == "heldout"))
    if not any(row.marks for row in rows):
        return None
    title = _with_unit(main)
    return dot_plot(
        rows, label=f"{title} of each hospital", x_title=title, x_range=None if is_unbounded(main) else (0.0, 1.0)
    )


def dot_shapes(results: Json, comparators: Sequence[tuple[str, Json]], main: str) -> list[tuple[str, str]]:
    """What each shape of the dot chart means, as (character, text)."""
    shapes = [("●", "this model, bar: 95 % interval")]
    if any(main in start_of(site) for site in results["sites"].values()):
        shapes.append(("◇", start_title(results)))
    return shapes + [(sign, title) for (title, _), (_, sign) in zip(comparators, cycle(COMPARED), strict=False)]


AXES: Final = {"round": "round", "seconds": "seconds of computing", "bytes": "MB sent and received"}
"""What a curve may run along, and its title."""


def along(rounds: Sequence[Json], axis: str) -> list[float]:
    """Place of each round on an axis: its number, or what was used up to its end."""
    if axis == "round":
        return [float(record["round"]) for record in rounds]
    used, places = 0.0, []
    for record in rounds:
        if axis == "seconds":
            used += record["seconds"]
        else:
            used += record.get("bytes", record.get("bytes_down", 0) + record.get("bytes_up", 0)) / 1e6
        places.append(used)
    return places


def metric_curve(
    results: Json, training: Sequence[str], heldout: Sequence[str], main: str, axis: str = "round"
) -> Markup | None:
    """The headline metric of each hospital along an axis; None with fewer than two evaluated rounds."""
    key = curve_metric(results, main)
    places = along(results["rounds"], axis)
    by_round = {record["round"]: place for record, place in zip(results["rounds"], places, strict=True)}
    series = []
    for name in [*training, *heldout]:
        found = [
            (by_round[r["round"]], r["metrics"][name][key])
            for r in results["rounds"]
            if key in r["metrics"].get(name, {})
        ]
        strong = name in heldout
        look = _look(name, heldout if strong else training, strong=strong)
        band = [(at, *estimate["ci95"]) for at, estimate in found] if strong else []
        series.append(Series(name=name, points=[(n, e["mean"]) for n, e in found], band=band, **look))
    if max((len(line.points) for line in series), default=0) < 2:
        return None
    title = _with_unit(key)
    selected = results["selected_round"]
    marker = (by_round[selected], f"selected: {selected}") if selected in by_round else None
    y_range = None if is_unbounded(key) else (0.0, 1.0)
    label = f"{title} by {AXES[axis]}"
    return line_chart(series, label=label, x_title=AXES[axis], y_title=title, y_range=y_range, marker=marker)


def train_curve(results: Json, training: Sequence[str], key: str, title: str) -> Markup | None:
    """Loss, or ε spent, of each training hospital by round; None where it is not reported."""
    series = []
    for name in training:
        found = [(r["round"], r["train"].get(name, {}).get(key)) for r in results["rounds"]]
        points = [(at, value) for at, value in found if value is not None]
        series.append(Series(name=name, points=points, **_look(name, training, strong=False)))
    if not any(line.points for line in series):
        return None
    budget = results["effective_study"].get("privacy", {}).get("epsilon") if key == "epsilon" else None
    rule = (float(budget), f"budget {budget:g}") if budget else None
    return line_chart(series, label=f"{title} by round", x_title="round", y_title=title, rule=rule)


def _with_unit(key: str) -> str:
    return metric_name(key) + (f" in {unit_of(key)}" if unit_of(key) else "")


def _look(name: str, group: Sequence[str], *, strong: bool) -> dict[str, Any]:
    """Colour, dash and label of a hospital's line; beyond six training hospitals they share one look."""
    position = group.index(name)
    if strong:
        return {
            "colour": STRONG_COLOURS[position % len(STRONG_COLOURS)],
            "strong": True,
            "dash": DASHES[position % len(DASHES)],
            "labelled": position < MOST_COLOURED,
        }
    if len(group) > MOST_COLOURED:
        return {"colour": WEAK_COLOURS[-1], "labelled": False}
    return {"colour": WEAK_COLOURS[position], "dash": DASHES[position % len(DASHES)]}
