# SPDX-License-Identifier: Apache-2.0
"""What a search found: trials in the order of what training hospitals say, as results, table and report."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ...models.metrics import higher_is_better
from ...privacy.study import Study
from ...server.report_design import write_design_report
from ...server.report_files import write_text_report
from ...server.report_words import epsilon_text, metric_name
from ...server.store import dumps
from .space import toml_text
from .sweep import load_sweep
from .tasks import read_results

__all__ = ["finish_sweep"]


def finish_sweep(out: Path) -> dict[str, Any]:
    """Write ``results.json``, ``table.csv`` and the report of a search from what is saved; returns the results.

    Raises:
        StateError: ``out`` holds no search.
    """
    values = load_sweep(out)
    study = Study.parse(dict(values["study"]))
    metric = study.select_metric
    groups: dict[int, list[dict[str, Any]]] = {}
    for name, trial in values["trials"].items():
        groups.setdefault(trial["number"], []).append(_trial(out, name, trial, metric))
    better = 1.0 if higher_is_better[metric] else -1.0
    merged = [_merged(runs) for _, runs in sorted(groups.items())]
    merged.sort(key=lambda row: (row["value"] is None, -better * (row["value"] or 0.0)))
    trials = values["trials"].values()
    complete = bool(trials) and all(run["done"] for runs in groups.values() for run in runs)
    results: dict[str, Any] = {
        "schema_version": 1, "kind": "design", "design": "sweep", "metric": metric,
        "study": {"name": study.study.name, "description": study.study.description},
        "study_hash": study.hash, "effective_study": study.model_dump(mode="json"), "asked": values["asked"],
        "status": "complete" if complete else "partial", "folds": [], "evidence": None, "settings": merged,
        "trials": _table(values["asked"], merged, metric),
        "versions": next((run["versions"] for runs in groups.values() for run in runs if run["versions"]), {}),
        "seconds": sum(run["seconds"] or 0.0 for runs in groups.values() for run in runs),
    }  # fmt: skip
    _write(out / "results.json", dumps(results))
    _write(out / "table.csv", _csv(values["asked"]["varied"], merged, metric))
    write_design_report(results, out / "report.html")
    write_text_report(results, out)
    return results


def _trial(out: Path, name: str, trial: Mapping[str, Any], metric: str) -> dict[str, Any]:
    found = read_results(out / "runs" / name)
    if not found or found["study_hash"] != trial["study"]:
        found = {}
    done = found.get("status") == "complete"
    held = [s["metrics"][metric]["mean"] for s in found.get("sites", {}).values()
            if s["role"] == "heldout" and metric in s["metrics"]]  # fmt: skip
    spent = found.get("privacy", {}).get("epsilon", {})
    return {
        "name": name, "setting": trial["setting"], "done": done, "error": "" if done else trial["error"],
        "value": found["select"]["value"] if done else None, "heldout": fmean(held) if held and done else None,
        "epsilon": max(spent.values(), default=None), "seconds": found.get("seconds"),
        "versions": found.get("versions", {}), "round": found.get("selected_round"),
    }  # fmt: skip


def _merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One setting over its seeds."""
    known = [run["value"] for run in runs if run["value"] is not None]
    held = [run["heldout"] for run in runs if run["heldout"] is not None]
    errors = [run["error"] for run in runs if run["error"]]
    epsilon = [run["epsilon"] for run in runs if run["epsilon"] is not None]
    return {
        "name": runs[0]["name"].partition("-seed")[0], "setting": runs[0]["setting"],
        "value": fmean(known) if known else None, "sd": stdev(known) if len(known) > 1 else None,
        "heldout": fmean(held) if held else None, "heldout_sd": stdev(held) if len(held) > 1 else None,
        "epsilon": max(epsilon, default=None), "seconds": sum(run["seconds"] or 0.0 for run in runs),
        "seeds": len(runs), "done": sum(run["done"] for run in runs), "errors": errors,
    }  # fmt: skip


def _table(asked: Mapping[str, Any], merged: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    rows = []
    for rank, row in enumerate(merged, 1):
        state = "done" if row["done"] == row["seeds"] else f"{row['done']} of {row['seeds']} done"
        rows.append(
            {
                "rank": str(rank) if row["value"] is not None else "–", "name": row["name"],
                "values": [toml_text(row["setting"].get(key, "")) for key in asked["varied"]],
                "value": _number(row["value"], row["sd"]), "heldout": _number(row["heldout"], row["heldout_sd"]),
                "epsilon": epsilon_text(row["epsilon"]) if row["epsilon"] is not None else "–",
                "seconds": f"{row['seconds']:.0f}", "state": "; ".join([state, *row["errors"][:1]]),
            }
        )  # fmt: skip
    return {
        "metric": metric_name(metric), "columns": asked["varied"], "rows": rows,
        "words": f"{len(merged)} settings, in the order of {metric_name(metric)} on validation patients of training "
        "hospitals, which choose. Held-out hospitals are shown and never choose. The best of many trials looks better "
        "than it is; under privacy each trial spends its own ε.",
    }  # fmt: skip


def _number(value: float | None, sd: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if sd is None else f"{value:.3f} ± {sd:.3f}"


def _csv(keys: list[str], merged: list[dict[str, Any]], metric: str) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", *keys, f"{metric}_training", "sd", f"{metric}_heldout", "heldout_sd", "epsilon", "seconds",
                    "seeds", "done", "error"])  # fmt: skip
    for row in merged:
        cells = [row[key] for key in ("value", "sd", "heldout", "heldout_sd", "epsilon", "seconds", "seeds", "done")]
        settings = [toml_text(row["setting"].get(key, "")) for key in keys]
        table.writerow([row["name"], *settings, *("" if c is None else c for c in cells), "; ".join(row["errors"])])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
