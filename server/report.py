# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one page that a coordinator can send to everyone, open anywhere and print.

The page holds everything it shows: styles, charts (inline SVG) and pictures (data URIs). It asks the network
for nothing and runs no script, which its own content security policy also forbids. Every text from results
passes the template's escaping, for names of hospitals and captions come from other machines.

:mod:`.report_view` decides what is said, ``templates/report.html`` how it looks.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..privacy.errors import EnvironmentProblem, StateError
from .report_view import build_view

__all__ = ["render", "write_page", "write_report"]

SCHEMA_VERSION: Final = 1
PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def write_report(
    results: Mapping[str, Any], path: Path, *, previews: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> None:
    """Write the report of a run as one self-contained HTML file.

    Args:
        results: the content of ``results.json``.
        path: file to write; replaced in one step.
        previews: pictures by site, each with ``file`` (a PNG) and ``caption``. Only simulations have them.

    Raises:
        StateError: results of another schema version.
        EnvironmentProblem: the file cannot be written.
    """
    version = results.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StateError(
            f"report: results have schema_version {version}, this FedNeuro reads {SCHEMA_VERSION}; "
            "write results.json again with this version (fedneuro-server report OUT)"
        )
    view = build_view(results)
    order = [*view["heldout"], *view["training"]]
    write_page(path, render("report.html", **view, previews=_pictures(previews or {}, order)))


def write_page(path: Path, page: str) -> None:
    """Replace a file in one step.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentProblem(
            f"report: cannot write {path}: {error.strerror}; free or choose another disk"
        ) from error


def render(template: str, **view: Any) -> str:
    """A page from one of the templates; every value of ``view`` is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page: str = environment.get_template(template).render(**view)
    return page


def _pictures(
    previews: Mapping[str, Sequence[Mapping[str, Any]]], order: Sequence[str]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """(site, [(data URI or "" where the picture cannot be read, caption)]), held-out sites first."""
    names = [name for name in order if previews.get(name)] + sorted(set(previews) - set(order))
    return [
        (name, [(_data_uri(Path(entry["file"])), str(entry.get("caption", ""))) for entry in previews[name]])
        for name in names
    ]


def _data_uri(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    if not content.startswith(PNG_SIGNATURE):
        return ""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
