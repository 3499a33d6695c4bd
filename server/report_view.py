# SPDX-License-Identifier: Apache-2.0
"""From ``results.json`` to what the report page says: words, tables and charts, without layout.

Held-out hospitals come first everywhere, and no score stands without what was paid for it (ε) and what it is
compared with. What is missing is said, never left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from ..privacy.errors import Reason
from .charts import STRONG_COLOURS, WEAK_COLOURS, DotRow, Mark, Series, dot_plot, line_chart

__all__ = ["build_view"]

Json = Mapping[str, Any]

METRIC_NAMES: Final = {"dice": "Dice", "hd95": "HD95", "accuracy": "Accuracy", "auroc": "AUROC"}
EXPLAINED: Final = {
    "dice": "Dice: overlap of prediction and truth over a patient's whole volume, 0 to 1, higher is better",
    "hd95": "HD95: 95th percentile of the distance between the two outlines, in mm, lower is better",
    "accuracy": "Accuracy: share of patients whose class is right",
    "auroc": "AUROC: chance that a patient of a class is ranked above one of another class; 0.5 is guessing",
}
DASHES: Final = ("", "6 3", "2 3", "8 3 2 3")
MOST_COLOURED: Final = len(WEAK_COLOURS)
NOT_REPORTED: Final = "not reported"


def build_view(results: Json) -> dict[str, Any]:
    """Everything that the template shows, except pictures.

    Args:
        results: the content of ``results.json``, schema version 1.
    """
    sites: Json = results["sites"]
    heldout = [name for name, site in sites.items() if site["role"] == "heldout"]
    training = [name for name, site in sites.items() if site["role"] != "heldout"]
    main = _main_metric(results)
    comparators = [_comparator(entry) for entry in results.get("comparators", {}).values()]
    return {
        "results": results,
        "main": _metric_name(main),
        "heldout": heldout,
        "training": training,
        "cards": [_card(results, name, main, comparators) for name in heldout],
        "heldout_scores": _scores(results, heldout, comparators),
        "training_scores": _scores(results, training, comparators),
        "comparators": [title for title, _ in comparators],
        "gap": _gap(sites, training, heldout),
        "dots": _dots(results, [*heldout, *training], main, comparators),
        "dots_shapes": _shapes(sites, comparators, main),
        "curve": _metric_curve(results, training, heldout, main),
        "curve_label": _metric_name(_curve_metric(results, main)),
        "loss": _train_curve(results, training, "loss", "mean training loss"),
        "spent": _train_curve(results, training, "epsilon", "ε spent"),
        "rounds": [_round(record, training, heldout, _curve_metric(results, main)) for record in results["rounds"]],
        "reasons": _reasons(results["rounds"]),
        "privacy": _privacy(results["privacy"], training),
        "explained": [EXPLAINED[key] for key in EXPLAINED if key in _metric_keys(results)],
        "study_text": [(section, _toml(values)) for section, values in results["effective_study"].items()],
        "duration": _duration(results["seconds"]),
    }


def _metric_name(key: str) -> str:
    """``dice_anterior`` → "Dice, anterior"."""
    base, _, label = key.partition("_")
    return METRIC_NAMES.get(base, base) + (f", {label}" if label else "")


def _is_mm(key: str) -> bool:
    return key.startswith("hd95")


def _number(key: str, value: float) -> str:
    return f"{value:.1f} mm" if _is_mm(key) else f"{value:.2f}"


def _with_interval(key: str, estimate: Json | None) -> str:
    """ "0.61 (0.55–0.67)", or a dash where there is none."""
    if not estimate:
        return "–"
    return f"{_number(key, estimate['mean'])} ({_interval(key, estimate)})"


def _interval(key: str, estimate: Json) -> str:
    low, high = estimate["ci95"]
    return f"{low:.1f}–{high:.1f}" if _is_mm(key) else f"{low:.2f}–{high:.2f}"


def _epsilon(value: float) -> str:
    """Rounded up: a report never says less than was spent."""
    return f"{math.ceil(value * 100 - 1e-6) / 100:.2f}"


def _metric_keys(results: Json) -> list[str]:
    """Metrics that the study asks for, then others that sites returned (per label)."""
    study = results["effective_study"]
    classification = study.get("task", {}).get("kind") == "classification"
    wanted = study.get("evaluation", {}).get("metrics") or (
        ["accuracy", "auroc"] if classification else ["dice", "hd95"]
    )
    found = {key for site in results["sites"].values() for key in site["metrics"]}
    return [*wanted, *sorted(found - set(wanted))]


def _main_metric(results: Json) -> str:
    """The metric of the headline: the selecting one, or the study's first."""
    selecting, keys = results["select"]["metric"], _metric_keys(results)
    return selecting if selecting in keys else keys[0]


def _curve_metric(results: Json, main: str) -> str:
    """The headline metric if rounds hold it; costly ones are computed at the end only."""
    seen = [key for record in results["rounds"] for site in record["metrics"].values() for key in site]
    return main if main in seen or not seen else seen[0]


def _comparator(entry: Json) -> tuple[str, Json]:
    return entry["title"], entry["sites"]


def _price(results: Json, name: str) -> str:
    """What a score cost in privacy: the site's own ε, or for a held-out site the largest of the training sites."""
    privacy = results["privacy"]
    if privacy["mode"] == "none":
        return "no privacy"
    spent, role = privacy["epsilon"], results["sites"][name]["role"]
    own = max(spent.values(), default=None) if role == "heldout" else spent.get(name)
    return (
        f"ε = {_epsilon(own)} per {privacy['unit']}, δ = {privacy['delta']:g}"
        if own is not None
        else "ε: nothing spent"
    )


def _missing(results: Json, name: str, key: str) -> str:
    """Why a metric of a site is not there."""
    site = results["sites"][name]
    if not site["metrics"]:
        state = site.get("state", "answered")
        return f"{NOT_REPORTED}: the hospital returned no metric" if state == "answered" else f"{NOT_REPORTED}: {state}"
    if _is_mm(key):
        if results["status"] != "complete":
            return f"{NOT_REPORTED}: computed at the end of a run"
        return f"{NOT_REPORTED}: voxel size unknown"
    return NOT_REPORTED


def _scores(results: Json, names: Sequence[str], comparators: Sequence[tuple[str, Json]]) -> list[dict[str, Any]]:
    """Rows of a score table: a hospital has one row per metric."""
    rows = []
    for name in names:
        site = results["sites"][name]
        keys = _metric_keys(results) if site["metrics"] else [_main_metric(results)]
        for position, key in enumerate(keys):
            estimate = site["metrics"].get(key)
            rows.append(
                {
                    "site": name, "first": position == 0, "span": len(keys), "size": site["public_size"],
                    "price": _price(results, name), "metric": _metric_name(key),
                    "score": _number(key, estimate["mean"]) if estimate else "",
                    "interval": _interval(key, estimate) if estimate else "",
                    "n": estimate["n"] if estimate else "",
                    "missing": "" if estimate else _missing(results, name, key),
                    "untrained": _with_interval(key, site.get("untrained", {}).get(key)),
                    "others": [_with_interval(key, other.get(name, {}).get("metrics", {}).get(key)) for _, other in comparators],
                }
            )  # fmt: skip
    return rows


def _card(results: Json, name: str, main: str, comparators: Sequence[tuple[str, Json]]) -> dict[str, Any]:
    """The headline of one held-out hospital."""
    site = results["sites"][name]
    estimate = site["metrics"].get(main)
    beside = [("untrained network", site.get("untrained", {}).get(main))]
    beside += [(title, other.get(name, {}).get("metrics", {}).get(main)) for title, other in comparators]
    return {
        "site": name,
        "score": _number(main, estimate["mean"]) if estimate else "–",
        "interval": _interval(main, estimate) if estimate else "",
        "n": estimate["n"] if estimate else 0,
        "missing": "" if estimate else _missing(results, name, main),
        "price": _price(results, name),
        "beside": [(title, _with_interval(main, other)) for title, other in beside],
    }


def _gap(sites: Json, training: Sequence[str], heldout: Sequence[str]) -> list[dict[str, str]]:
    """Per metric: mean over training hospitals, mean over held-out hospitals, and the difference."""

    def mean(names: Sequence[str], key: str) -> float | None:
        values = [sites[name]["metrics"][key]["mean"] for name in names if key in sites[name]["metrics"]]
        return sum(values) / len(values) if values else None

    rows = []
    for key in dict.fromkeys(key for site in sites.values() for key in site["metrics"]):
        inside, outside = mean(training, key), mean(heldout, key)
        if inside is None or outside is None:
            continue
        difference = outside - inside
        # For distances more is worse.
        better = difference < 0 if _is_mm(key) else difference > 0
        sign = "+" if difference > 0 else "−"
        rows.append(
            {
                "metric": _metric_name(key), "training": _number(key, inside), "heldout": _number(key, outside),
                "difference": sign + _number(key, abs(difference)),
                "verdict": "better on held-out hospitals" if better else "worse on held-out hospitals",
            }
        )  # fmt: skip
    return rows


def _dots(results: Json, names: Sequence[str], main: str, comparators: Sequence[tuple[str, Json]]) -> Markup | None:
    """The chart of scores per hospital, with what they are compared with; None where there is no score."""
    rows = []
    for name in names:
        site, marks = results["sites"][name], []
        if main in site["metrics"]:
            own = site["metrics"][main]
            marks.append(
                Mark(value=own["mean"], interval=tuple(own["ci95"]), note=f"{name}: {_with_interval(main, own)}")
            )
        if main in site.get("untrained", {}):
            value = site["untrained"][main]["mean"]
            marks.append(Mark(value=value, shape="diamond", note=f"{name}, untrained network: {_number(main, value)}"))
        for title, other in comparators:
            estimate = other.get(name, {}).get("metrics", {}).get(main)
            if estimate:
                note = f"{name}, {title}: {_number(main, estimate['mean'])}"
                marks.append(Mark(value=estimate["mean"], shape="square", note=note))
        rows.append(DotRow(name=name, marks=marks, strong=site["role"] == "heldout"))
    if not any(row.marks for row in rows):
        return None
    title = _metric_name(main) + (" in mm" if _is_mm(main) else "")
    return dot_plot(
        rows, label=f"{title} of each hospital", x_title=title, x_range=None if _is_mm(main) else (0.0, 1.0)
    )


def _shapes(sites: Json, comparators: Sequence[tuple[str, Json]], main: str) -> list[tuple[str, str]]:
    """What each shape of the dot chart means, as (character, text)."""
    shapes = [("●", "this model, bar: 95 % interval")]
    if any(main in site.get("untrained", {}) for site in sites.values()):
        shapes.append(("◇", "untrained network"))
    return shapes + [("□", title) for title, _ in comparators]


def _metric_curve(results: Json, training: Sequence[str], heldout: Sequence[str], main: str) -> Markup | None:
    """The headline metric of each hospital by round; None with fewer than two evaluated rounds."""
    key = _curve_metric(results, main)
    series = []
    for name in [*training, *heldout]:
        found = [(r["round"], r["metrics"][name][key]) for r in results["rounds"] if key in r["metrics"].get(name, {})]
        strong = name in heldout
        look = _look(name, heldout if strong else training, strong=strong)
        band = [(number, *estimate["ci95"]) for number, estimate in found] if strong else []
        series.append(Series(name=name, points=[(n, e["mean"]) for n, e in found], band=band, **look))
    if max((len(line.points) for line in series), default=0) < 2:
        return None
    title = _metric_name(key) + (" in mm" if _is_mm(key) else "")
    marker = (results["selected_round"], f"selected: {results['selected_round']}")
    y_range = None if _is_mm(key) else (0.0, 1.0)
    return line_chart(series, label=f"{title} by round", x_title="round", y_title=title, y_range=y_range, marker=marker)


def _train_curve(results: Json, training: Sequence[str], key: str, title: str) -> Markup | None:
    """Loss, or ε spent, of each training hospital by round; None where it is not reported."""
    series = []
    for name in training:
        found = [(r["round"], r["train"].get(name, {}).get(key)) for r in results["rounds"]]
        points = [(number, value) for number, value in found if value is not None]
        series.append(Series(name=name, points=points, **_look(name, training, strong=False)))
    if not any(line.points for line in series):
        return None
    budget = results["effective_study"].get("privacy", {}).get("epsilon") if key == "epsilon" else None
    rule = (float(budget), f"budget {budget:g}") if budget else None
    return line_chart(series, label=f"{title} by round", x_title="round", y_title=title, rule=rule)


def _look(name: str, group: Sequence[str], *, strong: bool) -> dict[str, Any]:
    """Colour, dash and label of a hospital's line; beyond six training hospitals they share one look."""
    position = group.index(name)
    if strong:
        return {
            "colour": STRONG_COLOURS[position % len(STRONG_COLOURS)],
            "strong": True,
            "labelled": position < MOST_COLOURED,
        }
    if len(group) > MOST_COLOURED:
        return {"colour": WEAK_COLOURS[-1], "labelled": False}
    return {"colour": WEAK_COLOURS[position], "dash": DASHES[position % len(DASHES)]}


def _round(record: Json, training: Sequence[str], heldout: Sequence[str], key: str) -> dict[str, Any]:
    """A row of the rounds' table."""

    def mean(values: Sequence[float | None], digits: int) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / len(known):.{digits}f}" if known else "–"

    def scores(names: Sequence[str]) -> list[float | None]:
        return [record["metrics"][n][key]["mean"] for n in names if key in record["metrics"].get(n, {})]

    refusals, trained = record["refusals"], record["train"]
    asked = set(trained) | {name for name in refusals if name in training}
    missing = "; ".join(f"{name} missing: {reason}" for name, reason in sorted(refusals.items()))
    answered = f"{len(trained)} of {len(asked)} sites" if asked else "before training"
    return {
        "number": record["round"],
        "seconds": f"{record['seconds']:.1f}",
        "down": f"{record['bytes_down'] / 1e6:.1f}",
        "up": f"{record['bytes_up'] / 1e6:.1f}",
        "loss": mean([entry.get("loss") for entry in trained.values()], 3),
        "training": mean(scores(training), 2),
        "heldout": mean(scores(heldout), 2),
        "answered": answered + (f", {missing}" if missing else ""),
        "fault": bool(missing),
    }


def _reasons(rounds: Sequence[Json]) -> list[tuple[str, str]]:
    """The reason codes that occur, with their fixed public text."""
    codes = sorted({code for record in rounds for code in record["refusals"].values()})
    return [(code, Reason(code).public_text if code in set(Reason) else "") for code in codes]


def _privacy(privacy: Json, training: Sequence[str]) -> dict[str, Any]:
    """The privacy statement as rows of (what, value), and ε and σ per hospital."""
    facts = [("unit", f"one {privacy['unit']}, with all scans")]
    for key, name in (
        ("neighbouring_relation", "neighbouring relation"), ("protects_against", "protects against"),
        ("delta", "δ"), ("clip", "clipping norm C"), ("sample_rate", "sampling rate q per step"),
        ("steps", "private steps per hospital"), ("accountant", "accountant"),
    ):  # fmt: skip
        value = privacy.get(key)
        if value is not None:
            facts.append((name, f"{value:g}" if isinstance(value, float) else str(value)))
    sigma = privacy.get("noise_multiplier", {})
    spent = privacy["epsilon"]
    rows = [
        {
            "site": name,
            "epsilon": _epsilon(spent[name]) if name in spent else "nothing spent",
            "sigma": f"{sigma[name]:.3f}" if name in sigma else "–",
        }
        for name in training
    ]
    return {"private": privacy["mode"] != "none", "facts": facts, "rows": rows, "worst": _worst(spent)}


def _worst(spent: Mapping[str, float]) -> str:
    return _epsilon(max(spent.values())) if spent else ""


def _toml(values: Json) -> str:
    """A section of the effective study in TOML's notation, for reading."""
    return "\n".join(f"{key} = {_toml_value(value)}" for key, value in values.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
