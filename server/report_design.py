# SPDX-License-Identifier: Apache-2.0
"""The page of a design (leave one site out, patient folds, a search): the same house as ``report.html`` of a run.

Its first screen answers the question that a consortium was made for: the headline metric at each hospital that did not
train, with its interval, and what each hospital's own model and pooled training reach on the same patients.
"""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from .charts import DASHES, STRONG_COLOURS, WEAK_COLOURS, DotRow, Mark, Series, dot_plot, line_chart
from .report import render, write_page
from .report_charts import COMPARED, along
from .report_checklists import checklists
from .report_evidence import ALL, OURS, evidence_view
from .report_groups import calibration
from .report_view import study_text
from .report_words import Json, duration_text, epsilon_text, is_unbounded, metric_name, number, with_interval

__all__ = ["design_summary", "write_design_report"]

TITLES: Final = {
    "loso": "leave one hospital out",
    "cv": "folds of patients within hospitals",
    "sweep": "search over settings",
}
FIRST: Final = {
    "loso": (
        "At hospitals that never trained",
        "Each hospital was held out once: the federated model saw no patient of it, and it had no say in which "
        "round was chosen.",
    ),
    "cv": (
        "At patients that no model trained on",
        "Each patient was left out of training once, and judged by the federation of that fold.",
    ),
}
ENOUGH: Final = 0.97
"""Share of pooled training that a federation is expected to reach."""


def write_design_report(results: Json, path: Path) -> None:
    """Write the page of a design as one self-contained file.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    write_page(path, render("design.html", **_view(results)))


def _view(results: Json) -> dict[str, Any]:
    raw: Json = results.get("evidence") or {}
    evidence = evidence_view(raw)
    if evidence:
        evidence |= {"calibration": _calibration(results), "cohort_metrics": _cohort_metrics(results, raw)}
    design = results["design"]
    metric = raw.get("metric") or results.get("metric", "")
    dots, shapes = _dots(raw) if evidence else (None, [])
    spent = _spent(results, raw)
    curves = [(caption, curve) for caption, curve in _curves(results, metric) if curve]
    heading, words = FIRST.get(design, ("", ""))
    sections = [
        ("heldout", "results", bool(evidence)), ("trials", "trials", "trials" in results),
        ("odd", "missing or odd", bool(evidence and (evidence["notes"] or evidence["failures"]))),
        ("cohort", "cohort", bool(evidence and evidence["cohort"])),
        ("gap", "gap", bool(evidence and (evidence["gap"] or evidence["disparity"]))),
        ("comparators", "comparisons", bool(evidence and (evidence["comparisons"] or evidence["overall"]))),
        ("matrix", "matrix", bool(evidence and evidence["matrix"])),
        ("strata", "groups", bool(evidence and evidence["strata"])),
        ("seeds", "seeds", bool(evidence and evidence["seeds"])),
        ("scores", "all metrics", bool(evidence and evidence["scores"])), ("privacy", "privacy", True),
        ("curves", "curves", bool(curves)), ("provenance", "provenance", True), ("checklists", "checklists", True),
    ]  # fmt: skip
    return {
        "results": results,
        "title": TITLES[design],
        "meta": _meta(results),
        "unfinished": _unfinished(results),
        "private": results["effective_study"]["privacy"]["mode"] != "none",
        "sections": [(anchor, text) for anchor, text, there in sections if there],
        "evidence": evidence,
        "first_heading": heading,
        "first_words": words,
        "summary": design_summary(raw),
        "dots": dots,
        "shapes": shapes,
        "trials": results.get("trials"),
        "metric": metric_name(metric),
        "spent": spent,
        "curves": curves,
        "asked": [(name, _plain(value)) for name, value in results["asked"].items() if name != "study"],
        "study_text": study_text(results["effective_study"]),
        "checklists": checklists(results),
    }


def design_summary(evidence: Json) -> list[str]:
    """Two sentences on the question of the consortium: against pooled training, and against the best local model."""
    if not evidence or not evidence.get("scores"):
        return []
    key, more = evidence["metric"], evidence["higher_is_better"]
    pairs = {
        (row["model"], row["site"]): (row["ours"]["mean"], row["theirs"]["mean"])
        for row in evidence["comparisons"]
        if row["metric"] == key and row["ours"] and row["theirs"]
        if row["ours"]["mean"] is not None and row["theirs"]["mean"] is not None
    }
    sentences = []
    pooled = [values for (model, site), values in pairs.items() if model == "pooled" and site != ALL]
    theirs = sum(value for _, value in pooled)
    if pooled and theirs > 0 and more and not is_unbounded(key):
        share = sum(value for value, _ in pooled) / theirs
        verdict = "at least" if share >= ENOUGH else "less than"
        sentences.append(
            f"Federated training reaches {100 * share:.1f} % of pooled training's {metric_name(key)}, as a mean over "
            f"{len(pooled)} hospital{'' if len(pooled) == 1 else 's'}: {verdict} the {100 * ENOUGH:.0f} % expected."
        )
    worse = []
    sites = sorted({site for model, site in pairs if model.startswith("local: ") and site != ALL})
    for site in sites:
        locals_ = {
            model: values
            for (model, at), values in pairs.items()
            if at == site and model.startswith("local: ") and model != f"local: {site}"
        }
        if not locals_:
            continue
        best = (max if more else min)(locals_, key=lambda model: locals_[model][1])
        ours, other = locals_[best]
        if (ours < other) if more else (ours > other):
            worse.append(f"{site} ({ours:.3f} against {other:.3f} of {best.removeprefix('local: ')})")
    if sites:
        sentences.append(
            "At every hospital it is at least as good as the best other hospital's own model."
            if not worse
            else "The best other hospital's own model has a better mean at " + ", ".join(worse) + "."
        )
    return sentences


def _meta(results: Json) -> list[tuple[str, str]]:
    asked = results["asked"]
    found = [("hospitals", ", ".join(asked["sites"]))] if asked.get("sites") else []
    if asked.get("compare"):
        found.append(("beside", ", ".join(asked["compare"])))
    if asked.get("seeds", 1) > 1:
        found.append(("seeds", str(asked["seeds"])))
    found.append(("computed", duration_text(results["seconds"])))
    return found


def _unfinished(results: Json) -> str:
    missing = [f"{fold['name']} ({fold['status']})" for fold in results["folds"] if fold["status"] != "complete"]
    return f"Not complete: {', '.join(missing)}." if missing else ""


def _dots(evidence: Json) -> tuple[Markup | None, list[tuple[str, str]]]:
    """Every model at every site; at most as many comparators as there are shapes are drawn, others are in tables."""
    key = evidence["metric"]
    scores = {(row["model"], row["site"]): row for row in evidence["scores"] if row["metric"] == key}
    shown = [m for m in ("pooled", "untrained", "fine-tuned", "previous", "majority") if any(k[0] == m for k in scores)]
    locals_ = [m for m in evidence["models"] if m.startswith("local: ")]
    looks = dict(zip([*shown, "local"], cycle(COMPARED), strict=False))
    rows = []
    for site in evidence["sites"]:
        marks = []
        for model in (OURS, *shown, *locals_):
            row = scores.get((model, site))
            if not row or row["mean"] is None:
                continue
            title = evidence["models"].get(model, model)
            note = f"{site}, {title}: {number(key, row['mean'])}, n = {row['n']}"
            if model == OURS:
                interval = tuple(row["ci95"]) if row["ci95"] else None
                marks.append(Mark(value=row["mean"], interval=interval, note=note))
            else:
                shape = looks["local" if model in locals_ else model][0]
                marks.append(Mark(value=row["mean"], shape=shape, note=note))
        rows.append(DotRow(name=site, marks=marks, strong=site in evidence["heldout"]))
    if not any(row.marks for row in rows):
        return None, []
    shapes = [("●", "federated, bar: 95 % interval")]
    shapes += [(looks[m][1], evidence["models"].get(m, m)) for m in shown]
    shapes += [(looks["local"][1], "one hospital's own model (each)")] if locals_ else []
    title = metric_name(key)
    label = f"{title} of every model at every hospital"
    return dot_plot(rows, label=label, x_title=title, x_range=None if is_unbounded(key) else (0.0, 1.0)), shapes


def _calibration(results: Json) -> Markup | None:
    """The reliability curve of each fold at its held-out hospital."""
    sites = {
        name if name == fold["name"] else f"{name}, {fold['name']}": {
            "role": "heldout",
            "reliability": site.get("reliability"),
        }
        for fold in results["folds"]
        for name, site in (fold.get("sites") or {}).items()
    }
    return calibration({"sites": sites}, list(sites))


def _cohort_metrics(results: Json, raw: Json) -> dict[str, Any] | None:
    """Metrics that a cohort has and no patient, such as ECE, at the held-out hospital of each fold."""
    known = {row["metric"] for row in raw["scores"]}
    rows: list[tuple[str, str, Json]] = [
        (fold["name"], hospital, site["metrics"] or {})
        for fold in results["folds"]
        for hospital, site in (fold.get("sites") or {}).items()
    ]
    names = [name for name in dict.fromkeys(n for _, _, metrics in rows for n in metrics) if name not in known]
    if not names:
        return None
    cells = [(fold, at, [with_interval(name, metrics.get(name)) for name in names]) for fold, at, metrics in rows]
    return {"names": [metric_name(name) for name in names], "rows": cells}


def _curves(results: Json, metric: str) -> list[tuple[str, Markup | None]]:
    """The held-out metric of every fold by round, by second and by byte."""
    folds = [fold for fold in results["folds"] if fold.get("rounds")]
    charts: list[tuple[str, Markup | None]] = []
    for axis, words in (("round", "round"), ("seconds", "seconds of computing"), ("bytes", "MB sent and received")):
        series = []
        for position, fold in enumerate(folds):
            for site in fold["heldout"]:
                values = [(k, r["metrics"].get(site, {}).get(metric)) for k, r in enumerate(fold["rounds"])]
                places = along(fold["rounds"], axis)
                points = [(places[k], value["mean"]) for k, value in values if value]
                name = site if len(fold["heldout"]) == 1 else f"{site}, {fold['name']}"
                colours = (*STRONG_COLOURS, *WEAK_COLOURS)
                colour, dash = colours[position % len(colours)], DASHES[position % len(DASHES)]
                series.append(Series(name=name, points=points, colour=colour, dash=dash))
        if max((len(line.points) for line in series), default=0) < 2:
            return []
        y_range = None if is_unbounded(metric) else (0.0, 1.0)
        title = metric_name(metric)
        chart = line_chart(series, label=f"{title} by {words}", x_title=words, y_title=title, y_range=y_range)
        charts.append((f"{title} by {words}", chart))
    return charts


def _spent(results: Json, evidence: Json) -> list[dict[str, str]]:
    rows = []
    key = evidence.get("metric", "")
    scores = {row["site"]: row for row in evidence.get("scores", ()) if (row["model"], row["metric"]) == (OURS, key)}
    for fold in results["folds"]:
        privacy = fold.get("privacy")
        if not privacy:
            continue
        spent = privacy.get("epsilon") or {}
        held = [scores[site] for site in fold["heldout"] if site in scores and scores[site]["mean"] is not None]
        rows.append(
            {
                "name": fold["name"], "mode": privacy.get("mode") or "none", "unit": privacy.get("unit") or "patient",
                "epsilon": epsilon_text(max(spent.values())) if spent else "nothing spent",
                "delta": f"{privacy['delta']:g}" if privacy.get("delta") else "–",
                "score": ", ".join(number(key, row["mean"]) for row in held) or "–",
            }
        )  # fmt: skip
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
