# SPDX-License-Identifier: Apache-2.0
"""Two charts as inline SVG: lines over rounds, and a dot with its interval per hospital.

A page with these needs no script, no font and no file beside it. In print without colours, lines are told apart by
their dashes, and by their names: a thin line leads from each line's end to its name where that had to make room. Text
from results is escaped here, because a template passes SVG on as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from markupsafe import Markup

__all__ = ["DASHES", "STRONG_COLOURS", "WEAK_COLOURS", "DotRow", "Mark", "Series", "Shape", "dot_plot", "line_chart"]

Shape = Literal["dot", "diamond", "square", "triangle", "down", "tall", "flat"]

WEAK_COLOURS: Final = ("#1f5fa8", "#0b7a62", "#7a4fa3", "#806200", "#3a8fbf", "#5b6675")
STRONG_COLOURS: Final = ("#c8440b", "#a81c62", "#7d2a00")
DASHES: Final = ("", "6 3", "2 3", "8 3 2 3")

WIDTH: Final = 480
"""Units of the view box. Charts scale with the page; at this width text stays readable on a phone."""
LINE_HEIGHT: Final = 250
LEFT, RIGHT, TOP, BOTTOM = 44, 118, 14, 38
LABEL_STEP: Final = 14
MOST_POINTS: Final = 400
"""Longer series are thinned: a page has no more pixels than this."""
LONGEST_NAME: Final = 15
OUTLINES: Final = {
    "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
    "triangle": ((0, -6), (5.5, 4.5), (-5.5, 4.5)),
    "down": ((0, 6), (5.5, -4.5), (-5.5, -4.5)),
    "tall": ((-2.5, -6), (2.5, -6), (2.5, 6), (-2.5, 6)),
    "flat": ((-6, -2.5), (6, -2.5), (6, 2.5), (-6, 2.5)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. ``points`` are (x, y), ``band`` is (x, low, high); ``strong`` lines are thick and drawn last."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    band: Sequence[tuple[float, float, float]] = ()
    strong: bool = False
    dash: str = ""
    labelled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One value of a row, with its interval where it has one."""

    value: float
    shape: Shape = "dot"
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DotRow:
    """A hospital's marks; ``strong`` rows are emphasised."""

    name: str
    marks: Sequence[Mark]
    strong: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_title: str,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    marker: tuple[float, str] | None = None,
    rule: tuple[float, str] | None = None,
) -> Markup:
    """Lines over a common axis.

    Args:
        series: at least one point in all.
        label: what the chart shows, for screen readers.
        x_title: name of the horizontal axis.
        y_title: name of the vertical axis.
        y_range: least and greatest value; by default from 0 (or less) to what is drawn.
        marker: a vertical line at x, with its text.
        rule: a horizontal line at y, with its text.
    """
    xs = [x for line in series for x, _ in line.points] or [0.0]
    ys = [y for line in series for _, y in line.points] + ([rule[0]] if rule else [])
    low, high = y_range or (min(0.0, *ys, 0.0), max(*ys, 1e-9, 1e-9) * 1.05)
    right = WIDTH - (RIGHT if any(line.labelled for line in series) else 18)
    x_axis = _Scale(min(xs), max(xs), LEFT, right)
    y_axis = _Scale(low, high, LINE_HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis, x_title, y_title, LINE_HEIGHT)]
    if marker:
        x = x_axis(marker[0])
        end = x > (LEFT + right) / 2
        parts.append(
            Markup('<line class="marker" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                x, TOP, LINE_HEIGHT - BOTTOM
            )
        )
        parts.append(_text(x + (-4 if end else 4), TOP + 9, marker[1], "end" if end else "start", "note"))
    if rule:
        y = y_axis(rule[0])
        parts.append(Markup('<line class="marker" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, y, y))
        parts.append(_text(LEFT + 4, y + 12, rule[1], "start", "note"))
    ends: list[tuple[float, float, Series]] = []
    for line in sorted(series, key=lambda one: one.strong):
        if not line.points:
            continue
        parts += _line(line, x_axis, y_axis)
        if line.labelled:
            ends.append((y_axis(line.points[-1][1]), x_axis(line.points[-1][0]), line))
    parts += _end_labels(ends)
    return _svg(parts, LINE_HEIGHT, label)


def dot_plot(rows: Sequence[DotRow], *, label: str, x_title: str, x_range: tuple[float, float] | None = None) -> Markup:
    """One row per hospital: dots with intervals, and what they are compared with.

    Args:
        rows: from top to bottom.
        label: what the chart shows, for screen readers.
        x_title: name of the axis.
        x_range: least and greatest value; by default from 0 to what is drawn.
    """
    left, step = 128, 30
    height = TOP + step * len(rows) + BOTTOM
    highest = max(
        (max(m.value, *(m.interval or ())) if m.interval else m.value for r in rows for m in r.marks), default=1.0
    )
    x_axis = _Scale(*(x_range or (0.0, max(highest, 1e-9) * 1.05)), left, WIDTH - 18)
    parts: list[Markup] = []
    for tick in _ticks(x_axis.low, x_axis.high):
        x = x_axis(tick)
        parts.append(
            Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, TOP, height - BOTTOM)
        )
        parts.append(_text(x, height - BOTTOM + 16, f"{tick:g}", "middle"))
    parts.append(_text((left + WIDTH - 18) / 2, height - 5, x_title, "middle", "axis"))
    for number, row in enumerate(rows):
        y = TOP + step * (number + 0.5)
        colour = STRONG_COLOURS[0] if row.strong else WEAK_COLOURS[0]
        parts.append(_text(left - 12, y + 4, row.name, "end", "strong" if row.strong else ""))
        # Comparators first: the model's own dot lies on top.
        for mark in sorted(row.marks, key=lambda one: one.shape == "dot"):
            parts += _mark(mark, x_axis, y, colour)
    return _svg(parts, height, label)


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to units of the view box; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high <= self.low:
            return (self.start + self.end) / 2
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _ticks(low: float, high: float, most: int = 6, *, whole: bool = False) -> list[float]:
    """At most ``most`` round values (whole ones on request) from ``low`` to ``high``."""
    if high <= low:
        return [low]
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(x_axis: _Scale, y_axis: _Scale, x_title: str, y_title: str, height: int) -> Markup:
    parts = []
    for tick in _ticks(y_axis.low, y_axis.high):
        y = y_axis(tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, x_axis.end, y, y)
        )
        parts.append(_text(LEFT - 7, y + 4, f"{tick:g}", "end"))
    ticks = _ticks(x_axis.low, x_axis.high, whole=x_axis.high - x_axis.low >= 1)
    parts += [_text(x_axis(tick), height - BOTTOM + 16, f"{tick:g}", "middle") for tick in ticks]
    parts.append(_text((LEFT + x_axis.end) / 2, height - 5, x_title, "middle", "axis"))
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        Markup('<text class="axis" text-anchor="middle" transform="translate(11 {:.1f}) rotate(-90)">{}</text>').format(
            middle, y_title
        )
    )
    return Markup("").join(parts)


def _line(line: Series, x_axis: _Scale, y_axis: _Scale) -> list[Markup]:
    parts = []
    if line.band:
        edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        parts.append(
            Markup('<polygon points="{}" fill="{}" opacity=".14"/>').format(_points(edge, x_axis, y_axis), line.colour)
        )
    shown = list(line.points)
    if len(shown) > MOST_POINTS:
        stride = math.ceil(len(shown) / MOST_POINTS)
        shown = [*shown[:-1:stride], shown[-1]]
    parts.append(
        Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="{}" stroke-dasharray="{}"/>').format(
            _points(shown, x_axis, y_axis), line.colour, 3 if line.strong else 1.6, line.dash
        )
    )
    if len(shown) <= 30:
        radius = 3.2 if line.strong else 2.0
        parts += [
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}"/>').format(
                x_axis(x), y_axis(y), radius, line.colour
            )
            for x, y in shown
        ]
    return parts


def _points(pairs: Sequence[tuple[float, float]], x_axis: _Scale, y_axis: _Scale) -> str:
    return " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in pairs)


def _end_labels(ends: list[tuple[float, float, Series]]) -> list[Markup]:
    """Names right of the lines' ends, pushed apart so that none covers another; a thin line leads to each."""
    ends.sort(key=lambda end: end[0])
    places = [y for y, _, _ in ends]
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + LABEL_STEP)
    over = places[-1] - (LINE_HEIGHT - BOTTOM) if places else 0.0
    if over > 0:
        places = [y - over for y in places]
        for k in range(len(places) - 1, 0, -1):
            places[k - 1] = min(places[k - 1], places[k] - LABEL_STEP)
    parts: list[Markup] = []
    for place, (y, x, line) in zip(places, ends, strict=True):
        parts.append(
            Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{}" y2="{:.1f}" stroke="{}" stroke-width=".7"/>').format(
                x, y, WIDTH - RIGHT + 7, place, line.colour
            )
        )
        kind = "strong" if line.strong else ""
        parts.append(_text(WIDTH - RIGHT + 9, place + 4, line.name, "start", kind, line.colour))
    return parts


def _mark(mark: Mark, x_axis: _Scale, y: float, colour: str) -> list[Markup]:
    x, parts = x_axis(mark.value), []
    if mark.interval:
        low, high = (x_axis(edge) for edge in mark.interval)
        parts.append(
            Markup(
                '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}" stroke-width="3" opacity=".45"/>'
            ).format(low, high, y, y, colour)
        )
    if mark.shape == "dot":
        shape = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5.5" fill="{}">').format(x, y, colour)
        close = Markup("</circle>")
    else:
        points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in OUTLINES[mark.shape])
        shape = Markup('<polygon points="{}" class="hollow">').format(points)
        close = Markup("</polygon>")
    return [*parts, shape + Markup("<title>{}</title>").format(mark.note) + close]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "", colour: str = "") -> Markup:
    style = Markup(' fill="{}"').format(colour) if colour else Markup("")
    short = text if len(text) <= LONGEST_NAME or kind in ("axis", "note") else text[: LONGEST_NAME - 1] + "…"
    title = Markup("<title>{}</title>").format(text) if short != text else Markup("")
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}"{}>{}{}</text>').format(
        x, y, anchor, kind, style, title, short
    )


def _svg(parts: Sequence[Markup], height: float, label: str) -> Markup:
    body = Markup("").join(parts)
    return (
        Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, label)
        + body
        + Markup("</svg>")
    )
