# SPDX-License-Identifier: Apache-2.0
"""The report of a check as one page without scripts that loads nothing: findings, pictures, histograms, geometry."""

import base64
import os
import tempfile
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ....privacy.errors import EnvironmentProblem
from .catalogue import CATALOGUE
from .checking import Report
from .look import Look

__all__ = ["render_page", "write_text"]

MOST: Final = 12
"""Findings of one kind that are listed on the page."""
_WIDTH, _HEIGHT, _EDGE = 320, 180, 28


def render_page(report: Report) -> str:
    """The page's text."""
    environment = Environment(
        loader=PackageLoader("fedneuro.client.data.quality", ""), autoescape=True, undefined=StrictUndefined
    )
    groups = [(CATALOGUE[check], list(found)) for check, found in groupby(report.findings, key=lambda f: f.check)]
    counts = report.counts()
    images = [look for look in report.looks if not look.file.is_mask]
    return environment.get_template("report.html").render(
        report=report,
        counts=counts,
        groups=groups,
        most=MOST,
        checks=len(CATALOGUE),
        tiles=[
            ("patients", len(report.patients)),
            ("images", len(images)),
            ("masks", len(report.looks) - len(images)),
            ("findings that block", counts["blocks"]),
            ("warnings", counts["warns"]),
            ("notes", counts["notes"]),
        ],
        pictures=[(name, base64.b64encode(data).decode()) for name, data in report.pictures.items()],
        charts=_charts(images),
    )


def _charts(images: list[Look]) -> list[tuple[str, Markup]]:
    by_what: dict[str, list[Look]] = defaultdict(list)
    for look in images:
        by_what[look.file.what].append(look)
    charts = []
    for what, looks in sorted(by_what.items()):
        if any(look.histogram[1] for look in looks):
            charts.append((f"{what}: grey values of the head, one line per image", _histograms(looks)))
        charts.append((f"{what}: largest voxel side against largest extent, one dot per image", _geometry(looks)))
    return charts


def _histograms(looks: list[Look]) -> Markup:
    lines = []
    low = min(look.quantiles[0] for look in looks if look.quantiles)
    high = max(look.quantiles[-1] for look in looks if look.quantiles)
    for look in looks:
        edges, counts = look.histogram
        if not counts:
            continue
        top = max(counts)
        points = " ".join(
            f"{_EDGE + (min(max(e, low), high) - low) / max(high - low, 1e-12) * (_WIDTH - _EDGE):.1f},"
            f"{(_HEIGHT - _EDGE) * (1 - n / top) + 4:.1f}"
            for e, n in zip(edges, counts, strict=False)
        )
        lines.append(Markup('<polyline class="line" points="{}"/>').format(points))
    return _frame(lines, f"{low:.4g}", f"{high:.4g}", "", "")


def _geometry(looks: list[Look]) -> Markup:
    sides = np.array([max(look.facts.sizes) for look in looks])
    extents = np.array([max(n * s for n, s in zip(look.facts.shape, look.facts.sizes, strict=False)) for look in looks])
    spans = [(float(v.min()), float(v.max())) for v in (sides, extents)]
    spans = [(low - 0.05 * (high - low or high), high + 0.05 * (high - low or high)) for low, high in spans]
    dots = []
    for side, extent in zip(sides, extents, strict=True):
        x = _EDGE + (side - spans[0][0]) / (spans[0][1] - spans[0][0] or 1) * (_WIDTH - _EDGE)
        y = (_HEIGHT - _EDGE) * (1 - (extent - spans[1][0]) / (spans[1][1] - spans[1][0] or 1))
        dots.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="dot"/>').format(float(x), float(y)))
    return _frame(dots, *(f"{value:.3g}" for span in spans for value in span))


def _frame(marks: list[Markup], left: str, right: str, bottom: str, top: str) -> Markup:
    base = _HEIGHT - _EDGE + 4
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img"><path d="M{e} 4V{b}H{w}" class="axis"/>{marks}'
        '<text x="{e}" y="{t}">{left}</text><text x="{w}" y="{t}" text-anchor="end">{right}</text>'
        '<text x="0" y="{b}">{bottom}</text><text x="0" y="14">{top}</text></svg>'
    ).format(
        w=_WIDTH, h=_HEIGHT, e=_EDGE, b=base, t=base + 16, marks=Markup("").join(marks),
        left=left, right=right, bottom=bottom, top=top,
    )  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all.

    Raises:
        EnvironmentProblem: the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(fresh).replace(path)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be written ({error.strerror}); give another folder") from error
