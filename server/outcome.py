# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people: results, model, report and signed manifest, always written together, in this order."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .manifest import write_manifest
from .results import write_results
from .store import RunStore

__all__ = ["write_outcome"]


def write_outcome(out: Path, *, previews: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> dict[str, Any]:
    """Write results, model, report (HTML, Markdown, CSV) and ``manifest.json`` from the saved state.

    Args:
        out: the run's folder; the run may be finished or not.
        previews: pictures by site, which only simulations have.

    Returns:
        The content of ``results.json``.

    Raises:
        StateError: there is no run.
        EnvironmentProblem: the folder cannot be written.
    """
    from .report import write_report  # imports Jinja2: only at the end of a run
    from .report_files import write_text_report

    store = RunStore.load(out)
    try:
        results = write_results(store)
    finally:
        store.close()
    write_report(results, out / "report.html", previews=previews)
    write_text_report(results, out)
    write_manifest(out, results)
    return results
