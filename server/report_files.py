# SPDX-License-Identifier: Apache-2.0
"""The report as text: ``report.md`` for a wiki or a paper's supplement, ``table.csv`` for a spreadsheet.

Both say the same as the page, from the same evidence. Neither holds values of single patients.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from .report import write_page
from .report_checklists import checklists
from .report_design import design_summary
from .report_evidence import evidence_view
from .report_view import study_text
from .report_words import Json

__all__ = ["markdown_report", "sites_csv", "table_csv", "write_text_report"]

COLUMNS: Final[tuple[str, ...]] = (
    "metric", "model", "site", "mean", "low", "high", "n", "failed", "ours_on_shared", "difference", "difference_low",
    "difference_high", "test", "p", "p_holm", "tests", "p_bootstrap", "effect", "effect_low", "effect_high",
    "p_not_worse", "p_not_worse_holm", "margin", "note",
)  # fmt: skip


def write_text_report(results: Json, out: Path) -> None:
    """Write ``report.md`` and ``table.csv`` into ``out``.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    write_page(out / "report.md", markdown_report(results))
    if results.get("evidence") and results["evidence"]["scores"]:
        write_page(out / "table.csv", table_csv(results["evidence"]))
    elif results.get("sites"):
        write_page(out / "table.csv", sites_csv(results))


def sites_csv(results: Json) -> str:
    """One row per hospital and metric, where nothing is known of single patients."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["site", "role", "metric", "mean", "low", "high", "n", "state"])
    for name, site in results["sites"].items():
        for metric, estimate in site["metrics"].items():
            values = [estimate["mean"], *estimate["ci95"], estimate["n"]]
            table.writerow([name, site["role"], metric, *values, site["state"]])
        if not site["metrics"]:
            table.writerow([name, site["role"], "", "", "", "", 0, site["state"]])
    return text.getvalue()


def table_csv(evidence: Json) -> str:
    """One row per model, site and metric; with the comparison against our model where one was made."""
    compared = {(row["model"], row["site"], row["metric"]): row for row in evidence["comparisons"]}
    scored = {(row["model"], row["site"], row["metric"]) for row in evidence["scores"]}
    text = io.StringIO()
    table: csv.DictWriter[str] = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in evidence["scores"]:
        low, high = row["ci95"] or ("", "")
        values = {
            "metric": row["metric"], "model": evidence["models"].get(row["model"], row["model"]), "site": row["site"],
            "mean": _or_empty(row["mean"]), "low": low, "high": high, "n": row["n"], "failed": row["failed"],
        }  # fmt: skip
        if (key := (row["model"], row["site"], row["metric"])) in compared:
            values |= _compared(compared[key], evidence["margin"])
        table.writerow(values)
    for (model, site, _), row in compared.items():
        if (model, site, row["metric"]) not in scored:  # models that stand for others, such as the best local one
            theirs = row["theirs"] or {}
            low, high = theirs.get("ci95") or ("", "")
            values = {
                "metric": row["metric"], "model": evidence["models"].get(model, model), "site": site,
                "mean": _or_empty(theirs.get("mean")), "low": low, "high": high, "n": theirs.get("n", 0),
                "failed": theirs.get("failed", 0),
            }  # fmt: skip
            table.writerow(values | _compared(row, evidence["margin"]))
    return text.getvalue()


def _compared(row: Json, margin: float) -> dict[str, Any]:
    difference, effect, equivalence = (row.get(key) or {} for key in ("difference", "effect", "equivalence"))
    low, high = difference.get("ci95") or ("", "")
    effect_low, effect_high = effect.get("ci95") or ("", "")
    return {
        "ours_on_shared": _or_empty((row["ours"] or {}).get("mean")), "difference": _or_empty(difference.get("mean")),
        "difference_low": low, "difference_high": high, "p": _or_empty(row["p"]),
        "test": "" if row["p"] is None else row.get("test", "Wilcoxon"),
        "p_holm": _or_empty(row["p_holm"]), "tests": row["tests"], "p_bootstrap": _or_empty(row.get("p_bootstrap")),
        "effect": _or_empty(effect.get("value")), "effect_low": effect_low, "effect_high": effect_high,
        "p_not_worse": _or_empty(equivalence.get("p_not_worse")),
        "p_not_worse_holm": _or_empty(equivalence.get("p_not_worse_holm")), "margin": margin,
        "note": row.get("note", ""),
    }  # fmt: skip


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def markdown_report(results: Json) -> str:
    """The report in Markdown."""
    evidence = evidence_view(results.get("evidence"))
    parts = [f"# {_text(results['study']['name'])}", _text(results["study"]["description"])]
    if results["status"] != "complete":
        parts.append("**Not finished:** this is what there is so far.")
    if results["effective_study"]["privacy"]["mode"] == "none":
        parts.append('**No privacy promise:** `privacy.mode = "none"`.')
    if evidence:
        parts += _evidence_parts(evidence, results["evidence"])
    elif results.get("sites"):
        parts += ["## Scores", _table(("site", "role", "metric", "mean", "95 %", "patients"), _run_rows(results))]
    if results.get("trials"):
        trials = results["trials"]
        columns = ("rank", "trial", *trials["columns"], trials["metric"], "held out", "ε", "seconds", "state")
        rows = [
            (t["rank"], t["name"], *t["values"], t["value"], t["heldout"], t["epsilon"], t["seconds"], t["state"])
            for t in trials["rows"]
        ]
        parts += ["## Trials", trials["words"], _table(columns, rows)]
    parts += ["## Provenance", f"Study `{results['study_hash']}`."]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts += [versions] if versions else []
    for section, text in study_text(results["effective_study"]):
        parts.append(f"```toml\n[{section}]\n{text}\n```")
    for found in checklists(results):
        rows = [(e["number"], e["asks"], e["text"] or "**a person must write this**") for e in found["entries"]]
        parts += [f"## {found['title']}", found["source"], _table(("item", "asks", "here"), rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evidence_parts(view: Json, evidence: Json) -> list[str]:
    """Sections of evidence, in the order of the page."""
    parts = [f"**{text}**" for text in design_summary(evidence)]
    keys: tuple[str, ...]
    rows: list[tuple[Any, ...]] = [
        (card["site"], "held out" if card["heldout"] else "trains", card["score"], card["interval"], card["n"])
        for card in view["cards"]
    ]
    parts += [f"## {view['metric']} at each hospital", _table(("site", "role", "mean", "95 %", "patients"), rows)]
    if view["failures"] or view["notes"]:
        lines = [f"- **{_text(name)} failed.** {_text(text)}" for name, text in view["failures"]]
        parts += ["## Missing or odd", "\n".join([*lines, *(f"- {_text(note)}" for note in view["notes"])])]
    if view["cohort"]:
        rows = [(r["site"], r["patients"], *r["cells"]) for r in view["cohort"]["rows"]]
        parts += ["## Cohort", _table(("site", "patients", *view["cohort"]["traits"]), rows)]
    if view["gap"]:
        keys = ("site", "n", "inside", "outside", "difference")
        names = ("site", "patients", "where it trained", "held out", "difference")
        parts += ["## Gap", _table(names, _picked(view["gap"], keys))]
    keys = (
        "site",
        "model",
        "metric",
        "n",
        "ours",
        "theirs",
        "difference",
        "p",
        "p_holm",
        "effect",
        "not_worse",
        "verdict",
        "note",
    )
    for title, group in (("over all hospitals", view["overall"]), ("at each hospital", view["comparisons"])):
        if group:
            parts += [f"## Comparisons {title}", _table(keys, _picked(group, keys))]
    if view["matrix"]:
        rows = [
            (r["model"], *(f"{c['text']}, n = {c['n']}" if c["n"] else "–" for c in r["cells"]))
            for r in view["matrix"]["rows"]
        ]
        parts += ["## Model by hospital", _table(("model", *view["matrix"]["columns"]), rows)]
    keys = ("trait", "group", "patients", "value")
    parts += ["## By group of patients", _table(keys, _picked(view["strata"], keys))] if view["strata"] else []
    keys = ("model", "site", "seeds", "value", "range")
    parts += ["## Spread over seeds", _table(keys, _picked(view["seeds"], keys))] if view["seeds"] else []
    return parts


def _run_rows(results: Json) -> list[tuple[Any, ...]]:
    rows = []
    for name, site in results["sites"].items():
        for metric, estimate in site["metrics"].items():
            if "mean" in estimate:
                low, high = estimate["ci95"]
                rows.append(
                    (name, site["role"], metric, f"{estimate['mean']:.3f}", f"{low:.3f}–{high:.3f}", estimate["n"])
                )
    return rows


def _picked(rows: Sequence[Json], keys: Sequence[str]) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in rows]


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(_text, columns)) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(_text, row)) + " |" for row in rows)])


def _text(value: Any) -> str:
    """Text that cannot break a table, nor be read as HTML."""
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return text.replace("`", "\\`")
